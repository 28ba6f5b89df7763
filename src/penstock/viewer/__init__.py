"""The trace viewer: a local web page over a JSONL file of traces, however large, still growing or not."""
