"""Scripted engines with the control routes of vLLM or of SGLang, that misbehave where a test wants it."""

from __future__ import annotations

import asyncio
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import orjson

from tests.scripted import Call, ScriptedEngine, Step, chat_body, http


class ControlledEngine(ScriptedEngine):
    """State of an engine under vLLM's routes. `faults`: steps in place of the answers of some paths."""

    def __init__(self, port: int = 0) -> None:
        super().__init__(default=self._act, side={}, port=port)
        self.faults: dict[str, Step] = {}
        self.paths: list[str] = []
        """Control calls in order, the queries included."""
        self.completions = 0
        self.paused = False
        self.asleep: int | None = None
        self.weights: str = "start"
        self.label: str = "default"

    async def __aenter__(self) -> Self:
        await self.listen()
        return self

    def restart(self) -> None:
        """It is a new process from now on."""
        self.paused, self.asleep, self.weights, self.label = False, None, "start", "default"
        self.faults.clear()

    async def _act(self, call: Call) -> None:
        path = urlsplit(call.path).path
        if path.startswith("/v1/") and path not in self.faults:
            self.completions += 1
            while self.paused:  # noqa: ASYNC110 -- tests set it from outside
                await asyncio.sleep(0.002)
            await call.write(http(200, chat_body(self.weights)))
            return
        self.paths.append(call.path)
        fault = self.faults.get(path)
        if fault is not None:
            await fault(call)
            return
        query = {name: values[-1] for name, values in parse_qs(urlsplit(call.path).query).items()}
        answer = self.answer(call.method, path, query, call.json if call.body else {})
        status = 404 if answer is None else 200
        await call.write(
            http(status, orjson.dumps({"error": {"message": "Not Found"}} if answer is None else answer))
        )

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Any:
        match path:
            case "/health":
                return {}
            case "/version":
                return {"version": "0.32.0"}
            case "/pause":
                self.paused = True
                return {"status": "paused"}
            case "/resume":
                self.paused = False
                return {"status": "resumed"}
            case "/is_paused":
                return {"is_paused": self.paused}
            case "/sleep":
                self.asleep = int(query["level"])
                return {"status": "sleeping"}
            case "/wake_up":
                self.asleep = None
                return {"status": "awake"}
            case "/reset_prefix_cache":
                return {"success": True}
            case "/abort_requests":
                return {"status": "aborted", "aborted": 0}
            case "/weight_info":
                return {"weight_version": self.label}
            case "/collective_rpc":
                assert body["method"] == "reload_weights"
                self.weights = body["kwargs"]["weights_path"]
                return {"results": [None]}
            case "/update_weight_version":
                self.label = body["new_version"]
                return {"success": True, "new_version": self.label}
        return None


class SGLangEngine(ControlledEngine):
    """The same under SGLang's routes."""

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Any:
        match path:
            case "/model_info":
                return {"model_path": "m", "weight_version": self.label}
            case "/pause_generation":
                self.paused = True
                return {"status": "ok", "mode": body["mode"]}
            case "/continue_generation":
                self.paused = False
                return {"status": "ok"}
            case "/release_memory_occupation":
                self.asleep = len(body["tags"])
                return None if not body["tags"] else {"tags": body["tags"]}
            case "/resume_memory_occupation":
                self.asleep = None
                return {"tags": body["tags"]}
            case "/flush_cache" | "/abort_request":
                return {"success": True}
            case "/update_weights_from_disk":
                self.weights, self.label = body["model_path"], body["weight_version"]
                return {"success": True, "message": "Succeeded"}
        return None
