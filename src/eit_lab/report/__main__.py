"""``python -m eit_lab.report FOLDER [FOLDER ...]``: what some runs say, with statistics, as a page, tables and figures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from eit_lab import command

HELP = """\
python -m eit_lab.report FOLDER [FOLDER ...] [out=DIR] [baseline=ARM] [metric=test/acc1] [records=FILE]

A report on runs from their records alone, in seconds and without torch: report.html (one page with all in it, no network),
report.md, report.tex (booktabs), CSV files, figures as SVG and PNG.

  FOLDER        a sweep (runs/sweeps/ID), an experiment (experiments/NNN-slug), a run, a folder of runs, or a records.jsonl
  out=DIR       where the report goes; FOLDER/report unless it is said, ./report for several folders
  baseline=ARM  the arm the others are held against; else as declared, else the plain ViT
  metric=KEY    a key of the runs' results, such as test/acc5 or test/acc1_ema; else as declared, else test/acc1
  records=FILE  also write all that the report needs, one JSON line a run: the same command on FILE draws it anew elsewhere
"""
_KEYS = ("out", "baseline", "metric", "records")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 0, or 2 for what cannot be reported on."""
    return command.run(_main, argv, help_text=HELP)


def _main(argv: list[str]) -> int:
    from eit_lab.report.records import read_sources, write_records

    folders, said = _parse(argv)
    sources = read_sources(folders)
    if "records" in said:
        from eit_lab.config import ConfigError

        try:
            count = write_records(Path(said["records"]), sources)
        except OSError as error:
            raise ConfigError(
                f"records must name a file that can be written, got {said['records']!r}: {error.strerror}"
            ) from None
        print(f"records {said['records']}: {count} run{'' if count == 1 else 's'}")
    from eit_lab.report.build import build

    report = build(sources, metric=said.get("metric"), baseline=said.get("baseline"))
    _write(report, Path(said["out"]) if "out" in said else _default_out(folders))
    return 0


def _write(report: object, out: Path) -> None:
    from eit_lab.config import ConfigError
    from eit_lab.report.build import Report
    from eit_lab.report.content import arms_table
    from eit_lab.report.page import facts, write_report
    from eit_lab.report.summary import notes
    from eit_lab.report.tables import terminal_table

    assert isinstance(report, Report)
    try:
        written = write_report(report, out)
    except OSError as error:
        raise ConfigError(f"out must name a folder that can be written, got {str(out)!r}: {error.strerror}") from None
    if report.ablation.arms:
        print(terminal_table(arms_table(report.ablation.arms, report.metric, report.analyses)))
    more = [note for note in notes(report.ablation) if note not in report.sentences]
    print("\n".join([facts(report), *report.sentences, *more]))
    print(f"report {written[0]} (and {', '.join(path.name for path in written[1:])}, CSV, figures/)")


def _parse(argv: Sequence[str]) -> tuple[list[Path], dict[str, str]]:
    """Folders, and key=value; a folder's own name may hold an equals sign where such a folder exists."""
    from eit_lab.config import ConfigError
    from eit_lab.loading import nearest

    folders, said = [], {}
    for word in argv:
        key, equals, value = word.partition("=")
        if not equals or Path(word).exists():
            folders.append(Path(word))
        elif key not in _KEYS:
            raise ConfigError(f"report: {key} is not a key, got {word!r}{nearest(key, list(_KEYS))}")
        elif not value:
            raise ConfigError(f"report: {key} must have a value, got {word!r}")
        else:
            said[key] = value
    if not folders:
        raise ConfigError("report takes a folder at least (a run, a folder of runs, a sweep, an experiment), got none")
    return folders, said


def _default_out(folders: Sequence[Path]) -> Path:
    if len(folders) > 1:
        return Path("report")
    only = folders[0]
    return (only.parent if only.is_file() else only) / "report"


if __name__ == "__main__":
    sys.exit(main())
