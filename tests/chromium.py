"""Drives a headless Chromium over its debugging protocol: as much of it as tests of a report need."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import pytest
from websockets.sync.client import connect

WAIT_S = 60.0


def find() -> str | None:
    """The browser's path; None where there is none."""
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))),
        None,
    )


needs_chromium = pytest.mark.skipif(
    find() is None and not os.environ.get("RPCOMPILE_NEEDS_CHROMIUM"),
    reason="needs Chromium (Debian: apt-get install chromium)",
)


class Page:
    """One tab. Attributes: `problems`, what the console and the network reported since `open`;
    `requests`, the URLs that the page asked for."""

    def __init__(self, dark: bool = False, size: tuple[int, int] = (1400, 1000)) -> None:
        path = find()
        assert path is not None, "RPCOMPILE_NEEDS_CHROMIUM is set, but there is no chromium"
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._numbers = itertools.count(1)
        self._dark, self._size = dark, size
        self.problems: list[str] = []
        self.requests: list[str] = []
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
        ]
        options += ["--remote-debugging-port=0", f"--user-data-dir={self._folder.name}", "about:blank"]
        self._process = subprocess.Popen(
            [path, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def __enter__(self) -> Self:
        port_file = Path(self._folder.name) / "DevToolsActivePort"
        deadline = time.monotonic() + WAIT_S
        while not (port_file.exists() and len(port_file.read_text().split()) == 2):
            assert time.monotonic() < deadline, "Chromium did not start"
            time.sleep(0.05)
        port, browser = port_file.read_text().split()
        self._connection = connect(f"ws://127.0.0.1:{port}{browser}", max_size=None)
        self._socket = self._connection.__enter__()
        self._session: str | None = None
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._ask(f"{domain}.enable")
        width, height = self._size
        self._ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if self._dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.__exit__(None, None, None)
        self._process.terminate()
        self._process.wait(WAIT_S)
        self._folder.cleanup()

    def open(self, path: Path) -> float:
        """Opens a file and waits until the report says that it is drawn; returns the seconds."""
        began = time.monotonic()
        self._ask("Page.navigate", url=path.resolve().as_uri())
        deadline = began + WAIT_S
        while self.run("document.documentElement?.dataset.ready") != "yes":
            assert time.monotonic() < deadline, f"not ready: {self.problems}"
            time.sleep(0.02)
        return time.monotonic() - began

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self._ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def move(self, x: float, y: float) -> None:
        """Moves the mouse, in CSS pixels of the viewport."""
        for step in (2, 1, 0):
            self._ask("Input.dispatchMouseEvent", type="mouseMoved", x=x + step, y=y)
            time.sleep(0.05)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """Writes a PNG of the viewport, or of the whole page."""
        found = self._ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if getattr(self, "_session", None) is not None:
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv(timeout=WAIT_S))
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(str(parameters["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.problems.append(str(parameters["args"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.problems.append(str(parameters["entry"]["text"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
