"""A web server on loopback that serves a folder, and fails on request: for tests of whatever reads over http."""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

Fault = Literal["fine", "403", "404", "429", "500", "503", "hang", "stall", "half", "short", "flip", "slow", "reset"]
"""What a request meets: ``fine``; an error's status; ``hang`` takes the request and sends nothing; ``stall`` sends half the
body, then nothing; ``half`` sends half of what was announced and hangs up; ``short`` is a file that lost its second half on
the server (announced as such); ``flip`` has one byte with a flipped bit; ``slow`` sends the body in eight pieces, 0.05 s
apart; ``reset`` breaks the connection.
"""


class FaultServer:
    """Serves ``folder`` at ``url`` until ``close``; a thread for each request, so a hanging one holds up no other.

    ``requests`` counts GETs and HEADs by path, as in {("GET", "train/0.bin"): 2}; ranges are honoured.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: Counter[tuple[str, str]] = Counter()
        self.logins: list[str] = []
        self.listing = True
        self._next: dict[str, list[Fault]] = {}
        self._always: dict[str, Fault] = {}
        self._lock = threading.Lock()
        self.closed = threading.Event()
        self._server = _Quiet(("127.0.0.1", 0), _Handler)
        self._server.owner = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def fail(self, path: str, *faults: Fault) -> None:
        """The next GETs of a path (relative to the folder; "*": of any) meet these, one after the other; then all is fine."""
        with self._lock:
            self._next[path] = list(faults)

    def always(self, path: str, fault: Fault) -> None:
        """Each GET of a path ("*": of any) meets this, until it is told "fine"."""
        with self._lock:
            self._always[path] = fault

    def gets(self, path: str) -> int:
        """How often a path was asked for."""
        return self.requests["GET", path]

    def close(self) -> None:
        """End it, hanging requests too."""
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def meets(self, method: str, path: str) -> Fault:
        """Count a request and say what becomes of it."""
        with self._lock:
            self.requests[method, path] += 1
            for key in (path, "*"):
                if self._next.get(key) and method == "GET":
                    return self._next[key].pop(0)
                if key in self._always:
                    return self._always[key]
        return "fine"


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    owner: FaultServer

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed, or had enough, is what these tests are about."""


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Quiet

    def log_message(self, format: str, *args: object) -> None: ...

    def translate_path(self, path: str) -> str:
        return str(self.server.owner.folder / unquote(urlsplit(path).path).lstrip("/"))

    def do_HEAD(self) -> None:
        self._serve(with_body=False)

    def do_GET(self) -> None:
        self._serve(with_body=True)

    def _serve(self, *, with_body: bool) -> None:
        owner = self.server.owner
        owner.logins += self.headers.get_all("Authorization", [])
        path = unquote(urlsplit(self.path).path).lstrip("/")
        fault = owner.meets(self.command, path)
        if fault == "hang":
            owner.closed.wait()
        if fault == "reset":
            # Closing with this option set sends RST instead of FIN.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if fault in ("hang", "reset"):
            self.connection.close()
            self.close_connection = True
            return
        if fault.isdigit():
            self.send_error(int(fault))
            return
        file = owner.folder / path
        if file.is_dir():
            if not owner.listing:
                self.send_error(403)
            elif with_body:
                super().do_GET()
            else:
                super().do_HEAD()
            return
        if not file.is_file():
            self.send_error(404)
            return
        self._send(file.read_bytes(), fault, with_body=with_body)

    def _send(self, content: bytes, fault: Fault, *, with_body: bool) -> None:
        if fault == "short":
            content = content[: len(content) // 2]
        if fault == "flip":
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        whole = len(content)
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked and asked[0] != "bytes=-":
            first = int(asked[1]) if asked[1] else max(0, whole - int(asked[2]))
            last = min(int(asked[2]), whole - 1) if asked[1] and asked[2] else whole - 1
            content = content[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{whole}")
        else:
            self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not with_body:
            return
        if fault in ("half", "stall"):
            self.wfile.write(content[: len(content) // 2])
            if fault == "stall":
                self.server.owner.closed.wait()
            self.close_connection = True
            return
        step = -(-len(content) // 8) or 1 if fault == "slow" else len(content) or 1
        for start in range(0, len(content), step):
            self.wfile.write(content[start : start + step])
            if fault == "slow" and self.server.owner.closed.wait(0.05):
                return
