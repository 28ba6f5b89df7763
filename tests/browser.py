"""A real browser, without a window, told what to do by the DevTools protocol over a pair of pipes.

Chromium ends when its pipes close. `CHROMIUM` is where it is: PENSTOCK_CHROMIUM, or what is on the path.
"""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import signal
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import orjson

CHROMIUM: Final = os.environ.get("PENSTOCK_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
MISSING: Final = "NOT TESTED in a browser: no chromium is here (apt-get install chromium)"
START_BOUND: Final = 30.0
"""Seconds a cold chromium on a busy machine may take to answer."""

_FLAGS: Final = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-proxy-server",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
_NOWHERE: Final = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"


class Browser:
    """One chromium with a profile of its own in `folder`; `async with` starts and ends it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = 0
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.pages: dict[str, Page] = {}

    async def __aenter__(self) -> Browser:
        assert CHROMIUM is not None, MISSING
        loop = asyncio.get_running_loop()
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        script = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        command = ["bash", "-c", script, CHROMIUM, *_FLAGS, _NOWHERE, f"--user-data-dir={self._folder}"]
        self._child = subprocess.Popen(  # noqa: ASYNC220 -- a moment
            command,
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._reader = asyncio.StreamReader(limit=1 << 26)
        self._read_end, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(self._reader), os.fdopen(ours_in, "rb", buffering=0)
        )
        self._write_end, _ = await loop.connect_write_pipe(
            asyncio.BaseProtocol, os.fdopen(ours_out, "wb", buffering=0)
        )
        self._task = loop.create_task(self._listen())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        self._write_end.close()
        self._read_end.close()
        try:
            os.killpg(self._child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._child.wait(10)

    async def call(self, method: str, session: str | None = None, /, **params: Any) -> dict[str, Any]:
        """The result of a command. Raises AssertionError with what the browser says against it."""
        self._numbers += 1
        number = self._numbers
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        future = self._answers[number] = asyncio.get_running_loop().create_future()
        self._write_end.write(orjson.dumps(message) + b"\0")
        answer = await asyncio.wait_for(future, START_BOUND)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    async def open(self, url: str, *, size: tuple[int, int] = (1280, 900), dark: bool = False) -> Page:
        """A new tab that shows `url`; `size`: width and height, pixels."""
        target = (await self.call("Target.createTarget", url="about:blank"))["targetId"]
        attached = await self.call("Target.attachToTarget", targetId=target, flatten=True)
        page = self.pages[attached["sessionId"]] = Page(self, attached["sessionId"])
        await page.call(
            "Emulation.setDeviceMetricsOverride",
            width=size[0], height=size[1], deviceScaleFactor=1, mobile=size[0] < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await page.call("Emulation.setEmulatedMedia", features=[scheme])
        for domain in ("Page", "Runtime", "Log", "Network"):
            await page.call(f"{domain}.enable")
        await page.call("Page.navigate", url=url)
        await page.loaded()
        return page

    async def _listen(self) -> None:
        while True:
            message = orjson.loads((await self._reader.readuntil(b"\0"))[:-1])
            if "id" in message:
                future = self._answers.pop(message["id"])
                if not future.done():
                    future.set_result(message)
            elif message.get("sessionId") in self.pages:
                self.pages[message["sessionId"]].notice(message["method"], message["params"])


class Page:
    """One tab. `problems`: what the console has said that is an error or a warning. `requested`: URLs."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session
        self.problems: list[str] = []
        self.requested: list[str] = []

    async def call(self, method: str, /, **params: Any) -> dict[str, Any]:
        return await self._browser.call(method, self._session, **params)

    async def loaded(self) -> None:
        """Waits until there is a page, and its script has run."""
        await self.until("document.readyState === 'complete' && location.protocol !== 'about:'")

    async def reload(self) -> None:
        await self.value("window.old = true")
        await self.call("Page.reload")
        await self.until("!window.old")
        await self.loaded()

    async def value(self, expression: str) -> Any:
        """What the expression is in the page; a promise is waited for."""
        answer = await self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, expression: str, *, bound: float = 15.0) -> Any:
        """Waits until the expression is true in the page; its value then."""
        try:
            async with asyncio.timeout(bound):
                while True:
                    value = await self.value(expression)
                    if value:
                        return value
                    await asyncio.sleep(0.05)
        except TimeoutError:
            text = await self.value("document.body.innerText")
            raise AssertionError(f"not in {bound:g} s: {expression}\n{self.problems}\n{text}") from None

    async def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """A PNG of what is seen, or of the whole page."""
        answer = await self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))  # noqa: ASYNC240

    def notice(self, method: str, params: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(str(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
