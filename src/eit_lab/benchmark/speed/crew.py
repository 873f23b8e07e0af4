"""The workers of a benchmark as the measuring process sees them: started once, asked one at a time, with a time limit. No torch."""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

_LAST_WORDS = 300  # characters of what a worker said before it ended


class LostError(RuntimeError):
    """A worker cannot go on: in one line, why. It becomes a row of the table, not the end of the benchmark."""


class Worker:
    """One peer's process. Every request has one answer; ``ask`` is ``send`` and ``receive``."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the worker
        self._process = subprocess.Popen(
            [sys.executable, "-m", "eit_lab.benchmark.speed.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.idle_cpu_s = self.idle_s = 0.0
        """Of all waiting between two requests."""

    def send(self, request: Mapping[str, Any]) -> None:
        """Ask for something; the answer is to be received before the next request."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise LostError(self._last_words()) from None

    def receive(self, *, within_s: float) -> dict[str, Any]:
        """The answer. Raises LostError with its one line where it is an error, late (the process ends), or does not come."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout=max(0.0, within_s)):
                self.close()
                raise LostError(f"took more than {within_s:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise LostError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        cpu, seconds = answer.pop("idle")
        self.idle_cpu_s += cpu
        self.idle_s += seconds
        if "error" in answer:
            raise LostError("out of memory" if answer["out_of_memory"] else answer["error"])
        return answer

    def ask(self, request: Mapping[str, Any], *, within_s: float) -> dict[str, Any]:
        """Both."""
        self.send(request)
        return self.receive(within_s=within_s)

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None and not stream.closed:
                try:
                    stream.close()
                except BrokenPipeError:
                    continue  # a request that it never read
        if not self._errors.closed:
            self._errors.close()

    def _last_words(self) -> str:
        until = time.monotonic() + 5
        while self._process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        status = self._process.poll()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        said = f": {lines[-1][:_LAST_WORDS]}" if lines else ""
        if status == -9:
            return "ended by the system (signal 9), as where memory runs out"
        return f"the process ended with status {status}{said}"
