"""A report: all that is computed and drawn of some runs, before it becomes a page or a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from eit_lab.config import ConfigError
from eit_lab.loading import nearest
from eit_lab.report import content, curves, figures, inside_tables, pareto
from eit_lab.report.analyses import ARGUED, QUANTITIES, Analyses, choose
from eit_lab.report.arms import Ablation, Arm, collect
from eit_lab.report.comparison import Comparison, Interaction, compare_all
from eit_lab.report.figure import COLOURS, LINES, PANEL, save_figure, style
from eit_lab.report.inside.arms import SHOWN as PANEL_ARMS
from eit_lab.report.inside.arms import arms_panels
from eit_lab.report.inside.numbers import ArmInside
from eit_lab.report.interpretation import Interpretation, interpret, interval_text, rho_text
from eit_lab.report.metric import Metric, metric_of
from eit_lab.report.records import Source
from eit_lab.report.scatter import scatter_figure
from eit_lab.report.tables import Table, csv_text
from eit_lab.report.verdict import verdict

_CUT = " Where an interval ends in an arrow, it goes on."
_SMALL = 3  # arms that are drawn beside the best ones where there are too many: the baselines come first


@dataclass(frozen=True)
class Drawing:
    """A figure with its file name and what it shows, in words."""

    stem: str
    figure: Figure
    caption: str

    @property
    def is_wide(self) -> bool:
        """Larger than others, because there is more in it."""
        return self.figure.get_figwidth() > PANEL[0]


@dataclass
class Section:
    """A heading, what to know before reading on, figures, tables."""

    anchor: str
    title: str
    text: tuple[str, ...] = ()
    lists: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Findings under a heading of their own, a sentence each."""
    drawings: list[Drawing] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


@dataclass
class Report:
    """All of it."""

    title: str
    question: str
    metric: Metric
    ablation: Ablation
    comparisons: list[Comparison]
    interactions: list[Interaction]
    sentences: list[str]
    sections: list[Section]
    analyses: Analyses | None = None
    """What was found inside the networks; None where no run was looked into."""
    interpretation: Interpretation = field(default_factory=Interpretation)

    @property
    def drawings(self) -> list[Drawing]:
        """Every figure."""
        return [drawing for section in self.sections for drawing in section.drawings]

    @property
    def tables(self) -> list[Table]:
        """Every table."""
        return [table for section in self.sections for table in section.tables]


def build(sources: Sequence[Source], *, metric: str | None = None, baseline: str | None = None) -> Report:
    """Compute and draw. Raises ConfigError for a metric that no run has, or a baseline that is no arm."""
    declared = [source.declaration for source in sources if source.declaration]
    key = metric or next((str(d["metric"]) for d in declared if d.get("metric")), "test/acc1")
    _check_metric(sources, key, given=metric is not None)
    found = metric_of(key)
    ablation = collect(sources, found, baseline=baseline)
    comparisons, interactions = compare_all(ablation)
    analyses = choose(ablation.arms)
    interpretation = interpret(analyses, found) if analyses else Interpretation()
    questions = dict.fromkeys(str(d["question"]) for d in declared if d.get("question"))
    report = Report(
        title=" and ".join(dict.fromkeys(source.name for source in sources)),
        question=" ".join(questions),
        metric=found,
        ablation=ablation,
        comparisons=comparisons,
        interactions=interactions,
        sentences=[*verdict(ablation, comparisons, interactions), *filter(None, [interpretation.headline])],
        sections=[],
        analyses=analyses,
        interpretation=interpretation,
    )
    with style():
        report.sections = list(_sections(report))
    return report


def _check_metric(sources: Sequence[Source], key: str, *, given: bool) -> None:
    known = dict.fromkeys(
        k for source in sources for entry in source.entries for k in (entry.record.get("result") or {})
    )
    if given and known and key not in known:
        raise ConfigError(f"metric must be one of {', '.join(known)}, got {key!r}{nearest(key, list(known))}")


