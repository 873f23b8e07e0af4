"""A profile for people: where a step's time goes, and what share of the machine's bound each operator reaches. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eit_lab.benchmark.roofline.record import copies_of, done, is_literal, measured_s, seconds_of, work_of
from eit_lab.benchmark.table import Cell, markdown_table, text_table

ROWS: tuple[tuple[str, tuple[str, ...] | None], ...] = (
    *(
        (group, (phase,))
        for group in ("matrix products", "attention", "convolution branch", "stem convolution")
        for phase in ("forward", "backward")
    ),
    *((group, None) for group in ("max pool", "norms", "GELU", "residual sums", "concatenation", "casts and copies")),
    ("optimizer", None),
    ("everything else", None),
)
"""Groups, the first ones forwards and backwards apart."""
_Table = tuple[list[str], list[Cell]]
_LESS = 5e-6  # seconds that are shown as nothing


def label(group: str, phases: Sequence[str] | None) -> str:
    """Of a row."""
    return group if phases is None else f"{group}, {phases[0]}"


def facts_line(record: Mapping[str, Any]) -> str:
    """What was measured on what, in one line."""
    changed = " with changes" if record["changed"] else ""
    commit = f", commit {record['commit'][:9]}{changed}" if record["commit"] else ""
    return (
        f"`{record['command']}`: {record['model']}, batch {record['batch']}, {record['img_size']} px, a training step, median of "
        f"{2 * record['steps']}; {record['date']}, {record['device']} ({record['machine']}), Python {record['python']}, torch "
        f"{record['torch']}{commit}; load of the machine {record['load']:.2f}."
    )


def peaks_line(record: Mapping[str, Any]) -> str:
    """What the machine can do, as measured in the same run."""
    peaks = record["peaks"]
    products = ", ".join(
        f"{rate / 1e9:,.0f} GFLOP/s {precision} (torch's matmul: {peaks['matmul'][precision] / 1e9:,.0f})"
        for precision, rate in peaks["flops"].items()
    )
    cache = (
        f", {peaks['cache'] / 1e9:,.0f} GB/s of the last cache ({peaks['cache_bytes'] >> 20} MiB)"
        if peaks["cache"]
        else ""
    )
    sheet = f" (data sheet: {peaks['data_sheet'] / 1e9:,.0f} dense bf16)" if peaks["data_sheet"] else ""
    return (
        f"Measured in the same run: products {products}{sheet}; {peaks['memory'] / 1e9:,.0f} GB/s of memory{cache}; "
        f"{peaks['exponentials'] / 1e9:.2f} G exponentials/s."
    )


def precisions(record: Mapping[str, Any]) -> list[str]:
    """Those that were asked for."""
    return list(record["work"])


def columns(record: Mapping[str, Any], precision: str) -> list[tuple[str, Mapping[str, Any]]]:
    """(heading, run) of everything there are times of: the literal step, earlier records, the other steps."""
    runs = done(record, precision)
    earlier = [one for one in record["before"] if one["precision"] == precision]
    return [
        *((run["peer"], run) for run in runs if is_literal(run)),
        *((f"{one['title']}: {one['peer']}", one) for one in earlier),
        *((run["peer"], run) for run in runs if not is_literal(run)),
    ]


def times_table(record: Mapping[str, Any], precision: str) -> _Table:
    """Milliseconds of a step and share of it, by group, a column for each implementation."""
    runs = columns(record, precision)
    head = [f"{precision}, ms of a step", *(name for name, _ in runs)]
    rows: list[Cell] = []
    for group, phases in ROWS:
        rows.append((label(group, phases), *(_share(run, seconds_of(run, group, phases)) for _, run in runs)))
    rows.append(("whole step", *(_ms(run["seconds"]) for _, run in runs)))
    copied = [
        sum(copies_of(run, group, None) for group in {group for group, _ in ROWS if group != "casts and copies"})
        for _, run in runs
    ]
    rows.append(
        (
            "of which copies inside other rows",
            *(_share(run, one) for (_, run), one in zip(runs, copied, strict=True)),
        )
    )
    return head, rows


def roofline_table(record: Mapping[str, Any], precision: str) -> _Table:
    """By group: products, bytes, the bound and what sets it, and what share of the bound each implementation reaches."""
    runs = done(record, precision)
    head = [
        f"{precision}, a step",
        "GFLOP",
        "MB at least",
        "bound, ms",
        "set by",
        *(f"{run['peer']} reaches" for run in runs),
    ]
    rows = [
        _bound_row(label(group, phases), work_of(record, precision, group, phases), runs, (group, phases))
        for group, phases in ROWS
        if work_of(record, precision, group, phases)
    ]
    rows.append(_bound_row("whole step", record["work"][precision], runs, None))
    return head, rows


def _bound_row(
    name: str,
    work: Sequence[Mapping[str, Any]],
    runs: Sequence[Mapping[str, Any]],
    what: tuple[str, Sequence[str] | None] | None,
) -> Cell:
    bound = sum(one["bound_s"] for one in work)
    by = {
        kind: sum(one["bound_s"] for one in work if one["set_by"] == kind)
        for kind in dict.fromkeys(["products", "bytes"])
    }
    reached = []
    for run in runs:
        seconds = run["seconds"] if what is None else seconds_of(run, *what)
        reached.append(f"{100 * bound / seconds:.0f}%" if seconds > 0 else "")
    return (
        name,
        f"{sum(one['flops'] for one in work) / 1e9:,.2f}",
        f"{sum(one['num_bytes'] for one in work) / 1e6:,.0f}",
        _ms(bound),
        max(by, key=lambda kind: by[kind]),
        *reached,
    )


def attention_table(record: Mapping[str, Any], precision: str) -> _Table:
    """Attention proper by width of a head: products are few, exponentials many."""
    runs = done(record, precision)
    head = [
        f"attention, {precision}", "GFLOP", "M exponentials", "bound, ms", "exponentials at torch's rate, ms",
        *(f"{run['peer']}, ms forward + backward" for run in runs),
    ]  # fmt: skip
    shapes = list(dict.fromkeys(one["shape"] for one in work_of(record, precision, "attention", None)))
    rows: list[Cell] = []
    for shape in shapes:
        both = [one for one in work_of(record, precision, "attention", None) if one["shape"] == shape]
        times = [" + ".join(_ms(measured_s(run, one)) for one in both) for run in runs]
        rows.append(
            (
                f"{shape.removeprefix('attention ')}" + _times(len(both[0]["places"])),
                f"{sum(one['flops'] for one in both) / 1e9:,.2f}",
                f"{sum(one['exponentials'] for one in both) / 1e6:,.1f}",
                _ms(sum(one["bound_s"] for one in both)),
                _ms(sum(one["softmax_s"] for one in both)),
                *times,
            )
        )
    return head, rows


def shapes_table(record: Mapping[str, Any], precision: str) -> _Table:
    """Every operator, by shape and phase."""
    runs = done(record, precision)
    head = [
        f"operator, {precision}", "phase", "times", "GFLOP", "MB at least", "FLOP/byte", "bound, ms", "set by",
        *(f"{run['peer']}, ms (reaches)" for run in runs),
    ]  # fmt: skip
    rows: list[Cell] = []
    for one in record["work"][precision]:
        reached = []
        for run in runs:
            seconds = measured_s(run, one)
            reached.append(f"{_ms(seconds)} ({100 * one['bound_s'] / seconds:.0f}%)" if seconds else "")
        rows.append(
            (
                one["shape"],
                one["phase"],
                str(max(1, len(one["places"]))),
                f"{one['flops'] / 1e9:,.3f}",
                f"{one['num_bytes'] / 1e6:,.1f}",
                f"{one['flops'] / one['num_bytes']:,.1f}",
                _ms(one["bound_s"]),
                one["set_by"],
                *reached,
            )
        )
    return head, rows


def events_table(run: Mapping[str, Any]) -> _Table:
    """The profiler's own names with most time of their own."""
    head = [f"{run['peer']}, {run['precision']}", "phase", "group", "ms of a step"]
    return head, [(f"`{one['name']}`", one["phase"], one["group"], _ms(one["seconds"])) for one in run["events"][:15]]


