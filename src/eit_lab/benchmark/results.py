"""The numbers of one run of the benchmark, against the goals that were set for them. No torch until the GPU's share."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

from eit_lab.benchmark.gpu import MFU_SHARES, PEAK_FLOPS, Appetite, appetites
from eit_lab.benchmark.table import Cell, Row, markdown_table, rates_figure, text_table, write
from eit_lab.benchmark.turns import Spread, ratio
from eit_lab.processor import machine
from eit_lab.report.figure import save_figure
from eit_lab.runs import code_state, versions

LABELS = {
    "torchvision": "torchvision ImageFolder, crop and flip",
    "files": "eit_lab on files, crop and flip",
    "shards": "eit_lab on shards, crop and flip",
    "timm": "timm create_transform, DeiT recipe",
    "files_full": "eit_lab on files, DeiT recipe",
    "shards_full": "eit_lab on shards, DeiT recipe",
}
_COLOURS = {"torchvision": 1, "timm": 4, "files": 5, "files_full": 5, "shards": 0, "shards_full": 0}
# Goals: over torchvision, over timm, of libjpeg-turbo's crop-only rate, two workers over one; s, MB, s.
SHARDS_GOAL, FILES_GOAL, FULL_GOAL, LIMIT_GOAL, TWO_WORKERS_GOAL = 3.2, 2.2, 2.8, 0.80, 1.75
FIRST_BATCH_S, MEMORY_MB, OPEN_S = 0.5, 600, 0.2
FLAT_MB = 16  # of USS: less is no growth, but an allocator's steps
_Table: TypeAlias = tuple[list[str], list[Cell]]
_WORDS = ("one worker", "two workers")


def name_of(loader: str, workers: int) -> str:
    """Of a rate."""
    return f"{loader}_{workers}"


@dataclass(frozen=True, kw_only=True)
class Results:
    """What was measured."""

    options: Mapping[str, Any]
    material: Mapping[str, Any]
    cores: Sequence[int]
    rates: Mapping[str, Sequence[float]]
    """Images per second of each round: of each of LABELS with 1 and 2 workers; decode_and_crop, limit and limit_2."""
    limit: str | None
    """Version of the libjpeg-turbo that is the limit."""
    no_limit: str
    """Why there is none."""
    alone: Mapping[str, Any]
    """Of ``workers.measure``."""
    batch_augment_ms: float
    load: Sequence[float]
    """Load averages of the machine before, and after."""


@dataclass(frozen=True)
class Summary:
    """Results for people and for the record."""

    results: Results
    rows: Sequence[Row]
    appetites: Sequence[Appetite]
    command: str

    @property
    def lines(self) -> list[str]:
        """For a terminal."""
        return [
            *text_table(*_rates_table(self.results)),
            "",
            *text_table(*_goals_table(self.rows)),
            "",
            *_notes(self.results),
            "",
            *text_table(*_gpu_table(self.results, self.appetites)),
            _gpu_note(),
        ]

    def save(self, folder: Path) -> Iterator[Path]:
        """data.json, data.md, data.png and data.svg in ``folder``. Raises ConfigError where that cannot be written."""
        from eit_lab.config import ConfigError

        try:
            yield write(folder, "data.json", [json.dumps(self._record(), indent=1)])
            yield write(folder, "data.md", self._markdown())
            spreads, colours = {}, {}
            for loader, label in LABELS.items():
                for workers in (1, 2):
                    name = f"{label}, {_WORDS[workers - 1]}"
                    spread = Spread.of(self.results.rates[name_of(loader, workers)])
                    spreads[name], colours[name] = (spread.median, spread.low, spread.high), _COLOURS[loader]
            save_figure(
                rates_figure(spreads, colours, f"{machine()}, {_mean_kb(self.results)} KB a JPEG"), folder / "data"
            )
        except OSError as error:
            raise ConfigError(
                f"out must be a folder that can be written, got {str(folder)!r}: {error.strerror}"
            ) from None
        yield folder / "data.png"
        yield folder / "data.svg"

    def _record(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "date": time.strftime("%Y-%m-%d"),
            "command": self.command,
            "commit": code_state()[0],
            "cpu": machine(),
            "versions": {**versions(), "data": _versions()},
            **asdict(self.results),
            "rows": [row.as_dict() for row in self.rows],
            "gpu": {
                "peak_flops": PEAK_FLOPS,
                "mfu_shares": MFU_SHARES,
                "models": [
                    {**asdict(one), "cores": one.cores(median(self.results.rates["shards_full_1"]))}
                    for one in self.appetites
                ],
            },
        }

    def _markdown(self) -> list[str]:
        results = self.results
        packages = ", ".join(f"{name} {version}" for name, version in _versions().items())
        return [
            "# Data loading, side by side",
            "",
            f"- {time.strftime('%Y-%m-%d')}, {machine()}, {len(results.cores)} cores; Python {platform.python_version()}, {packages}",
            f"- command: `{self.command}`",
            f"- {_material(results)}",
            f"- load average {results.load[0]:.1f} before, {results.load[1]:.1f} after (what is measured here included)",
            "",
            *markdown_table(*_rates_table(results)),
            "",
            *markdown_table(*_goals_table(self.rows)),
            "",
            *(f"- {note}" for note in _notes(results)),
            "",
            "## Cores that keep one H100 fed",
            "",
            *markdown_table(*_gpu_table(results, self.appetites)),
            "",
            _gpu_note(),
            "",
            "![rates](data.png)",
        ]


def summarise(results: Results, *, command: str) -> Summary:
    """Compare with the goals."""
    return Summary(results, list(_rows(results)), appetites(), command)


# ------------------------------------------------------------------------------------------------------------ against goals


def _rows(results: Results) -> Iterator[Row]:
    rates, alone = results.rates, results.alone

    def at_least(what: str, above: str, below: str, goal: float | None) -> Row:
        spread = ratio(rates, above, below)
        met = None if goal is None else spread.median >= goal
        return Row(
            what, f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})", f">= {goal:.2f}" if goal else "", met
        )

    yield at_least("crop and flip, shards over torchvision", "shards_1", "torchvision_1", SHARDS_GOAL)
    yield at_least("crop and flip, files over torchvision", "files_1", "torchvision_1", FILES_GOAL)
    yield at_least("DeiT recipe, shards over timm", "shards_full_1", "timm_1", FULL_GOAL)
    yield at_least("DeiT recipe, files over timm", "files_full_1", "timm_1", None)
    what = "decode and crop over libjpeg-turbo's crop-only rate"
    if results.limit is None:
        yield Row(what, results.no_limit, f">= {LIMIT_GOAL:.2f}")
    else:
        yield at_least(what, "decode_and_crop", "limit", LIMIT_GOAL)
    yield at_least("two workers over one, shards, crop and flip", "shards_2", "shards_1", TWO_WORKERS_GOAL)
    yield at_least("  the same, DeiT recipe", "shards_full_2", "shards_full_1", None)
    yield at_least("  the same, torchvision", "torchvision_2", "torchvision_1", None)
    if "limit_2" in rates:
        yield at_least("  the machine's own: libjpeg-turbo on two cores over one", "limit_2", "limit", None)
    for name in ("shards", "files"):
        spread = Spread.of(alone["first_batch_s"][name])
        yield Row(
            f"first batch after the workers start, {name}, DeiT recipe",
            f"{spread.median:.2f} s ({spread.low:.2f} to {spread.high:.2f})",
            f"< {FIRST_BATCH_S} s",
            spread.median < FIRST_BATCH_S,
        )
    for key, name in (("memory", "an epoch"), ("memory_large", "the large index")):
        found = alone[key]
        peak = found["peak_mb"]
        yield Row(
            f"memory of a worker over {found['batches']} batches of {name}, peak PSS",
            f"{peak['pss']:.0f} MB (USS {peak['uss']:.0f}, RSS {peak['rss']:.0f})",
            f"< {MEMORY_MB} MB",
            peak["pss"] < MEMORY_MB,
        )
        growth = found["late_mb"]["uss"] - found["early_mb"]["uss"]
        yield Row(
            "  growth of USS from the second tenth to the last",
            f"{growth:+.1f} MB",
            f"< {FLAT_MB} MB",
            growth < FLAT_MB,
        )
    opened = Spread.of(alone["open_root_s"])
    yield Row(
        f"opening a root of {alone['index_samples']:,} images",
        f"{opened.median:.3f} s ({opened.low:.3f} to {opened.high:.3f})",
        f"< {OPEN_S} s",
        opened.median < OPEN_S,
    )


def _goals_table(rows: Sequence[Row]) -> _Table:
    return ["compared", "median (range)", "goal", ""], [(row.what, row.measured, row.goal, row.verdict) for row in rows]


def _rates_table(results: Results) -> _Table:
    def cell(name: str) -> str:
        if name not in results.rates:
            return "-"
        spread = Spread.of(results.rates[name])
        return f"{spread.median:,.0f} ({spread.low:,.0f} to {spread.high:,.0f})"

    rows: list[Cell] = [
        (label, *(cell(name_of(name, workers)) for workers in (1, 2))) for name, label in LABELS.items()
    ]
    rows.append(("eit_lab, decode and crop, no loader (one core)", cell("decode_and_crop"), "-"))
    limit = f"libjpeg-turbo {results.limit}, crop only (one core, two cores)"
    rows.append(
        (limit, cell("limit"), cell("limit_2"))
        if results.limit
        else ("libjpeg-turbo, crop only", results.no_limit, "-")
    )
    return ["images per second, median (range)", *_WORDS], rows


def _notes(results: Results) -> list[str]:
    alone = results.alone
    opened = median(alone["open_index_s"])
    return [
        f"page cache warm; batches of {results.options['batch']}; {results.options['rounds']} rounds, each loader in turn in each; "
        "ratios are of the same round",
        "each worker is on a core of its own, the main process on another where there is one, and takes batches only",
        "torchvision and timm hand over normalised float batches; eit_lab's are uint8, normalised, erased and mixed on the device: "
        f"on a core of this CPU that would take {results.batch_augment_ms:.2f} ms an image (timm mixes outside the loader too)",
        "memory: RSS is all that is mapped and resident, PSS counts what is shared (libraries, the index, the batch it hands over) "
        "by this worker's share, USS is what it alone has; after each batch",
        f"of opening, {1e3 * opened:.0f} ms are the training split's index of {alone['index_bytes'] / 1e6:.0f} MB, checksum included",
    ]


# --------------------------------------------------------------------------------------------------------------- the GPU


def _gpu_table(results: Results, models: Sequence[Appetite]) -> _Table:
    rate = median(results.rates["shards_full_1"])

    def span(values: tuple[float, float], digits: int) -> str:
        return f"{values[0]:,.{digits}f} to {values[1]:,.{digits}f}"

    rows: list[Cell] = [
        (one.model, f"{one.macs / 1e9:.2f} G", span(one.images_per_s, 0), span(one.cores(rate), 1)) for one in models
    ]
    return ["model", "MACs of an image", "images/s an H100 takes", "cores for it, DeiT recipe on shards"], rows


def _gpu_note() -> str:
    low, high = (f"{100 * share:.0f}" for share in MFU_SHARES)
    return (
        f"cores = share x {PEAK_FLOPS / 1e12:.0f}e12 / (3 x 2 x MACs) / (images/s of one worker): three forward passes a step, two "
        f"operations a MAC, {low} to {high}% of the H100's dense bf16 peak (an assumption, not measured); a core as this machine's"
    )


# --------------------------------------------------------------------------------------------------------- for the record


def _mean_kb(results: Results) -> str:
    return f"{results.material['mean_bytes'] / 1e3:.0f}"


def _material(results: Results) -> str:
    facts = results.material
    width, height = facts["size"]
    low, high = facts["qualities"]
    names = facts["photographs"]
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return (
        f"{facts['images']:,} JPEGs of {width}x{height} px, 4:2:0, quality {low} to {high}, {_mean_kb(results)} KB on average, "
        f"cut from {len(names)} photographs ({shown})"
    )


def _versions() -> dict[str, str]:
    names = ("torch", "torchvision", "timm", "pillow", "simplejpeg", "opencv-python-headless", "numpy")
    return {name: metadata.version(name) for name in names}
