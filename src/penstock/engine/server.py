"""The life of an engine process: load, listen, say so, serve until told to stop.

`serve` prints exactly one line to standard output, when requests can be sent. It returns the exit status: 0
after SIGTERM or SIGINT, 1 when the engine died. What is in flight at a signal may finish within
`shutdown_timeout`; then, or at a second signal, it is answered with an error.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from typing import Final

from penstock.engine.app import EngineApp
from penstock.engine.config import EngineConfig
from penstock.engine.engine import LLMEngine
from penstock.engine.options import ServerOptions
from penstock.wire.loop import Stop, run
from penstock.wire.server import HttpServer

SWITCH_INTERVAL: Final = 0.0005
"""Seconds the loop's thread may keep the interpreter lock from the engine's thread, and the other way round.
Steps of a small model take a few milliseconds; with the default of 5 ms they double."""

ERROR_GRACE: Final = 1.0
"""Seconds in which clients whose requests failed can read their errors before the process ends."""

logger = logging.getLogger(__name__)


def serve(config: EngineConfig, options: ServerOptions) -> int:
    """Run an engine until it is told to stop; the exit status. Raises ConfigError when it cannot start."""
    # One prompt at a time is tokenized: a pool of threads for it would only add hand-overs.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.setswitchinterval(SWITCH_INTERVAL)
    app = EngineApp(
        LLMEngine(config),
        served_model_names=options.served_model_name,
        prompt_tokens_details=options.enable_prompt_tokens_details,
        api_keys=options.api_keys(),
    )
    return run(_serve(app, options))


async def _serve(app: EngineApp, options: ServerOptions) -> int:
    server = HttpServer(app.handle, options.host, options.port, max_body=app.max_body)
    await server.start()
    app.engine.start()
    stop = Stop()
    host = f"[{options.host}]" if ":" in options.host else options.host
    print(f"penstock engine ready on http://{host}:{server.port}", flush=True)  # noqa: T201
    await asyncio.wait((stop.wished, app.engine.dead), return_when=asyncio.FIRST_COMPLETED)
    died = app.engine.dead.done()
    grace = 0.0 if died else options.shutdown_timeout
    closing = asyncio.ensure_future(server.close(grace + ERROR_GRACE))
    await asyncio.wait((closing, stop.hurried), timeout=grace, return_when=asyncio.FIRST_COMPLETED)
    await app.engine.close()
    await closing
    return 1 if died else 0
