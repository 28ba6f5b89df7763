"""Batch generation: a dataset in, reasoning traces out, resumable at any byte."""
