"""An engine that does what a test wants. Run as a script: a JSON object of what to do, and the port."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TextIO

READY = "INFO:     Application startup complete."


def main() -> None:
    do = json.loads(sys.argv[1])
    if do.get("ignore_term"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for _ in range(do.get("daemons", 0)):
        start_daemon(ignore_term=bool(do.get("ignore_term")))
    for line in do.get("lines", ()):
        say(line)
    if "log" in do:
        say(Path(do["log"]).read_text(), sys.stderr)
    if do.get("silent"):
        time.sleep(600)
    if "exit" in do:
        sys.exit(do["exit"])
    if "kill" in do:
        os.kill(os.getpid(), do["kill"])
    time.sleep(do.get("bind_after", 0))
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", int(sys.argv[2])))
    listener.listen(64)
    say(READY)
    if do.get("close_output"):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
    serve(listener)


def say(text: str, stream: TextIO | None = None) -> None:
    stream = stream or sys.stdout
    stream.write(text + "\n")
    stream.flush()


def start_daemon(*, ignore_term: bool) -> None:
    """A process with a session and a parent of its own, as a daemon has; it ignores SIGTERM on request."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            if ignore_term:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        os._exit(0)
    os.wait()


def serve(listener: socket.socket) -> None:
    """/health says `status`; /say/TEXT prints TEXT, /sick sets the status to 503, /hang is never answered."""
    status, hanging = "200 OK", []
    while True:
        connection, _ = listener.accept()
        path = connection.recv(65536).split(b" ", 2)[1].decode()
        if path == "/hang":
            hanging.append(connection)
            continue
        if path.startswith("/say/"):
            say(path.removeprefix("/say/").replace("+", " "))
        if path == "/sick":
            status = "503 Service Unavailable"
        said = status if path == "/health" else "200 OK"
        body = json.dumps({"path": path, "object": "list", "data": [{"id": "fake"}]})
        head = f"HTTP/1.1 {said}\r\ncontent-type: application/json\r\nconnection: close\r\n"
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
        connection.close()


if __name__ == "__main__":
    main()
