"""The life of a scripted engine's process: listen, say so, serve until told to stop, die when chaos says so.

`serve` prints exactly one line to standard output, when requests can be sent, and returns the exit status. A
kill resets every connection, open or half answered, and closes the port; after its time down the engine
listens on the same port again, with an empty batch. The process itself stays, and with it the account: it is
what a load tester asks for after the kill.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final

from penstock.errors import ConfigError
from penstock.scripted.app import ScriptedApp
from penstock.scripted.chaos import Kill
from penstock.scripted.config import ScriptedArgs
from penstock.scripted.connection import Line
from penstock.wire.loop import Stop, run
from penstock.wire.server import HttpServer

PORT_RETRY: Final = 0.1
"""Seconds between two tries to have the port again."""

KEEP_ALIVE: Final = 5.0
"""Seconds an idle connection is kept, as uvicorn does under vLLM."""


class ScriptedServer:
    """A scripted engine that listens; an async context manager. port: 0 for any free one."""

    def __init__(self, app: ScriptedApp, host: str = "127.0.0.1", port: int = 0) -> None:
        self.app = app
        self.host = host
        self.port = port
        self.kills = 0
        self._server = self._new_server()
        self._killer: asyncio.Task[None] | None = None

    async def __aenter__(self) -> ScriptedServer:
        await self._server.start()
        self.port = self._server.port
        kill = self.app.config.chaos.kill
        if kill is not None:
            self._killer = asyncio.create_task(self._kill_again_and_again(kill))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, grace: float = 0.0) -> None:
        """Stops accepting, gives requests in flight so many seconds, then cuts them off."""
        if self._killer is not None:
            self._killer.cancel()
            with suppress(asyncio.CancelledError):
                await self._killer
        await self._server.close(grace)
        self.app.batch.close()

    async def kill(self, down: float) -> None:
        """Resets all connections and is not there for so many seconds."""
        self.kills += 1
        app = self.app
        for answer in list(app.batch.answers):
            answer.faulted("kill")
        app.batch.account.killed()  # stalled requests are not in the batch
        for line in list(app.lines):
            line.reset()
        await self._server.close()
        await asyncio.sleep(down)
        while True:
            self._server = self._new_server()
            try:
                await self._server.start()
                return
            except ConfigError:  # somebody else has the port
                await asyncio.sleep(PORT_RETRY)

    async def _kill_again_and_again(self, kill: Kill) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + (kill.every if kill.first is None else kill.first)
        while True:
            await asyncio.sleep(due - loop.time())
            await self.kill(kill.down)
            due += kill.every

    def _new_server(self) -> HttpServer:
        return HttpServer(
            self.app.handle,
            self.host,
            self.port,
            keep_alive=KEEP_ALIVE,
            protocol=lambda server: Line(server, self.app),
        )


def serve(args: ScriptedArgs) -> int:
    """Runs an engine until it is told to stop; the exit status. Raises ConfigError when it cannot start."""
    app = ScriptedApp(args.config())
    return run(_serve(app, args))


async def _serve(app: ScriptedApp, args: ScriptedArgs) -> int:
    server = ScriptedServer(app, args.host, args.port)
    async with server:
        stop = Stop()
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"penstock engine ready on http://{host}:{server.port}", flush=True)  # noqa: T201
        await stop.wished
        closing = asyncio.ensure_future(server.close(args.shutdown_timeout))
        await asyncio.wait((closing, stop.hurried), return_when=asyncio.FIRST_COMPLETED)
        for line in list(app.lines):
            line.abort()
        await closing
    return 0
