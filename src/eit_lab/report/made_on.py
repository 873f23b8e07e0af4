"""What runs were made on and with, and in what the runs that count are not alike. It parts no arms: it is said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from eit_lab.report.records import RunEntry, plain_text


def unequal(arms: Mapping[str, Mapping[int, RunEntry]]) -> list[str]:
    """What a reader must know of the runs that count, arm -> seed -> run, before trusting a comparison."""
    runs = [run for of in arms.values() for run in of.values()]
    said = []
    codes = Counter(str((run.record.get("versions") or {}).get("code")) for run in runs)
    if len(codes) > 1:
        said.append(
            f"runs were made with {len(codes)} versions of the code ({', '.join(sorted(codes))}): rerun for a fair table"
        )
    for what, of in (("devices", device), ("precisions", _precision), ("versions of torch", _torch)):
        counts = Counter(text for run in runs if (text := of(run)))
        if len(counts) > 1:
            shown = (f"{text} ({n} run{'' if n == 1 else 's'})" for text, n in counts.most_common())
            said.append(f"different {what}: {', '.join(shown)}")
    seeds = {label: sorted(of) for label, of in arms.items()}
    if len({tuple(s) for s in seeds.values()}) > 1:
        listed = "; ".join(f"{label}: {', '.join(map(str, s))}" for label, s in seeds.items())
        said.append(f"arms have different seeds ({listed}): differences use the common ones only")
    again = [f"{run.label} ({n}x)" for run in runs if (n := run.record.get("restarts"))]
    if again:
        said.append(f"stopped and gone on from their own state: {', '.join(again)}")
    return said


def device(run: RunEntry) -> str:
    """On how many of which devices a run was made, a CPU with its name; empty where it is not known."""
    placement = run.record.get("placement") or {}
    name = str(placement.get("device") or placement.get("accelerator") or "")
    if placement.get("accelerator") == "cpu":
        processor = (run.record.get("versions") or {}).get("processor")
        name = name.replace("cpu", f"{processor} (CPU)" if processor else "CPU", 1).replace(", 1 threads", ", 1 thread")
    return plain_text(f"{placement.get('world_size', 1)} x {name}") if name else ""


def _precision(run: RunEntry) -> str:
    return str((run.record.get("placement") or {}).get("precision") or "")


def _torch(run: RunEntry) -> str:
    return str(((run.record.get("versions") or {}).get("packages") or {}).get("torch") or "")
