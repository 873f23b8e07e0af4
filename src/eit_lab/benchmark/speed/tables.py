"""Records of ``bench model``, ``bench step`` and ``bench startup`` as Markdown: for a terminal, a file beside the JSON, the page. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eit_lab.benchmark.speed.goals import (
    PASSES,
    Record,
    Spread,
    Verdict,
    flops,
    judge,
    least_seconds,
    product_rate,
    row_of,
    scaled,
    spread,
    times_as_fast,
)
from eit_lab.benchmark.speed.peers import LITERAL
from eit_lab.benchmark.speed.startup_tables import startup_lines
from eit_lab.benchmark.table import markdown_table

_TITLES = {"step": "Training step", "model": "Inference", "startup": "Start-up"}
_ONE = {"step": "step", "model": "pass"}


def tables(record: Record) -> str:
    """The record for people, a file of its own."""
    return f"# {title_of(record)}\n\n{_body(record)}\n"


def page_section(record: Record) -> str:
    """The same as a section of docs/performance.md."""
    return f"### {title_of(record)}\n\n{_body(record)}\n"


def title_of(record: Record) -> str:
    """What was measured, and where."""
    return f"{_TITLES[record['kind']]} on {record['device']}"


def _body(record: Record) -> str:
    lines = startup_lines(record) if record["kind"] == "startup" else _speed_lines(record)
    return "\n".join([*_head(record), "", *lines])


def _head(record: Record) -> list[str]:
    packages = record["packages"]
    versions = ", ".join(
        f"{name} {packages[name]}" for name in ("torch", "torchvision", "timm", "lightning") if name in packages
    )
    load = " and ".join(f"{one:.2f}" for one in record["load"])
    return [
        f"`{record['command']}`",
        "",
        f"{record['date']}, {record['machine']} ({' '.join(record['instructions'])}), {record['threads']} threads, Python {record['python']}, {versions}, eit_lab "
        f"{record['eit_lab']}, commit {record['commit'] or 'unknown'}{' with changes' if record['changed'] else ''}; load of the "
        f"machine before and after: {load}.",
    ]


# ------------------------------------------------------------------------------------------------------ model and step


def _speed_lines(record: Record) -> list[str]:
    one = _ONE[record["kind"]]
    verdicts = judge(record)
    head = [
        "model", "", "precision", f"a {one} (range)", "images/s", "rate", "of the product's" if _no_peak(record) else "of the peak",
        "memory, GB", "times as fast as literal (range)", "roof",
    ]  # fmt: skip
    return [
        f"Batch {record['batch']}, {record['img_size']} px, {record['rounds']} rounds in which all take turns; medians, and ranges "
        "over the rounds; a ratio is of the same round.",
        "",
        *markdown_table(head, [_cells(record, row) for row in record["rows"]]),
        "",
        *_goal_lines(verdicts),
        *[f"- {note}" for note in _notes(record)],
    ]


def _goal_lines(verdicts: Sequence[Verdict]) -> list[str]:
    if not verdicts:
        return ["No goal is set for what was measured.", ""]
    rows = [_goal_cells(verdict) for verdict in verdicts]
    return [*markdown_table(["model", "goal", "", "measured (range)", "roof", "verdict"], rows), ""]


def _goal_cells(verdict: Verdict) -> tuple[str, ...]:
    goal = verdict.goal
    percent = goal.kind == "peak"

    def show(value: float) -> str:
        return f"{100 * value:.1f}%" if percent else f"{value:.2f}"

    target = f"{'<=' if goal.at_most else '>='} {f'{100 * goal.target:.0f}%' if percent else f'{goal.target:g}'}"
    if verdict.measured is None:
        return verdict.model, goal.what, target, verdict.why, "", "not measured"
    middle, low, high = verdict.measured
    measured = show(middle) if low == high else f"{show(middle)} ({show(low)} to {show(high)})"
    words = "met" if verdict.met else "MISSED"
    if verdict.beyond:
        words += ", beyond this hardware"
    return verdict.model, goal.what, target, measured, "" if verdict.roof is None else show(verdict.roof), words


def _cells(record: Record, row: Mapping[str, Any]) -> tuple[str, ...]:
    named = row["model"], row["label"], row["precision"]
    if not row["seconds"]:
        return *named, str(row["lost"]), "", "", "", "", "", ""
    seconds = spread(row["seconds"])
    rate = flops(record, row) / seconds[0]
    against = record["peak_flops"].get(row["precision"]) or product_rate(record, row["model"], row["precision"])
    literal = row_of(record, row["model"], LITERAL, row["precision"])
    ratio, roof = "", ""
    if literal is not None and literal["seconds"]:
        middle, low, high = times_as_fast(row, literal)
        ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})" if row["peer"] != LITERAL else "1"
        if row["macs"] == literal["macs"]:
            roof = f"{spread(literal['seconds'])[0] / least_seconds(record, row):.2f}"
    memory = "" if not row["memory_bytes"] else f"{row['memory_bytes'] / 1e9:.2f}"
    return (
        *named,
        _seconds(seconds),
        f"{record['batch'] / seconds[0]:,.1f}"
        if record["batch"] / seconds[0] < 1000
        else f"{record['batch'] / seconds[0]:,.0f}",
        _flops(rate),
        f"{100 * rate / against:.1f}%",
        memory,
        ratio,
        roof,
    )


def _no_peak(record: Record) -> bool:
    return not any(record["peak_flops"].values())


def _notes(record: Record) -> list[str]:
    passes = PASSES[record["kind"]]
    found = [
        "rate: 2 operations a MAC"
        + (f", {passes} forward passes' worth of them in a step" if passes > 1 else "")
        + "; MACs of matrix products and convolutions, attention's included, of each model itself (torch's FLOP counter): sizes "
        "and token counts differ, rates can be compared",
        "roof: what the ratio would be if a "
        + _ONE[record["kind"]]
        + " took no longer than its products alone at the rate of a large one; of the same work as the literal one's only",
    ]
    for row in record["products"]:
        if row["seconds"]:
            middle, low, high = scaled(spread([2 * row["macs"] / one for one in row["seconds"]]), 1.0)
            side = round(row["macs"] ** (1 / 3))
            found.append(
                f"a {side} x {side} matrix product (torch's or ours, the faster) in {row['precision']}, in the same rounds beside {row['model']}: {_flops(middle)} "
                f"({_flops(low)} to {_flops(high)})"
            )
    if record["kind"] == "step":
        found.append(
            "a step: forward, cross entropy, backward, AdamW, zero_grad, on one batch that stays; no loader, no augmentation, no "
            "Lightning loop. AdamW is torch's default one, but fused for ours and for who compiles"
        )
    where = (
        "what the process takes beyond its libraries"
        if record["device_kind"] == "cpu"
        else "torch's tensors at their most"
    )
    found.append(f"memory: {where}, model{', gradients and optimizer' if passes > 1 else ''} included")
    made = {(row["label"], row["what"], row["made"]) for row in record["rows"]}
    found += [f"{label}: {what}" for label, what, _ in sorted(made, key=lambda one: one[0])]
    found += _compiled(record)
    first = [row for row in record["rows"] if row["first_s"] and row["first_s"] > 20]
    found += [
        f"{row['label']} beside {row['model']}, {row['precision']}: {row['first_s']:.0f} s until the first {_ONE[record['kind']]} was done"
        for row in first
    ]
    found.append(f"workers that wait for their turn: {100 * record['idle_cpu_share']:.1f}% of one core")
    return found


def _compiled(record: Record) -> list[str]:
    """How each peer is compiled, peers and sizes of one answer together."""
    answers: dict[str, dict[str, list[str]]] = {}
    for row in record["rows"]:
        if row["compiled"]:
            models = answers.setdefault(row["compiled"], {}).setdefault(row["label"], [])
            models += [] if row["model"] in models else [row["model"]]
    lines = []
    for answer, labels in answers.items():
        who = "; ".join(f"{label} beside {', '.join(models)}" for label, models in labels.items())
        lines.append(f"{who}: {answer}")
    return lines


def _seconds(values: Spread) -> str:
    unit, factor = ("s", 1.0) if values[0] >= 1 else ("ms", 1e3)
    digits = 2 if factor * values[0] < 10 else 1 if factor * values[0] < 100 else 0
    middle, low, high = (f"{factor * value:.{digits}f}" for value in values)
    return f"{middle} {unit} ({low} to {high})"


def _flops(rate: float) -> str:
    return f"{rate / 1e12:.1f} TFLOP/s" if rate >= 10e12 else f"{rate / 1e9:,.0f} GFLOP/s"
