"""Which endpoint, may I, again? Pure state machines: no event loop, clock and randomness from outside."""
