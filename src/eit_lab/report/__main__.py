"""``python -m eit_lab.report FOLDER``: the table and the figure of a run, a folder of runs, or a sweep."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from eit_lab import command


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 0, or 2 for a folder without records."""
    return command.run(_main, argv)


def _main(argv: list[str]) -> int:
    from eit_lab.config import ConfigError
    from eit_lab.report.summary import write_summary
    from eit_lab.runs import find_records

    if "--help" in argv or "-h" in argv:
        print(
            "python -m eit_lab.report FOLDER\n\nTable and figure of a run, a folder of runs, or a sweep, from their records alone."
        )
        return 0
    if len(argv) != 1:
        raise ConfigError(f"report takes one folder (a run, a folder of runs, a sweep), got {len(argv)} arguments")
    folder = Path(argv[0])
    if not folder.is_dir():
        raise ConfigError(f"report: no folder {argv[0]!r}")
    if next(find_records(folder), None) is None:
        raise ConfigError(f"report: no record.json of a run in {argv[0]!r}, nor one folder below")
    print(write_summary(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
