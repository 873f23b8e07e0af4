"""The process of one peer: it stays, and takes its turns when it is asked to. Lines of JSON in, lines of JSON out.

Allocators and compilation belong to a process, so every peer has one of its own; only one of them computes at a time. The first
line says what to be, with ``keep``, whether to keep memory (eit_lab.memory); then ``warm_up`` and ``turn``. An answer has what was
asked, or "error" in one line with "out_of_memory". ``idle`` is (CPU seconds, seconds) between two requests: a worker that waits
must not compute.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from eit_lab.processes import end_with_parent

if TYPE_CHECKING:
    from eit_lab.benchmark.speed.contender import Contender


def main() -> int:
    """Answer until the asking process closes its end."""
    end_with_parent()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a library that prints must not write into an answer
    contender: Contender | None = None
    since = time.process_time(), time.perf_counter()
    for line in sys.stdin:
        request = json.loads(line)
        idle = time.process_time() - since[0], time.perf_counter() - since[1]
        try:
            if request["do"] == "build":
                contender, answer = build(request)
            else:
                assert contender is not None, "a worker is built before it is asked for more"
                answer = serve(contender, request)
        except Exception as error:  # noqa: BLE001 - the asking process says it, whatever it is
            answer = describe(error)
        print(json.dumps({**answer, "idle": idle}), file=answers, flush=True)
        since = time.process_time(), time.perf_counter()
    return 0


def build(request: dict[str, Any]) -> tuple[Contender, dict[str, Any]]:
    """The peer that a request describes, and the answer."""
    if request["keep"]:  # before anything large is allocated
        from eit_lab.memory import keep_memory

        kept = keep_memory()
    else:
        kept = False
    from eit_lab.benchmark.speed.contender import Contender, Request

    contender = Contender(Request(**request["contender"]))
    return contender, {**contender.facts(), "kept": kept}


def serve(contender: Contender, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to ``warm_up`` or ``turn``."""
    match request["do"]:
        case "warm_up":
            return contender.warm_up(request["precision"])
        case "turn":
            return {"seconds": contender.turn(request["precision"], steps=request["steps"])}
    raise AssertionError(f"nothing to do for {request['do']!r}")


def describe(error: Exception) -> dict[str, Any]:
    """One line of what went wrong."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    full = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return {"error": said, "out_of_memory": full}


if __name__ == "__main__":
    sys.exit(main())
