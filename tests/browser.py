"""A headless Chromium, spoken to over two pipes: what a page shows, complains of and asks for.

The protocol is that of its developer tools, one JSON object after another with a zero byte between
them. No package is needed, and nothing listens on a port.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-default-apps", "--no-first-run",
    "--disable-dev-shm-usage", "--disable-extensions", "--mute-audio", "--hide-scrollbars",
    "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE = 60.0  # seconds for one answer


def find_browser() -> str | None:
    """The program, or None where there is none."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One page after another in one process; ``events`` is what it told since it was opened."""

    def __init__(self, program: str, profile: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self._number, self._rest = 0, b""
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        script = 'exec 3<&"$0" 4>&"$1"; shift; exec "$@"'  # its pipes are numbers 3 and 4
        command = [program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", script, str(to_read), str(to_write), *command],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        targets = self.ask("Target.getTargets", whole=True)["targetInfos"]
        first = next(each["targetId"] for each in targets if each["type"] == "page")
        attached = self.ask("Target.attachToTarget", whole=True, targetId=first, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        os.close(self._to)  # it ends when nobody can speak to it any more
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._from)

    def ask(self, method: str, *, whole: bool = False, **given: Any) -> dict[str, Any]:
        """The answer to one command, of the page or of the ``whole`` browser."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": given}
        if not whole:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            told = self._told()
            if told.get("id") == self._number:
                assert "error" not in told, (method, told["error"])
                return told["result"]
            self.events.append(told)

    def open(self, url: str, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Load a page as a screen of this size shows it, and wait until it has everything."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height,
            deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        self.events.clear()
        self.ask("Page.navigate", url=url)
        self.wait_for("Page.loadEventFired")

    def wait_for(self, event: str) -> None:
        while not any(told.get("method") == event for told in self.events):
            self.events.append(self._told())

    def value(self, expression: str) -> Any:
        """What a JavaScript expression, or the promise it gives, comes to in the page."""
        found = self.ask(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def requests(self) -> list[str]:
        """Every address that was asked for since the page was opened."""
        return [
            told["params"]["request"]["url"]
            for told in self.events
            if told.get("method") == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[str]:
        """Script errors, failed requests and breaches of the page's policy."""
        found = []
        for told in self.events:
            given = told.get("params", {})
            if told.get("method") == "Runtime.exceptionThrown":
                found.append(json.dumps(given["exceptionDetails"]))
            if told.get("method") == "Log.entryAdded":
                found.append(given["entry"]["text"])
            if told.get("method") == "Runtime.consoleAPICalled" and given["type"] == "error":
                found.append(json.dumps(given["args"]))
        return found

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        taken = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))

    def printed(self, path: Path) -> None:
        """The page on A4 paper, as a PDF."""
        found = self.ask("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)
        path.write_bytes(base64.b64decode(found["data"]))

    def _told(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"the browser says nothing for {PATIENCE:.0f} s"
            more = os.read(self._from, 1 << 20)
            assert more, "the browser has ended"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)
