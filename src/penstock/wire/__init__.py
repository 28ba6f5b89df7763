"""Bytes on sockets: HTTP/1.1 client and server, server-sent events, the OpenAI messages."""