def _sections(report: Report) -> Iterator[Section]:
    arms, metric = report.ablation.arms, report.metric
    if arms:
        yield _accuracy(report)
    if report.comparisons or report.interactions:
        yield _differences(report)
    if report.comparisons:
        yield Section("images", "Per image", tables=content.images_tables(report.comparisons))
    if report.analyses is not None:
        yield _inside(report.analyses, report)
    if arms:
        drawn = _few(report, arms, to=curves.SHOWN)
        for section in (_curves(drawn, report), _pareto(report), _factor(arms, metric)):
            if section is not None:
                yield section
    yield Section("cost", "Cost", tables=[content.cost_table(report.ablation)])
    yield _left_out(report.ablation)
    if arms:
        yield Section("runs", "Every run that counts", tables=[content.runs_table(report.ablation)])


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _accuracy(report: Report) -> Section:
    arms, metric = report.ablation.arms, report.metric
    caption = "Every seed a small mark, below them the mean with its 95% interval (Student's t)."
    if len(arms) > figures.ROWS:
        caption += f" The first {figures.ROWS} of {len(arms)} arms."
    if any(len(arm.runs) == 1 for arm in arms):
        caption += " An arm with one seed has no interval."
    figure = figures.accuracy_figure(arms, metric)
    caption += _CUT if figures.is_cut(figure, (arm.estimate(metric) for arm in arms)) else ""
    drawing = Drawing("accuracy", figure, caption)
    return Section(
        "accuracy",
        _capital(metric.name),
        drawings=[drawing],
        tables=[content.arms_table(arms, metric, report.analyses)],
    )


def _differences(report: Report) -> Section:
    planned = [*report.comparisons, *report.interactions]
    figure = figures.difference_figure(planned, report.ablation.arms)
    caption = "Difference in every common seed a small mark, below them the mean with its 95% interval (Student's t, not corrected)."
    if report.interactions:
        caption += " Below the pairs: differences of differences."
    if len(planned) > figures.ROWS:
        caption += f" The first {figures.ROWS} of {len(planned)} comparisons."
    if figure is not None and figures.is_cut(figure, (one.estimate for one in planned)):
        caption += _CUT
    text = [
        "The paired t test supposes that differences between seeds are normal; the sign-flip test supposes only that they are as "
        "likely to fall on either side of zero, and is exact, but with n seeds its p is at least 2/2^n. The sign-flip test counts "
        "where that can pass the correction, else the t test does.",
        f"Corrected by Holm's method for {planned[0].corrected_for}."
        if planned[0].tests
        else "No comparison has two common seeds: there is no test.",
    ]
    drawings = [Drawing("differences", figure, caption)] if figure is not None else []
    tables = []
    if report.comparisons:
        tables.append(content.differences_table(report.comparisons, report.metric))
    if report.interactions:
        tables.append(content.interactions_table(report.interactions, report.metric))
    return Section(
        "differences",
        "Differences",
        tuple(text),
        drawings=drawings,
        tables=tables,
    )


def _few(report: Report, arms: Sequence[Arm], *, to: int) -> list[tuple[int, Arm]]:
    """The arms that a figure of lines can hold, with their places: all, or the baselines and those with the best means.

    An arm has one place, and so one colour, in all figures, unless there are so many arms that lines would look the same.
    """
    metric = report.metric
    places = [(place, arm) for place, arm in enumerate(report.ablation.arms) if any(arm is one for one in arms)]
    if len(arms) <= to:
        return places
    baselines = list({id(one.against): one.against for one in report.comparisons}.values())[:_SMALL]
    sign = -1 if metric.higher_is_better is not False else 1
    best = sorted(arms, key=lambda arm: sign * arm.estimate(metric).mean)
    ranked = {id(arm): arm for arm in [*baselines, *best] if any(arm is one for one in arms)}
    chosen = set(list(ranked)[:to])
    left = [(place, arm) for place, arm in places if id(arm) in chosen]
    few = len(report.ablation.arms) <= len(COLOURS) * len(LINES)
    return left if few else [(place, arm) for place, (_, arm) in enumerate(left)]


