"""The process that knows torch, asked from one that does not: costs, matched widths, training speeds (training/speed.py).

It starts with the first question and ends with the last. Costs are functions of a model and of this package's code alone, so
they are kept in the user's cache and a command that was typed before answers without torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Hashable, Mapping
from contextlib import suppress
from typing import IO, Any

from eit_lab.caches import user_cache
from eit_lab.command import RunError
from eit_lab.config import Config, ConfigError
from eit_lab.loading import dump
from eit_lab.processes import LAUNCH_VARIABLES, PARENT
from eit_lab.runs import code_hash, write_text

_START_S = 120.0  # to import torch, on a slow disk
_ANSWER_S = 120.0


class ProbeTimeoutError(RunError):
    """No answer in time; the process has been ended."""


class Probe:
    """One child process for all questions."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None
        self._said: IO[bytes] | None = None
        self._counts: dict[Hashable, dict[str, int]] = {}
        self._imported: set[str] = set()
        """What it was asked for already: the first time, libraries are imported."""

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cost(self, config: Config, *, num_classes: int) -> dict[str, int]:
        """{"params", "macs"} of one image. Raises RunError."""
        return self._count({"do": "cost"}, config, num_classes)

    def match(self, config: Config, *, num_classes: int, budget: str, target: int) -> dict[str, int]:
        """{"embed_dim", "params", "macs"} of the model at the width nearest to the target. Raises RunError."""
        return self._count({"do": "match", "budget": budget, "target": target}, config, num_classes)

    def speed(
        self, config: Config, *, num_classes: int, seconds: float, threads: int | None, within_s: float
    ) -> dict[str, Any]:
        """{"img_per_s", "device"}; or {"error"} with the reason why there is no speed."""
        asked = {"do": "speed", "seconds": seconds, "threads": threads}
        try:
            return self._ask(asked, config, num_classes, within_s=within_s)
        except ProbeTimeoutError:
            return {"error": f"a step takes too long to be timed in {within_s:.0f} s"}

    def close(self) -> None:
        """End the process."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None
            self._imported.clear()
        if self._said is not None:
            self._said.close()
            self._said = None

    def _count(self, request: Mapping[str, Any], config: Config, num_classes: int) -> dict[str, int]:
        """A count of a model, made once; from the user's cache where it was made by an earlier command. Raises RunError, or
        ConfigError where the model cannot be had.
        """
        data = config.data
        asked = (tuple(request.items()), config.model, num_classes, data.img_size, data.in_chans)
        if asked not in self._counts:
            self._counts[asked] = self._count_kept(request, config, num_classes)
        return self._counts[asked]

    def _count_kept(self, request: Mapping[str, Any], config: Config, num_classes: int) -> dict[str, int]:
        data = dump(config.data)
        what = [request, dump(config.model), num_classes, data["img_size"], data["in_chans"], code_hash()]
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]
        path = user_cache() / "costs" / f"{key}.json"
        with suppress(OSError, ValueError):
            known: dict[str, int] = json.loads(path.read_text())
            return known
        answer: dict[str, int] = self._ask(request, config, num_classes, within_s=_ANSWER_S)
        if "error" in answer:
            kind = ConfigError if answer["wrong_input"] else RunError
            raise kind(f"{config.run.arm or config.model.name}: {answer['error']}")
        with suppress(OSError):  # a cache that cannot be written is none
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(answer))
        return answer

    def _ask(self, request: Mapping[str, Any], config: Config, num_classes: int, *, within_s: float) -> dict[str, Any]:
        child = self._child = self._child or self._start()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            print(
                json.dumps({**request, "config": dump(config), "num_classes": num_classes}),
                file=child.stdin,
                flush=True,
            )
        except BrokenPipeError:
            raise self._lost() from None
        patience_s = within_s + (0.0 if request["do"] in self._imported else _START_S)
        if not select.select([child.stdout], [], [], patience_s)[0]:
            self.close()
            raise ProbeTimeoutError(f"no answer within {within_s:.0f} s to what a model costs")
        self._imported.add(request["do"])
        line = child.stdout.readline()
        if not line:
            raise self._lost()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _start(self) -> subprocess.Popen[str]:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        environment = {key: value for key, value in os.environ.items() if key not in LAUNCH_VARIABLES}
        return subprocess.Popen(
            [sys.executable, "-m", "eit_lab.training.speed"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env={**environment, PARENT: str(os.getpid())},
        )

    def _lost(self) -> RunError:
        """What the process said last, when it has gone."""
        assert self._child is not None
        assert self._said is not None
        status = self._child.wait()
        self._said.seek(0)
        lines = [line for line in self._said.read().decode(errors="replace").splitlines() if line.strip()]
        self.close()
        return RunError(f"what models cost could not be found out (exit status {status}): {lines[-1] if lines else ''}")
