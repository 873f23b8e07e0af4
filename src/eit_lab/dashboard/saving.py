"""The process that saves a dashboard on a W&B server; __main__.py starts it, and ends it when the server does not answer.

One JSON object on stdin says what to save, one on stdout what came of it: {"saved": ...} or {"cause": ...}.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

_CONNECT_S = 10.0


def main() -> None:
    """Save, and say what came of it."""
    order = json.loads(sys.stdin.read())
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # wandb and its service write where they like
    try:
        reply: dict[str, Any] = {"saved": _save(order)}
    except Exception as error:  # noqa: BLE001 - whatever wandb raises, the command is to hear of it in one line
        reply = {"cause": " ".join(str(error).split()) or type(error).__name__}
    replies.write(json.dumps(reply))
    replies.close()


def _save(order: dict[str, Any]) -> dict[str, Any]:
    from eit_lab.dashboard.panels import read_sweep
    from eit_lab.dashboard.workspace import build_board, load_library, save

    load_library()
    import wandb

    _reach(wandb.setup().settings.base_url)
    entity = order["entity"] or wandb.Api().default_entity
    if not entity:
        raise RuntimeError("the server names no default entity: say entity=NAME")
    sweep = read_sweep(Path(order["sweep"])) if order["sweep"] else None
    return save(build_board(project=order["project"], entity=entity, sweep=sweep), order["known"])


def _reach(url: str) -> None:
    """Raises OSError in words where nobody listens: wandb itself would try for minutes."""
    try:
        urllib.request.urlopen(url, timeout=_CONNECT_S).close()
    except urllib.error.HTTPError:
        pass  # an answer all the same
    except TimeoutError:
        raise OSError(f"{url} does not answer within {_CONNECT_S:g} s") from None
    except urllib.error.URLError as error:
        raise OSError(f"{url} cannot be reached: {getattr(error.reason, 'strerror', None) or error.reason}") from None


if __name__ == "__main__":
    main()
