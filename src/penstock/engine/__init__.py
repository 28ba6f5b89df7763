"""The embedded engine: a Hugging Face checkpoint folder in, tokens out, on CPU or CUDA.

    config.py ─► weights.py ─► model.py ◄── attention.py (native.py, native.c) ─┐
    sequence.py, kv_cache.py ─► scheduler.py ───────────────────────────────────┼─► engine.py
    draw.py ─► sampling.py ─────────────────────────────────────────────────────┘

`engine.LLMEngine` is synchronous and knows only token ids; text, HTTP and threads are built on top of it.
Importing this package imports nothing: `config` is light, `engine` loads torch.
"""
