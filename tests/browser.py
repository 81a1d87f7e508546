"""A page in a headless Chromium, by its DevTools protocol: what its console says, its width, a picture."""

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DESKTOP, PHONE = (1280, 900), (390, 844)
DEADLINE_SECONDS = 90.0


@dataclass(frozen=True)
class Seen:
    """complaints: errors and warnings of the console, and requests that failed. values: what the expressions
    gave. width: px of the document: more than the window's where the page has to be moved sideways."""

    complaints: list[str]
    values: list[Any]
    width: int
    picture: bytes


def look(page: Path, window: tuple[int, int], expressions: tuple[str, ...] = ()) -> Seen:
    """Open a page; a PNG of all of it."""
    assert BROWSER is not None
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        command = [BROWSER, *options, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = _port(Path(profile) / "DevToolsActivePort")
            return asyncio.run(asyncio.wait_for(_look(port, page, window, expressions), DEADLINE_SECONDS))
        finally:
            process.terminate()
            process.wait(30)


def _port(path: Path) -> int:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        lines = path.read_text().splitlines() if path.is_file() else []
        if len(lines) >= 2:
            return int(lines[0])
        time.sleep(0.05)
    raise TimeoutError("the browser has not started")


async def _look(port: int, page: Path, window: tuple[int, int], expressions: tuple[str, ...]) -> Seen:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json") as answer:
            targets = await answer.json()
        (target,) = [t for t in targets if t["type"] == "page"]
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            tab = _Tab(socket)
            width, height = window
            for domain in ("Page", "Runtime", "Log", "Network"):
                await tab.call(f"{domain}.enable")
            screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
            await tab.call("Emulation.setDeviceMetricsOverride", **screen)
            await tab.call("Page.navigate", url=page.resolve().as_uri())
            await tab.event("Page.loadEventFired")
            values = [await tab.evaluate(expression) for expression in expressions]
            across = await tab.evaluate("document.documentElement.scrollWidth")
            tall = await tab.evaluate("document.documentElement.scrollHeight")
            clip = {"x": 0, "y": 0, "width": width, "height": tall, "scale": 1}
            shot = await tab.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
            return Seen(tab.complaints(), values, across, base64.b64decode(shot["data"]))


class _Tab:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number, self._events = socket, 0, list[dict[str, Any]]()

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_str(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == self._number:
                assert "error" not in message, message
                return dict(message["result"])
            self._events.append(message)

    async def event(self, method: str) -> None:
        while not any(event.get("method") == method for event in self._events):
            self._events.append(await self._socket.receive_json())

    async def evaluate(self, expression: str) -> Any:
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def complaints(self) -> list[str]:
        names = (
            "Runtime.exceptionThrown",
            "Runtime.consoleAPICalled",
            "Log.entryAdded",
            "Network.loadingFailed",
        )
        return [json.dumps(event["params"]) for event in self._events if event.get("method") in names]