def _curves(drawn: Sequence[tuple[int, Arm]], report: Report) -> Section | None:
    metric = curves.validation_metric(report.metric)
    found = [(place, curve) for place, arm in drawn if (curve := curves.arm_curve(arm, metric)) is not None]
    made = [
        Drawing(
            f"curves_{axis}", figure, f"{_capital(metric.title)} by {curves.AXES[axis]}: mean and range over seeds."
        )
        for axis in curves.AXES
        if (figure := curves.curve_figure(found, metric, axis)) is not None
    ]
    if not made:
        return None
    text = [
        f"On the slice held out of the training images. Training MACs: {curves.TRAINING_MACS} x MACs of a forward pass x images seen. "
        f"Vertical axes begin at the lowest value after {curves.CLIMB:.0%} of training."
    ]
    total = len(report.ablation.arms)
    if len(drawn) < total:
        text.append(f"{len(drawn)} of {total} arms: the baselines and those with the best means.")
    if not any("hours" in curve.x for _, curve in found):
        text.append("Wall clock was not recorded.")
    return Section("curves", "Learning curves", tuple(text), drawings=made)


def _pareto(report: Report) -> Section | None:
    arms, metric = report.ablation.arms, report.metric
    if len(arms) < 2:
        return None
    made = []
    for axis, cost in pareto.costs(arms).items():
        if len(set(cost.values())) < 2:
            continue  # a front against what all arms have alike is no front
        caption = f"{_capital(metric.title)} by {pareto.AXES[axis]}: mean ± standard deviation over seeds; the line joins the filled marks, which no other arm beats in both."
        if axis == "params" and metric.key == "test/acc1" and pareto.is_imagenet(arms):
            caption += " Grey: published models, read off the figure in the repository of arXiv:2203.07116; squares have a pyramid."
        made.append(Drawing(f"pareto_{axis}", pareto.pareto_figure(arms, metric, axis, cost), caption))
    return Section("pareto", "Pareto fronts", drawings=made) if made else None


def _factor(arms: Sequence[Arm], metric: Metric) -> Section | None:
    key = figures.numeric_factor(arms)
    if key is None:
        return None
    caption = f"{_capital(metric.title)} against {key}: every seed a small mark, the line through the means, bars 95% intervals."
    return Section(
        "factor", "Along the factor", drawings=[Drawing("factor", figures.factor_figure(arms, metric, key), caption)]
    )


def _inside(analyses: Analyses, report: Report) -> Section:
    """What was measured inside the networks, and what it says beside accuracy."""
    found, metric = report.interpretation, report.metric
    text = [_measured(analyses)]
    lists = [("What the runs say", found.sentences), ("What else can move these figures", found.confounds)]
    made = []
    places = {arm.label: place for place, arm in _few(report, [one.arm for one in analyses.arms], to=curves.SHOWN)}
    for key in ARGUED:
        if (figure := scatter_figure(analyses, metric, key, places=places)) is not None:
            made.append(Drawing(f"inside_scatter_{key}", figure, _scatter_caption(found, metric, key)))
    made += _panels(analyses, report)
    tables = [*inside_tables.means_tables(analyses), inside_tables.correlations_table(found, metric)]
    tables.append(inside_tables.unused_table(analyses))
    return Section(
        "inside",
        "Inside the network",
        tuple(text),
        tuple((title, tuple(said)) for title, said in lists if said),
        made,
        [table for table in tables if table is not None],
    )


