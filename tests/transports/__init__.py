"""Weight transports: one suite of checks, over each way that weights get into an engine."""
