"""``python -m eit_lab.bench page``: the tables of docs/performance.md, drawn from the records that they are of.

Between ``<!-- drawn: NAME -->`` and ``<!-- end -->`` stands what the records under benchmarks/records/ say, and nothing else. Words
around it are written by hand. A section whose record is missing says so, with the command that makes it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from eit_lab.benchmark.table import Cell, markdown_table
from eit_lab.benchmark.words import read_words
from eit_lab.command import RunError
from eit_lab.config import ConfigError
from eit_lab.loading import nearest
from eit_lab.runs import write_text

HELP = """\
Draw the tables of docs/performance.md from benchmarks/records/: model-*, step-*, startup-*, profile-*.json and candidates.json.

  python -m eit_lab.bench page [records=FOLDER] [page=FILE] [check=true]

  records   where the records are           [benchmarks/records]
  page      what is drawn into              [docs/performance.md]
  check     write nothing; exit status 1 where the page is not what the records say   [false]
"""
_DEFAULTS = {"records": "benchmarks/records", "page": "docs/performance.md", "check": "false"}
_SECTION = re.compile(r"(<!-- drawn: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
_COMMANDS = {
    "step": "python -m eit_lab.bench step out=benchmarks/records",
    "model": "python -m eit_lab.bench model out=benchmarks/records",
    "startup": "python -m eit_lab.bench startup out=benchmarks/records",
    "profile": "python -m eit_lab.bench profile out=benchmarks/records",
}
"""Each kind of record, and what makes it."""
_TITLES = {
    "step": "A training step",
    "model": "A forward pass",
    "startup": "From the command to the first step",
    "profile": "Where the time goes",
}
ENTRY: Mapping[str, type | tuple[type, ...]] = {
    "candidate": str,
    "device": str,
    "measured": str,
    "ratio": (int, float, type(None)),
    "kept": bool,
    "why": str,
    "command": str,
    "date": str,
}
"""What each entry of candidates.json has. ``measured``: in words, what the ratio is of; ``ratio``: time before over time after, above
1 is faster, null where there is no number; ``command``: what measures it again; ``date``: YYYY-MM-DD."""


def run(argv: Sequence[str]) -> int:
    """``bench page``: draw and write, or check. Returns 0; ConfigError for wrong words and files, RunError for a page that is not current."""
    told = read_words(argv, _DEFAULTS, verb="page")
    if told["check"] not in ("true", "false"):
        raise ConfigError(f"check must be true or false, got {told['check']!r}")
    records, path = _here(told, "records"), _here(told, "page")
    try:
        before = path.read_text()
    except OSError as error:
        raise ConfigError(f"page must be a file: {error}") from None
    after = draw(before, records, beside=path.parent)
    if told["check"] == "true":
        if before != after:
            raise RunError(f"{path} is not what {records} says; python -m eit_lab.bench page draws it anew")
        return 0
    write_text(path, after)
    print(path)
    return 0


def _here(told: Mapping[str, str], key: str) -> Path:
    """A path that was told; the project's own where it was not and there is a checkout."""
    inside = Path(__file__).parents[3] / _DEFAULTS[key]
    return inside if told[key] == _DEFAULTS[key] and inside.exists() else Path(told[key]).expanduser()


def draw(text: str, records: Path, *, beside: Path) -> str:
    """The page with every drawn section as the records have it; pictures are linked from ``beside``, the page's folder.

    ConfigError for a section that there is not, and for a record that cannot be read.
    """
    drawn: dict[str, Callable[[], str]] = {
        **{kind: partial(_of_kind, kind, records, beside) for kind in _COMMANDS},
        "sizes": _sizes,
        "candidates": lambda: _candidates(records),
        "gpu": lambda: _gpu(records),
    }

    def one(found: re.Match[str]) -> str:
        name = found[2]
        if name not in drawn:
            raise ConfigError(f"drawn must be one of {', '.join(drawn)}, got {name!r}{nearest(name, list(drawn))}")
        return f"{found[1]}{drawn[name]()}\n{found[4]}"

    return _SECTION.sub(one, text)


def sections(text: str) -> list[str]:
    """Names of a page's drawn sections, in their order."""
    return [found[2] for found in _SECTION.finditer(text)]


