"""What is on the W&B dashboard: sections of panels, each by the names under which a run logs what it draws.

Plain data, of no library: workspace.py makes W&B's objects of it, and the tests hold every name against what a real run logs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from eit_lab.config import ConfigError
from eit_lab.declaration import Declaration, load_declaration
from eit_lab.manifest import read_manifest
from eit_lab.runs import read_record

X_AXIS = "images"
"""Training images seen so far: the same for arms with different batch sizes."""
DEFAULT_METRIC = "test/acc1"
_DEFAULT_FACTORS = (
    "model.size.name", "model.ib.rule", "model.ib.strength", "model.ib.kernel_size", "model.stem.kind", "model.pos_embed",
)  # fmt: skip
ANALYSIS = {
    "Frequency": ("hfd_share", "log_amplitude", "hf_dc_ratio", "feature_variance"),
    "Heads": ("attention_distance", "head_diversity", "attention_entropy", "attention_nmi", "cls_mass"),
}
"""Figures of the inside of a network, logged as ``analysis/NAME``: means over the layers."""
_ANALYSIS_TITLES = {
    "hfd_share": "share of high frequencies (above half of Nyquist)",
    "log_amplitude": "relative log amplitude at the highest frequency",
    "hf_dc_ratio": "norm of the high frequencies over the mean's",
    "feature_variance": "variance of feature maps",
    "attention_distance": "mean attention distance (px)",
    "head_diversity": "head diversity",
    "attention_entropy": "attention entropy (1: uniform)",
    "attention_nmi": "mutual information of query and key (normalised)",
    "cls_mass": "attention on the CLS token",
}


@dataclass(frozen=True)
class Key:
    """One value of a run: of its config (dotted), or of its summary."""

    of: Literal["config", "summary"]
    name: str


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Logged values against another; ``by_arm``: a line an arm, the mean over its seeds with one standard deviation."""

    title: str
    y: tuple[str, ...]
    x: str = X_AXIS
    by_arm: bool = False
    log_y: bool = False


@dataclass(frozen=True, kw_only=True)
class Bars:
    """A value of the summary: a bar an arm, the mean over its seeds with one standard deviation."""

    title: str
    metric: str


@dataclass(frozen=True, kw_only=True)
class Dots:
    """A dot a run."""

    title: str
    x: Key
    y: Key
    log_x: bool = False


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """A line a run, through its values on parallel axes."""

    title: str
    columns: tuple[Key, ...]


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Logged images."""

    title: str
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Comparer:
    """The runs' configs and summaries beside each other, where they differ."""


Panel: TypeAlias = Lines | Bars | Dots | Parallel | Pictures | Comparer


@dataclass(frozen=True, kw_only=True)
class Section:
    """Some panels under a heading; the note says how to read them."""

    name: str
    note: str
    panels: tuple[Panel, ...]
    is_open: bool = True


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a dashboard of one sweep takes from it."""

    name: str
    """W&B's group of its runs."""
    arms: tuple[str, ...]
    declaration: Declaration | None
    logger: Mapping[str, Any] = field(default_factory=dict)
    """The ``logger`` config of its runs."""

    @property
    def metric(self) -> str:
        """What is compared."""
        return self.declaration.metric if self.declaration else DEFAULT_METRIC

    @property
    def question(self) -> str:
        """What the ablation is to answer."""
        return self.declaration.question if self.declaration else ""


def read_sweep(folder: Path) -> Sweep:
    """The sweep in a folder. Raises ConfigError in one line."""
    manifest = read_manifest(folder)
    entries = [job.entry for job in manifest.jobs.values()]
    declaration = None if manifest.declaration is None else load_declaration(manifest.declaration)
    arms = tuple(dict.fromkeys(entry.arm for entry in entries))
    logger: Mapping[str, Any] = {}
    for entry in entries:
        try:
            record = read_record(folder / entry.folder)
        except ConfigError:
            continue  # a damaged record: the next run has the same logger
        if record is not None:
            logger = record["config"]["logger"]
            break
    return Sweep(name=folder.resolve().name, arms=arms, declaration=declaration, logger=logger)


