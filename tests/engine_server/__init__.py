"""The engine's HTTP side, over real sockets."""
