"""What the declared experiments are expected to cost: written into their READMEs, their budgets and the index.

    python benchmarks/experiment_costs.py           # writes
    python benchmarks/experiment_costs.py --check   # says what would change; exit status 1

Device-hours of a run = 6 x MACs x images / (MFU x peak) / 3600: two operations a MAC, the backward pass twice the forward pass;
MACs of one image with the attention products (models/cost.py), images = steps x global batch. Peak and MFU are assumptions,
stated below; evaluation, start-up and waiting for data come on top. Disk is the guard's upper bound (sweep/guard.py).
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

from eit_lab.compose import parse_flags
from eit_lab.config import Config
from eit_lab.data.catalog import published_facts
from eit_lab.data.prepare import prepare
from eit_lab.declaration import FILE, read_experiment
from eit_lab.plan import plan
from eit_lab.runs import DataFacts
from eit_lab.sweep.arms import Sweep, read_sweep
from eit_lab.sweep.guard import disk_bytes
from eit_lab.sweep.matched import match_arms
from eit_lab.sweep.probe import Probe
from eit_lab.units import si

PEAK_FLOPS = 989e12  # dense bf16 of one H100 SXM, NVIDIA's data sheet
MFU = 0.20  # a compiled 22 M-parameter ViT at 224 px, batch 256, bf16, on one H100 has 0.229
ROOT = Path(__file__).parents[1] / "experiments"
_BEGIN, _END = "<!-- computed by benchmarks/experiment_costs.py -->", "<!-- end -->"


def main(argv: list[str]) -> int:
    """Write, or with --check compare, what is computed."""
    wanted = {}
    rows = []
    with Probe() as probe:
        for path in sorted(ROOT.glob(f"*/{FILE}")):
            table, hours, disk, runs = _cost(path.parent, probe)
            readme = path.with_name("README.md")
            stated = _BEGIN in readme.read_text()  # the others say what they took on a CPU
            if stated:
                wanted[readme] = _between(readme.read_text(), table)
                limits = {"device_hours": _round_up(2 * hours), "disk_gb": _round_up(2 * disk / 1e9)}
                text = path.read_text()
                for key, limit in limits.items():
                    text = re.sub(rf"^  {key}: .*$", f"  {key}: {limit:.1f}", text, flags=re.MULTILINE)
                wanted[path] = text
            declared = read_experiment(path.parent)
            shown = _hours(hours) if stated else "CPU cores"
            rows.append(
                f"| [{declared.name}]({declared.name}) | {declared.question} | {len(declared.arms)} | {runs} | {shown} |"
            )
    index = ROOT / "README.md"
    head = "| experiment | question | arms | runs | device-hours |\n|---|---|---:|---:|---:|\n"
    wanted[index] = _between(index.read_text(), head + "\n".join(rows))
    changed = [path for path, text in wanted.items() if path.read_text() != text]
    for path in changed:
        print(path.relative_to(ROOT))
        if "--check" not in argv:
            path.write_text(wanted[path])
    return 1 if changed and "--check" in argv else 0


def _cost(folder: Path, probe: Probe) -> tuple[str, float, int, int]:
    """(table of the arms, device-hours, bytes on disk, runs) of an experiment."""
    flags = parse_flags(
        ["-m", f"experiment={folder}", "data.root=null"] if _is_imagenet(folder) else ["-m", f"experiment={folder}"]
    )
    sweep = match_arms(read_sweep(flags), probe=probe, describe=_facts, quiet=True)
    lines = ["| arm | width | parameters | MACs | device-hours a run | runs |", "|---|---:|---:|---:|---:|---:|"]
    hours, disk = 0.0, 0
    for arm, places in sweep.arms().items():
        config = sweep.points[places[0]].config
        facts = _facts(config)
        cost = probe.cost(config, num_classes=facts.num_classes)
        counts = plan(config, facts)
        each = 6 * cost["macs"] * counts.images(counts.total_steps) / (MFU * PEAK_FLOPS) / 3600
        hours += each * len(places)
        disk += disk_bytes(config, facts, params=cost["params"]) * len(places)
        lines.append(
            f"| {arm} | {_width(sweep, places[0])} | {cost['params']:,} | {si(cost['macs'])} | {_hours(each, 1)} | {len(places)} |"
        )
    said = (
        f"{_hours(hours)} device-hours and at most {disk / 1e9:,.0f} GB of disk: 6 x MACs x images / (MFU x peak), at an assumed MFU of "
        f"{MFU:.0%} of {PEAK_FLOPS / 1e12:,.0f} TFLOP/s (H100, bf16, compiled); [the formula](../README.md#cost)."
    )
    return "\n".join([*lines, "", *_wrapped(said)]), hours, disk, len(sweep.points)


def _hours(hours: float, decimals: int = 0) -> str:
    """With two significant digits at least."""
    return f"{hours:,.{decimals}f}" if hours >= 10 ** (1 - decimals) else f"{hours:.2g}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)


def _is_imagenet(folder: Path) -> bool:
    return "data=imagenet" in read_experiment(folder).base


def _width(sweep: Sweep, place: int) -> str:
    size = getattr(sweep.points[place].config.model, "size", None)
    return "by name" if size is None else str(size.embed_dim)


def _facts(config: Config) -> DataFacts:
    return published_facts(config.data) or prepare(config)


def _between(text: str, new: str) -> str:
    before, found, rest = text.partition(_BEGIN)
    after = rest.partition(_END)[2]
    assert found, "the file has no place for it"
    return f"{before}{_BEGIN}\n\n{new}\n\n{_END}{after}"


def _round_up(value: float) -> float:
    """Two digits, never below."""
    scale = 10.0 ** (len(str(int(value))) - 2)
    return -(-value // scale) * scale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
