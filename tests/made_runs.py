"""Runs that were never trained: records, curves and predictions as training writes them, for the tests of what reads them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

WIDTHS = {"mini": (224, 4), "tiny": (360, 6), "base": (480, 8), "large": (608, 10)}


def made_record(
    arm: str,
    seed: int,
    accuracy: float,
    *,
    status: str = "finished",
    rule: str | None = None,
    strength: float = 1.0,
    data: str = "digits",
    params: int = 1_234_567,
    macs: int = 2_500_000,
    epochs: int = 10,
    **more: Any,
) -> dict[str, Any]:
    """A record as training/fit.py writes it; ``more`` replaces or adds keys of its first level."""
    rule = rule or ("none" if arm.startswith("vit") else "decreasing")
    config = {
        "seed": seed,
        "model": {
            "name": arm,
            "size": {"name": "nano", "embed_dim": 128},
            "ib": {"name": arm, "rule": rule, "strength": strength},
            "stem": {"kind": "eit"},
        },
        "data": {"kind": data, "name": data, "root": "/somewhere/else"},
        "recipe": {"name": "small", "epochs": epochs, "lr": 0.001},
        "run": {"root": "runs", "sweep": None, "arm": None},
    }
    finished = status == "finished"
    record = {
        "schema": 1,
        "identity": f"{arm}{strength}{seed}",
        "name": arm,
        "seed": seed,
        "status": status,
        "config": config,
        "cost": {"params": params, "macs": macs, "macs_thop": macs - 100, "grid": [4, 4]},
        "data": {"fingerprint": "0123", "num_train": 1000, "num_classes": 10},
        "img_per_s": 100.0 + seed,
        "device_hours": 0.5 if finished else 0.1,
        "energy_wh": None,
        "result": {"test/acc1": accuracy, "test/acc5": 0.999, "test/loss": 1 - accuracy} if finished else None,
        "progress": {"images": 1000 * epochs, "epoch": epochs - 1},
        "placement": {"device": "cpu, 1 threads", "accelerator": "cpu", "world_size": 1, "precision": "32-true"},
        "versions": {"code": "abc", "host": "a-host", "packages": {"torch": "2.14.1"}},
        "started": "2026-01-01T10:00:00+0000",
        "ended": "2026-01-01T11:00:00+0000",
        "restarts": 0,
    }
    return {**record, **more}


def write_run(folder: Path, record: Mapping[str, Any], *, images: int = 200, curve: bool = True) -> Path:
    """Put a run on disk. Its predictions agree with its accuracy; seeds and arms share which images are hard."""
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(record))
    result = record.get("result") or {}
    accuracy = result.get("test/acc1")
    if not isinstance(accuracy, float):
        return folder
    if curve:
        (folder / "metrics.csv").write_text(_metrics(record, accuracy))
    if images:
        rng = np.random.default_rng([record["seed"], *record["name"].encode()])
        hardness = np.random.default_rng(99).random(images) + 0.3 * rng.random(images)
        right = np.zeros(images, dtype=bool)
        right[np.argsort(hardness)[: round(accuracy * images)]] = True
        label = np.arange(images) % 10
        np.savez(
            folder / "predictions.npz",
            index=np.arange(images),
            label=label,
            predicted=np.where(right, label, (label + 1) % 10),
        )
    return folder


def _metrics(record: Mapping[str, Any], accuracy: float) -> str:
    epochs = record["config"]["recipe"]["epochs"]
    rng = np.random.default_rng(record["seed"] + 1000)
    lines = ["step,epoch,images,perf/hours,train/loss,val/acc1,val/loss"]
    for epoch in range(epochs):
        lines.append(f"{10 * epoch + 5},{epoch},{1000 * epoch + 500},,{1 / (epoch + 1)},,")
        value = (accuracy + 0.002) * (1 - math.exp(-4.5 * (epoch + 1) / epochs)) + 0.004 * rng.standard_normal()
        hours = 0.5 * (epoch + 1) / epochs
        lines.append(f"{10 * epoch + 10},{epoch},{1000 * (epoch + 1)},{hours},,{value},{1 - value}")
    return "\n".join(lines) + "\n"


def write_runs(folder: Path, records: Sequence[Mapping[str, Any]], **how: Any) -> Path:
    """A folder of runs: run0, run1, ..."""
    for number, record in enumerate(records):
        write_run(folder / f"run{number}", record, **how)
    return folder


def write_sweep(
    root: Path,
    name: str,
    records: Sequence[Mapping[str, Any]],
    *,
    declaration: Mapping[str, Any] | None,
    states: Mapping[int, tuple[str, str]] | None = None,
    **how: Any,
) -> Path:
    """A sweep's folder with the runs beside it; ``states``: job number -> (state, what was said), for jobs without a record."""
    from eit_lab.manifest import Entry, add_jobs

    folder = root / "sweeps" / name
    folder.mkdir(parents=True)
    entries, events = [], []
    for number, record in enumerate(records):
        label = record["config"]["run"]["arm"] or record["name"]
        run = f"{name}-{number:04d}"
        if number not in (states or {}):
            write_run(root / run, record, **how)
        entries.append(
            Entry(
                label=f"{label} seed {record['seed']}", point=(f"arm={label}", f"seed={record['seed']}"), arm=label,
                seed=record["seed"], identity=f"id{number}", name=run, folder=f"../../{run}", frozen=f"jobs/{run}.json",
                log=f"jobs/{run}.log",
            )
        )  # fmt: skip
        state, said = (states or {}).get(number, (record["status"], ""))
        events.append({"time": 1.0 + number, "job": f"id{number}", "state": state, "said": said, "by": "test"})
    add_jobs(folder, entries, declaration=declaration, launch={"command": ["-m"]})
    lines = [json.dumps(event) for event in events if event["state"] != "waiting"]
    (folder / "events.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def declared(
    name: str, arms: Sequence[str], *, factor: Sequence[str], seeds: Sequence[int], **more: Any
) -> dict[str, Any]:
    """A declaration as sweep.json has it."""
    return {
        "name": name, "question": "Does it help?", "factor": list(factor), "arms": {arm: [f"model={arm}"] for arm in arms},
        "base": [], "seeds": list(seeds), "baseline": arms[0], "metric": "test/acc1", "compare": [], "match": None,
        "reference": None, "budget": {"device_hours": None, "disk_gb": None}, **more,
    }  # fmt: skip
