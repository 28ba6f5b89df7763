"""Inputs: whatever holds rows, read lazily as one JSON object a row."""
