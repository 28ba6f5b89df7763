"""The scripted engine: a vLLM-shaped server without a model, for tests of clients, routers and load testers.

It imports nothing of penstock but `errors` and `wire`, and runs in a process of its own.
"""