def build_sections(*, metric: str = DEFAULT_METRIC, factors: Sequence[str] = ()) -> tuple[Section, ...]:
    """All sections: training, ablation, frequency, heads, cost, comparison.

    ``metric`` is the summary value that arms are compared by; ``factors`` are the dotted keys in which they differ.
    """
    result = Key("summary", metric)
    columns = tuple(Key("config", key) for key in _columns(factors))
    return (
        Section(
            name="Training",
            note="One line a run. Validation is on the held-out slice of the training images.",
            panels=(
                Lines(title="training loss", y=("train/loss",)),
                Lines(title="validation top-1", y=("val/acc1",)),
                Lines(title="validation top-1, averaged weights", y=("val/acc1_ema",)),
                Lines(title="validation loss", y=("val/loss",)),
                Lines(title="top-1 minus the published run's of the same epoch", y=("published/gap",)),
                Lines(title="learning rate", y=("optim/lr",)),
                Lines(title="norm of the gradient", y=("optim/grad_norm",), log_y=True),
                Pictures(title="worst mistakes on the test set", names=("test/mistakes_figure",)),
            ),
        ),
        Section(
            name="Ablation",
            note="One line or bar an arm: the mean over its seeds, with one standard deviation. Whether a difference is real "
            "is said by python -m eit_lab.report, paired by seed and corrected for the number of comparisons.",
            panels=(
                Lines(title="validation top-1 by arm, mean and std over seeds", y=("val/acc1",), by_arm=True),
                Lines(title="training loss by arm, mean and std over seeds", y=("train/loss",), by_arm=True),
                Lines(title="validation top-1 by hours of training", y=("val/acc1",), x="perf/hours", by_arm=True),
                Bars(title=f"{metric} by arm, mean and std over seeds", metric=metric),
                Parallel(title=f"what {metric} goes with", columns=(*columns, Key("config", "seed"), result)),
            ),
        ),
        *(
            Section(
                name=name,
                note="Of held-out images, after every tenth epoch and the last (analysis.every_n_epochs). Means over the layers; "
                "one line an arm.",
                panels=tuple(
                    Lines(title=_ANALYSIS_TITLES[figure], y=(f"analysis/{figure}",), by_arm=True) for figure in figures
                )
                + tuple(
                    Dots(title=f"{metric} against {figure}", x=Key("summary", f"analysis/{figure}"), y=result)
                    for figure in figures[:2]
                ),
                is_open=False,
            )
            for name, figures in ANALYSIS.items()
        ),
        Section(
            name="Cost",
            note="Speed and hours are those of the machine a run was on. Energy is that of the training devices, where it could "
            "be read.",
            panels=(
                Dots(title=f"{metric} against MACs", x=Key("summary", "cost/macs"), y=result, log_x=True),
                Dots(title=f"{metric} against parameters", x=Key("summary", "cost/params"), y=result, log_x=True),
                Dots(title=f"{metric} against training images per second", x=Key("summary", "img_per_s"), y=result),
                Bars(title="device-hours by arm", metric="device_hours"),
                Bars(title="energy by arm (Wh)", metric="energy_wh"),
                Lines(title="training images per second", y=("perf/img_per_s",)),
                Lines(title="share of the device's peak", y=("perf/mfu",)),
                Lines(title="share of the training time waiting for the loader", y=("perf/data_wait_share",)),
                Lines(title="most memory so far (GB)", y=("perf/memory_gb",)),
                Lines(title="energy so far (Wh)", y=("perf/energy_wh",), x="perf/hours"),
            ),
        ),
        Section(
            name="Comparison of runs",
            note="Every key of the config and the summary in which the chosen runs differ.",
            panels=(Comparer(),),
            is_open=False,
        ),
    )


def logged_names(sections: Sequence[Section]) -> Iterator[tuple[Literal["row", "summary", "config", "image"], str]]:
    """Every name that the panels read, with where a run must have it."""
    for panel in (panel for section in sections for panel in section.panels):
        match panel:
            case Lines():
                for name in (*panel.y, panel.x):
                    yield "row", name
            case Bars():
                yield "summary", panel.metric
            case Dots():
                for key in (panel.x, panel.y):
                    yield key.of, key.name
            case Parallel():
                for key in panel.columns:
                    yield key.of, key.name
            case Pictures():
                for name in panel.names:
                    yield "image", name


def _columns(factors: Sequence[str]) -> list[str]:
    """The keys of the config to show; a factor that is the beginning of keys stands for those of them that we know."""
    found: list[str] = []
    for factor in factors:
        known = [key for key in _DEFAULT_FACTORS if key == factor or key.startswith(f"{factor}.")]
        found += known or [factor]
    return list(dict.fromkeys(found)) or list(_DEFAULT_FACTORS)