# --------------------------------------------------------------------------------------------------------------- sections


def _paths(kind: str, records: Path) -> list[Path]:
    """Records of a kind, the CPU's first."""
    return sorted(records.glob(f"{kind}-*.json"), key=lambda path: (path.stem != f"{kind}-cpu", path.name))


def _of_kind(kind: str, records: Path, beside: Path) -> str:
    parts = []
    for path in _paths(kind, records):
        record = _read(path)
        if kind == "profile":
            from eit_lab.benchmark.roofline.tables import page_section

            parts.append(page_section(record))
            picture = path.with_suffix(".png")
            if picture.is_file():
                parts.append(f"![rooflines, and a step's time by group]({_link(picture, beside)})")
        else:
            from eit_lab.benchmark.speed.tables import page_section as speed_section

            parts.append(speed_section(record).rstrip("\n"))
    return "\n\n".join(parts) if parts else f"*{_TITLES[kind]}: not measured yet.* `{_COMMANDS[kind]}`"


def _sizes() -> str:
    from eit_lab.benchmark.roofline.sizes import sizes_section

    return sizes_section()


def _link(path: Path, beside: Path) -> str:
    return Path(os.path.relpath(path.resolve(), beside.resolve())).as_posix()


def _gpu(records: Path) -> str:
    found = [path for kind in _COMMANDS for path in _paths(kind, records) if path.stem != f"{kind}-cpu"]
    if not found:
        return (
            "**Not run on a GPU yet:** none was at hand. No figure of this page is one of a GPU, and the goals for GPUs are neither met "
            "nor missed. The scripts are tested as far as a CPU can."
        )
    return "Records of GPUs: " + ", ".join(f"`{path.name}`" for path in found) + "."


def _candidates(records: Path) -> str:
    path = records / "candidates.json"
    entries = read_candidates(path) if path.is_file() else []
    if not entries:
        return "*Nothing is on record yet:* entries go into `benchmarks/records/candidates.json`."
    head = ["candidate", "result", "kept", "measured with"]
    return "\n".join(markdown_table(head, [_candidate(one) for one in entries]))


def _candidate(one: Mapping[str, Any]) -> Cell:
    ratio = "" if one["ratio"] is None else f"**{one['ratio']:.2f}x** "
    kept = "yes" if one["kept"] else "no (negative)" if one["ratio"] is None or one["ratio"] <= 1 else "no"
    return (
        one["candidate"],
        f"{ratio}{one['measured']}, {one['device']}",
        f"{kept}: {one['why']}",
        f"`{one['command']}`, {one['date']}",
    )


def read_candidates(path: Path) -> list[dict[str, Any]]:
    """What was tried. ConfigError in one line for an entry that is not as ENTRY says."""
    entries = _read(path)
    if not isinstance(entries, list):
        raise ConfigError(f"{path.name} must be a list of entries, got {type(entries).__name__}")
    for number, one in enumerate(entries):
        for problem in _problems(one):
            raise ConfigError(f"{path.name}: entry {number} {problem}")
    return entries


def _problems(one: object) -> Iterator[str]:
    if not isinstance(one, dict) or set(one) != set(ENTRY):
        got = ", ".join(one) if isinstance(one, dict) else type(one).__name__
        yield f"must have {', '.join(ENTRY)}, got {got}"
        return
    for key, kind in ENTRY.items():
        if not isinstance(one[key], kind) or (key == "ratio" and isinstance(one[key], bool)):
            yield f"has a {key} that is no {_kind(kind)}: {one[key]!r}"
    text = "".join(value for value in one.values() if isinstance(value, str))
    if "|" in text or "\n" in text:
        yield "must have neither | nor line breaks in its words: it is a row of a table"
    if isinstance(one["date"], str) and re.fullmatch(r"\d{4}-\d{2}-\d{2}", one["date"]) is None:
        yield f"must have a date as YYYY-MM-DD, got {one['date']!r}"


def _kind(kind: type | tuple[type, ...]) -> str:
    return (
        {str: "text", bool: "true or false"}.get(kind, "number or null") if isinstance(kind, type) else "number or null"
    )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path.name} must be a record: {error}") from None
