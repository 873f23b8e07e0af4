"""A real browser for the tests of pages: Chromium without a window, spoken to through a pipe (Chrome DevTools Protocol).

The protocol rather than the command line, because only it narrows the page below 500 px, sets ``prefers-color-scheme`` (the
flag --force-dark-mode repaints pages, which is another thing), and tells of every request and every line of the console.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WHERE = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
MISSING = "no Chromium here: pages cannot be looked at"
_PIPE_READ, _PIPE_WRITE = 3, 4  # where --remote-debugging-pipe listens and answers
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-extensions", "--hide-scrollbars", "--mute-audio",
    "--remote-debugging-pipe",
)  # fmt: skip


@dataclass(frozen=True)
class Look:
    """A page as it was seen once."""

    png: bytes
    requests: list[str]
    """Addresses asked for, the page's own left out."""
    console: list[str]
    facts: Any
    """What the script that was asked for returned."""


class Chromium:
    """One browser; ``look`` opens a page in a fresh tab."""

    def __init__(self) -> None:
        assert WHERE is not None, MISSING
        self._profile = tempfile.mkdtemp(prefix="eit_lab-chromium-")
        reads, self._to = os.pipe()
        self._from, writes = os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64) for fd in (reads, writes)]  # clear of 3 and 4
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self._pid = os.posix_spawn(
            WHERE,
            [WHERE, *_FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
            dict(os.environ),
            file_actions=[
                *[(os.POSIX_SPAWN_DUP2, null, fd) for fd in (0, 1, 2)],
                (os.POSIX_SPAWN_DUP2, high[0], _PIPE_READ),
                (os.POSIX_SPAWN_DUP2, high[1], _PIPE_WRITE),
            ],
            setpgroup=0,
        )
        for fd in (reads, writes, null, *high):
            os.close(fd)
        self._number = 0
        self._buffer = b""
        self._events: list[dict[str, Any]] = []

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._to)
        os.close(self._from)
        shutil.rmtree(self._profile, ignore_errors=True)

    def look(
        self,
        address: str,
        *,
        width: int,
        height: int = 900,
        dark: bool = False,
        script: str = "0",
        print_: bool = False,
    ) -> Look:
        """Open a page so many CSS px wide; ``script`` is an expression whose value comes back as ``facts``."""
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._events.clear()
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        for method in ("Page.enable", "Network.enable", "Runtime.enable", "Log.enable"):
            self._ask(method, session)
        self._ask(
            "Emulation.setDeviceMetricsOverride", session, width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        self._ask("Emulation.setEmulatedMedia", session, media="print" if print_ else "", features=[scheme])
        went = self._ask("Page.navigate", session, url=address)
        assert "errorText" not in went, (address, went)
        self._wait("Page.loadEventFired")
        facts = self._ask("Runtime.evaluate", session, expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in facts, facts
        shot = self._ask("Page.captureScreenshot", session, format="png", captureBeyondViewport=True, fromSurface=True)
        requests = [e["params"]["request"]["url"] for e in self._events if e["method"] == "Network.requestWillBeSent"]
        console = [
            json.dumps(e["params"])
            for e in self._events
            if e["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        ]
        self._ask("Target.closeTarget", targetId=target)
        others = [url for url in requests if url != address]
        return Look(base64.b64decode(shot["data"]), others, console, facts["result"].get("value"))

    def _ask(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._events.append(answer)

    def _wait(self, event: str) -> None:
        while not any(e.get("method") == event for e in self._events):
            self._events.append(self._read())

    def _read(self, *, within_s: float = 60.0) -> dict[str, Any]:
        end = time.monotonic() + within_s
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], max(0.0, end - time.monotonic()))
            assert ready, "Chromium does not answer"
            more = os.read(self._from, 1 << 20)
            assert more, "Chromium has ended"
            self._buffer += more
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


def address(path: Path) -> str:
    """Of a file."""
    return path.resolve().as_uri()
