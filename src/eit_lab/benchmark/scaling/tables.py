"""The results as tables, sentences and a record, for a terminal and for Markdown. No torch."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from eit_lab.benchmark.scaling.figure import scaling_figure
from eit_lab.benchmark.scaling.model import BASE_GPUS, PAYS, loader_rate
from eit_lab.benchmark.scaling.results import ALGORITHMS, STRESS_GPUS, SWEEP_GPUS, SWEEP_RUNS, Results, Row
from eit_lab.benchmark.table import Cell, markdown_table, text_table, write
from eit_lab.report.figure import save_figure, style
from eit_lab.runs import code_state, versions

_Table: TypeAlias = tuple[list[str], list[Cell]]
_MB, _GB = 1e6, 1e9


@dataclass(frozen=True)
class Summary:
    """Results for people and for the record."""

    results: Results
    command: str

    @property
    def lines(self) -> list[str]:
        """For a terminal."""
        results = self.results
        return [
            *text_table(*efficiencies(results)), "",
            *text_table(*scenarios(results)), "",
            *text_table(*sweeps(results)), "",
            *text_table(*stress(results)), "",
            *verdicts(results), *checks(results),
        ]  # fmt: skip

    def save(self, folder: Path) -> Iterator[Path]:
        """scaling.json, .md, .png and .svg in ``folder``. Raises ConfigError where that cannot be written."""
        from eit_lab.config import ConfigError

        try:
            yield write(folder, "scaling.json", [json.dumps(self._record(), indent=1)])
            yield write(folder, "scaling.md", self._markdown())
            with style():
                save_figure(scaling_figure(self.results), folder / "scaling")
        except OSError as error:
            raise ConfigError(
                f"out must be a folder that can be written, got {str(folder)!r}: {error.strerror}"
            ) from None
        yield folder / "scaling.png"
        yield folder / "scaling.svg"

    def _record(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "date": time.strftime("%Y-%m-%d"),
            "command": self.command,
            "commit": code_state()[0],
            "versions": versions(),
            **self.results.as_dict(),
        }

    def _markdown(self) -> list[str]:
        results = self.results
        return [
            "# Past one machine: model and simulation",
            "",
            f"- {time.strftime('%Y-%m-%d')}; Python {platform.python_version()}; no GPU was used",
            f"- command: `{self.command}`",
            f"- {results.steps} steps simulated of each row, after the loader's first batches; seed {results.seed}; "
            "the same command gives the same numbers to the last digit",
            *(f"- {line}" for line in (*verdicts(results), *checks(results))),
            "",
            "![step time by part, efficiency, sweeps](scaling.png)",
            *_section("What a step asks for (counted)", workloads(results)),
            *_section("Efficiency", efficiencies(results)),
            *_section("A step, the global batch as in the recipe", steps(results, "strong")),
            *_section("A step, the global batch growing with the GPUs (another experiment)", steps(results, "weak")),
            *_section(f"Where it stops paying: most GPUs at {PAYS:.0%} efficiency / GPUs of the shortest epoch", scenarios(results)),
            *_section("Images", images(results)),
            *_section("All-reduce of a full bucket (25 MiB)", reduces(results)),
            *_section(f"{SWEEP_GPUS} GPUs: hours of one run, and until all runs have ended", sweeps(results)),
            *_section("Where the closed form errs (against the simulation)", stress(results)),
            *_section("Numbers", numbers(results)),
        ]  # fmt: skip


def _section(title: str, table: _Table) -> list[str]:
    return ["", f"## {title}", "", *markdown_table(*table)]


# ----------------------------------------------------------------------------------------------------------------- tables


def workloads(results: Results) -> _Table:
    """What was counted of each model."""
    head = [
        "model",
        "parameters",
        "MACs",
        "gradients, MB",
        "buckets, MB (backward done when full)",
        "operations",
        "state, MB",
        "batch",
    ]
    return head, [
        (
            one.model,
            f"{one.params:,}",
            f"{one.macs / 1e9:.3f} G",
            f"{one.gradient_bytes / _MB:.1f}",
            ", ".join(f"{bucket.num_bytes / _MB:.1f} ({bucket.ready_share:.0%})" for bucket in one.buckets),
            f"{one.forward_ops} + {one.backward_ops}",
            f"{one.checkpoint_bytes / _MB:.0f}",
            f"{one.batch_size}",
        )
        for one in results.workloads
    ]


def efficiencies(results: Results) -> _Table:
    """By model and number of GPUs: as it is, and if the hosts agreed twice in each step."""
    head = ["efficiency (with two agreements a step)", *(f"{num} GPUs" for num in results.gpus)]
    table: list[Cell] = []
    for one in results.workloads:
        found = {row.step.gpus: row for row in results.of(one.model, "strong")}
        cells = (
            f"{found[num].efficiency:.0%} ({found[num].efficiency_agreeing:.0%})" if num in found else "refused"
            for num in results.gpus
        )
        table.append((one.model, *cells))
    return head, table


def steps(results: Results, scaling: Any) -> _Table:
    """Every row of one kind of scaling."""
    head = [
        "model", "GPUs", "images each", "compute", "stragglers", "all-reduce, exposed (all)", "agreements", "update",
        "images awaited", "step, ms", "simulated, ms", "closed form", "epoch, s", "efficiency", "300 epochs, h",
    ]  # fmt: skip

    def cells(row: Row) -> Cell:
        one = row.step
        part = {name: f"{1e3 * seconds:.2f}" for name, seconds in one.parts.items()}
        return (
            row.model,
            f"{one.gpus}",
            f"{one.images}",
            part["compute"],
            part["stragglers"],
            f"{part['exposed']} ({1e3 * one.reduce:.2f})",
            part["agreements"],
            part["update"],
            part["loader_wait"],
            f"{1e3 * one.seconds:.2f}",
            f"{1e3 * row.simulated_s:.2f}",
            f"{row.error:+.1%}",
            f"{row.epoch_s:.1f}",
            f"{row.efficiency:.0%}",
            "-" if row.run_hours is None else f"{row.run_hours:.1f}",
        )

    return head, [cells(row) for one in results.workloads for row in results.of(one.model, scaling)]


def scenarios(results: Results) -> _Table:
    """Where it stops paying, and where an epoch is shortest."""
    head = ["pays to / shortest epoch, GPUs", *(one.model for one in results.workloads)]
    return head, [
        (name, *(f"{stops[one.model].pays_to} / {stops[one.model].fastest}" for one in results.workloads))
        for name, stops in results.scenarios.items()
    ]


def images(results: Results) -> _Table:
    """What the loader and the storage have to do."""
    head = [
        "model", "GPUs", "images/s", "cores a GPU", "from shared storage, GB/s", "first copy to all machines, s", "gradients, GB/s a GPU",
    ]  # fmt: skip
    return head, [
        (
            one.model,
            f"{row.step.gpus}",
            f"{row.feeding.images_per_s:,.0f}",
            f"{row.feeding.cores_per_gpu:.1f}",
            f"{row.feeding.in_place_bps / _GB:.2f}",
            f"{row.feeding.first_epoch_s:,.0f}",
            f"{row.feeding.nic_bps / _GB:.2f}",
        )
        for one in results.workloads
        for row in results.of(one.model, "strong")
    ]


def reduces(results: Results) -> _Table:
    """By number of GPUs."""
    head = ["GPUs", "sent by each, MB", *(f"{one}, us" for one in ALGORITHMS), "an agreement of the hosts, us"]
    return head, [
        (
            f"{found['gpus']}",
            f"{found['bytes_sent'] / _MB:.2f}",
            *(f"{1e6 * found['seconds'][one]:,.0f}" for one in ALGORITHMS),
            f"{1e6 * found['agreement_s']:,.0f}",
        )
        for found in results.reduces()
    ]


def sweeps(results: Results) -> _Table:
    """By GPUs of a run."""
    counts = "; ".join(f"{runs} runs" for runs in SWEEP_RUNS)
    head = [f"GPUs of a run (hours of one; {counts})", *(one.model for one in results.workloads)]
    found = {
        one.model: {runs: {width.gpus: width for width in widths} for runs, widths in results.sweeps[one.model].items()}
        for one in results.workloads
    }
    gpus = sorted({num for by_runs in found.values() for widths in by_runs.values() for num in widths})

    def cell(model: str, num: int) -> str:
        widths = [found[model][runs].get(num) for runs in SWEEP_RUNS]
        if widths[0] is None:
            return "refused"
        return f"{widths[0].run_hours:.1f}; " + "; ".join(f"{width.all_hours:.1f}" for width in widths if width)

    return head, [(f"{num}", *(cell(one.model, num) for one in results.workloads)) for num in gpus]


def stress(results: Results) -> _Table:
    """Of one model."""
    names = list(dict.fromkeys(one.what for one in results.stress))
    errors = {(one.what, one.gpus): one.error for one in results.stress}
    head = ["closed form over simulation", *(f"{num} GPUs" for num in STRESS_GPUS)]
    return head, [
        (name, *(f"{errors[name, num]:+.1%}" for num in STRESS_GPUS)) for name in names
    ]  # fmt: skip


def numbers(results: Results) -> _Table:
    """Everything that the model takes as given."""
    rows: list[Cell] = []
    for fact in results.cluster.facts():
        number = fact["value"]
        value = f"{number:,}" if isinstance(number, int) else f"{number:.4g}"
        rows.append((fact["what"], f"{value} {fact['unit']}".strip(), fact["kind"], fact["source"]))
    return ["what", "value", "kind", "source, or what it stands for"], rows


# -------------------------------------------------------------------------------------------------------------- sentences


def verdicts(results: Results) -> list[str]:
    """A sentence for each model, computed."""
    said = []
    for one in results.workloads:
        found = {row.step.gpus: row for row in results.of(one.model, "strong")}
        here, agreeing = (
            results.scenarios["as above"][one.model],
            results.scenarios["two agreements of the hosts in each step"][one.model],
        )
        widths = {width.gpus: width for width in results.sweeps[one.model][SWEEP_RUNS[0]]}
        text = f"{one.model}: more GPUs pay to {here.pays_to} ({agreeing.pays_to} with two agreements a step), the shortest epoch is on {here.fastest}"
        if BASE_GPUS in found and here.fastest in found:
            text += f" ({found[here.fastest].epoch_s:.1f} s; {found[BASE_GPUS].epoch_s:.1f} s on {BASE_GPUS})"
        if {BASE_GPUS, SWEEP_GPUS} <= set(widths):
            narrow, wide = widths[BASE_GPUS].all_hours, widths[SWEEP_GPUS].all_hours
            text += (
                f"; {SWEEP_RUNS[0]} runs on {SWEEP_GPUS} GPUs: {narrow:.1f} h with {BASE_GPUS} each at once, {wide:.1f} h one after "
                f"the other ({wide / narrow:.1f} times as long)"
            )
        said.append(text)
    fed = loader_rate(results.cluster)
    said.append(f"a GPU's {results.cluster.workers} loader cores give {fed:,.0f} images/s")
    return said


def checks(results: Results) -> list[str]:
    """What was compared with what, and how it came out."""
    errors = [abs(row.error) for row in results.rows]
    said = [
        f"closed form against simulation, {len(errors)} rows: largest difference {max(errors):.1%}, mean {sum(errors) / len(errors):.1%}"
    ]
    if results.twice:
        worst = max(one.largest_difference for one in results.twice)
        told = ", ".join(f"{one.gpus} ({one.events:,} events)" for one in results.twice)
        said.append(f"the simulation against an event queue, GPUs: {told}: largest relative difference {worst:.0e}")
    slowest = max(results.rows, key=lambda row: row.question)
    said.append(
        f"a question of all hosts, which no step waits for, is on its way for at most {slowest.question:.0%} of the time it has "
        f"({slowest.model} on {slowest.step.gpus} GPUs, {slowest.step.images} images each)"
    )
    return [*said, *_reality(results)]


def _reality(results: Results) -> Iterator[str]:
    for processes, ranks in results.reality.items():
        one = ranks[0]
        for workload in results.workloads:
            real = one["buckets"].get(workload.model.removeprefix("eit_"))
            if real is not None:
                told = ", ".join(f"{size:,}" for size in real)
                same = real == [bucket.num_bytes for bucket in workload.buckets]
                yield f"{workload.model}: DDP's buckets on {processes} processes: {told} bytes, {'as counted' if same else 'NOT AS COUNTED'}"
        came = sum(rank["raw"] for rank in ranks) / processes
        formula = 2 * (processes - 1) / processes * one["raw_bytes"]
        messages = sum(rank["agreement_messages"] for rank in ranks)
        yield (
            f"gloo on {processes} processes: an all-reduce of {one['raw_bytes']:,} bytes brought each {came:,.0f}, "
            f"{came / formula:.4f} of 2 (n - 1) / n; one of 16 bytes took {messages} TCP segments, "
            f"{messages / (4 * (processes - 1)):.1f} for each of two pieces and 2 (n - 1) hops"
        )
        asked = sum(rank["question_messages"] for rank in ranks)
        free = all(rank["asked_without_waiting"] for rank in ranks)
        yield (
            f"the loop's question of {processes} processes (three numbers) took {asked} TCP segments, "
            f"{asked / (6 * (processes - 1)):.1f} for each of three pieces and 2 (n - 1) hops; who asked first "
            f"{'went on before the others had asked' if free else 'WAITED FOR THE OTHERS'}"
        )
