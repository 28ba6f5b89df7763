"""Real engines side by side with the embedded one. Slow; each test says what it needs."""
