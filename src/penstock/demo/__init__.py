"""The demo: a small task whose answers can be checked, for the small model that ships with the package."""
