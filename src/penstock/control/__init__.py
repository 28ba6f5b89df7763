"""The control plane of a fleet: calls to every engine, and weight updates as transactions."""
