"""A job that does nothing but leave a record: what remains is what the sweep engine itself costs. No torch."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from eit_lab.runs import RECORD_SCHEMA, write_record


def main(argv: Sequence[str] | None = None) -> int:
    """``--frozen FILE``, as train takes it; the run's folder is named as the file. Returns 0."""
    _, frozen = sys.argv[1:] if argv is None else argv
    config = json.loads(Path(frozen).read_text())
    folder = Path(config["run"]["root"]) / Path(frozen).stem
    folder.mkdir(parents=True, exist_ok=True)
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    # Not trained: a number that differs from job to job, so that tables and intervals have something to do.
    share = (int(folder.name.rsplit("-", 1)[1], 16) % 1000) / 1000
    record = {
        "schema": RECORD_SCHEMA, "identity": folder.name.rsplit("-", 1)[1], "status": "finished", "name": config["model"]["name"],
        "seed": config["seed"], "command": [], "config": config, "started": now, "ended": now, "seconds": 0.0, "steps": 0, "sync": None,
        "cost": {"params": 1, "macs": 1, "macs_thop": 1, "grid": [1, 1]}, "data": {"fingerprint": "", "num_train": 0},
        "versions": {"code": ""}, "result": {"test/acc1": share, "test/acc5": 1.0, "test/loss": 0.0}, "best": None,
    }  # fmt: skip
    write_record(folder, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