def _panels(analyses: Analyses, report: Report) -> list[Drawing]:
    """The figures that hold arms against each other, layer by layer."""
    drawn = _few(report, [one.arm for one in analyses.arms], to=PANEL_ARMS)
    insides = [
        ArmInside(arm.label, list(found.by_seed.values()), place=place)
        for place, arm in drawn
        if (found := analyses.of(arm)) is not None
    ]
    left = len(analyses.arms) - len(insides)
    more = f" {len(insides)} of {len(analyses.arms)} arms: the baselines and those with the best means." if left else ""
    return [
        Drawing(f"inside_{name}", figure, caption + more) for name, (figure, caption) in arms_panels(insides).items()
    ]


def _measured(analyses: Analyses) -> str:
    """Of what the figures are, in a paragraph."""
    if not analyses.arms:
        return "No run has an analysis that can be read."
    first = analyses.arms[0].first
    images = "images" if first.images is None else f"{first.images:,} images"
    size = "" if first.img_size is None else f" at {first.img_size[0]}x{first.img_size[1]} px"
    part = {"test": "the test set", "val": "the slice held out of training"}.get(first.part, first.part)
    text = f"Measured {analyses.when} on {images} of {first.data or 'its data'}{size}"
    text += f" ({part})" if part else ""
    text += f", {'averaged (EMA)' if first.weights == 'ema' else 'raw'} weights: {analyses.used} of {analyses.runs} runs that count."
    if analyses.unused:
        text += " The others are listed below: analyses that are not alike are never mixed."
    return text


def _scatter_caption(found: Interpretation, metric: Metric, key: str) -> str:
    caption = f"{_capital(metric.title)} against {QUANTITIES[key].name}: every run a small mark, the mean of an arm a large one."
    one = found.of(key, metric.key)
    if one is None or one.pooled.value is None:
        return caption + (f" No rank correlation: {one.pooled.reason}." if one else "")
    spread = interval_text(one.pooled)
    spread = f", 95% interval {spread}" if spread else f", no interval ({one.pooled.no_interval})"
    return f"{caption} Spearman's ρ = {rho_text(one.pooled.value)} over {one.runs} runs of {one.arms} arms{spread}."


def _left_out(ablation: Ablation) -> Section:
    text = [f"{_capital(said)}." for said in ablation.unequal]
    if not ablation.left_out:
        text.append("No run is missing, failed, or unlike the others of its arm.")
        return Section("left_out", "Missing, failed, unequal", tuple(text))
    counts: dict[str, int] = {}
    for left in ablation.left_out:
        counts[left.state] = counts.get(left.state, 0) + 1
    text.append(f"Not averaged over: {', '.join(f'{n} {state}' for state, n in counts.items())}.")
    table = content.left_out_table(ablation)
    return Section("left_out", "Missing, failed, unequal", tuple(text), tables=[table])


# ------------------------------------------------------------------------------------------------------------------- files


def write_figures(report: Report, folder: Path) -> dict[str, str]:
    """Every figure as PNG and SVG; returns the text of each SVG by its stem."""
    folder.mkdir(parents=True, exist_ok=True)
    with style():
        for drawing in report.drawings:
            save_figure(drawing.figure, folder / drawing.stem)
    return {drawing.stem: (folder / f"{drawing.stem}.svg").read_text() for drawing in report.drawings}


def csv_files(report: Report) -> dict[str, str]:
    """File name -> text."""
    ablation, comparisons, metric = report.ablation, report.comparisons, report.metric
    more = {}
    if report.interactions:
        more["interactions.csv"] = csv_text(content.interactions_rows(report.interactions))
    if report.analyses is not None:
        more["inside.csv"] = csv_text(inside_tables.inside_rows(report.analyses, metric))
        more["correlations.csv"] = csv_text(inside_tables.correlation_rows(report.interpretation))
    return {
        "arms.csv": csv_text(content.arms_rows(ablation.arms, metric, report.analyses)),
        "differences.csv": csv_text(content.differences_rows(comparisons)),
        "images.csv": csv_text(content.images_rows(comparisons)),
        "cost.csv": csv_text(content.cost_rows(ablation)),
        "runs.csv": csv_text(content.runs_rows(ablation)),
        **more,
    }