def walls_table(record: Mapping[str, Any]) -> _Table:
    """The step without and with the profiler, and the least time."""
    head = ["step", "precision", "without the profiler, ms", "range", "with it, ms", "sum of bounds, ms", "reaches"]
    rows: list[Cell] = []
    for run in record["runs"]:
        if "failed" in run:
            rows.append((run["peer"], run["precision"], run["failed"], "", "", "", ""))
            continue
        bound = sum(one["bound_s"] for one in record["work"][run["precision"]])
        profiled = sorted(run["profiled_wall"])[len(run["profiled_wall"]) // 2]
        rows.append(
            (
                run["peer"],
                run["precision"],
                _ms(run["seconds"]),
                f"{_ms(min(run['wall']))} to {_ms(max(run['wall']))}",
                _ms(profiled),
                _ms(bound),
                f"{100 * bound / run['seconds']:.0f}%",
            )
        )
    return head, rows


def page_section(record: Mapping[str, Any]) -> str:
    """Where the time goes and the roofline by group, as the page shows them, in Markdown."""
    lines = [
        f"### A training step on {record['device']}",
        "",
        facts_line(record),
        "",
        peaks_line(record),
        "",
        *markdown_table(*walls_table(record)),
    ]
    for precision in precisions(record):
        if not done(record, precision):
            continue
        lines += ["", *markdown_table(*times_table(record, precision))]
        lines += ["", *markdown_table(*roofline_table(record, precision))]
        if work_of(record, precision, "attention", None):
            lines += ["", *markdown_table(*attention_table(record, precision))]
    return "\n".join(lines)


def as_markdown(record: Mapping[str, Any]) -> list[str]:
    """The whole record for people."""
    title = f": {record['title']}" if record["title"] else ""
    lines = [f"# Where a training step's time goes{title}", "", *page_section(record).split("\n"), "", *_NOTES]
    lines += ["", "## Every operator"]
    for precision in precisions(record):
        if done(record, precision):
            lines += ["", *markdown_table(*shapes_table(record, precision))]
    lines += ["", "## What the profiler calls them"]
    for run in record["runs"]:
        if "failed" not in run:
            lines += ["", *markdown_table(*events_table(run))]
    return lines


def as_text(record: Mapping[str, Any]) -> list[str]:
    """For a terminal."""
    lines = [facts_line(record), peaks_line(record), "", *text_table(*walls_table(record))]
    for precision in precisions(record):
        if done(record, precision):
            lines += ["", *text_table(*times_table(record, precision))]
            lines += ["", *text_table(*roofline_table(record, precision))]
    return lines


_NOTES = [
    "Times by group: own time of every event under torch's profiler, as shares laid over the step's time without it (on a GPU: the",
    "kernels' own times). Bound: products over the measured rate of their precision, or bytes over the measured bandwidth, whichever is",
    "longer; bytes over the last cache's bandwidth where all that an operator touches fits in it. An operator that finds its input in a",
    "nearer cache can reach more than 100%.",
]


def _share(run: Mapping[str, Any], seconds: float) -> str:
    return f"{_ms(seconds)} ({100 * seconds / run['seconds']:.1f}%)" if seconds >= _LESS else ""


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    ms = 1e3 * seconds
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def _times(count: int) -> str:
    return f", {count} layers" if count > 1 else ""
