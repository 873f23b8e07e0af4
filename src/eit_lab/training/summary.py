"""What a run says: a few lines before the first step, a few after the last, and how to go on."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eit_lab import published
from eit_lab.config import Config, ConvStem
from eit_lab.models.cost import Cost
from eit_lab.plan import Plan
from eit_lab.runs import DataFacts, Run
from eit_lab.units import si


def summary(
    config: Config,
    facts: DataFacts,
    run: Run,
    cost: Cost,
    plan: Plan,
    placement: dict[str, Any],
    *,
    from_notes: Sequence[str] = (),
    data_notes: Sequence[str] = (),
) -> str:
    """Model, data and cost in a few lines, before the first step; notes of the weights it starts from, and of the data."""
    model, data, recipe = config.model, config.data, config.recipe
    splits = model.layer_splits()
    images = plan.images(plan.total_steps)
    h, w = cost.grid
    norm = "; batch norm over " + _normed(placement, plan) if _has_batch_norm(config) else ""
    rows = [
        ("model", f"{model.name}: {model.size.embed_dim} wide, {model.size.depth} deep, {model.size.num_heads} heads; "
                  f"stem {model.stem.kind}, {h}x{w} tokens; position embedding {model.pos_embed}{norm}"),
        ("mixer", f"{model.ib.rule}, strength {model.ib.strength:g}: attention channels "
                  f"{' '.join(str(split.attn_dim) for split in splits)} of {model.size.embed_dim}"),
        ("cost", f"{cost.params:,} parameters; {si(cost.macs, digits=3)} MACs an image ({si(cost.macs_thop, digits=3)} as thop counts)"),
        ("data", f"{data.name}: {facts.num_train:,} train, {facts.num_val:,} held out of train, {facts.num_test:,} test; "
                 f"{facts.num_classes} classes; {_size(data.img_size)} px"),
        *(("", note) for note in data_notes),
        ("recipe", f"{recipe.name}: {plan.total_steps:,} steps of {recipe.batch_size} images ({images / facts.num_train:.3g} epochs), "
                   f"peak learning rate {recipe.lr:g}; {si(3 * cost.macs * images)} MACs in all"),
        ("on", f"{placement['world_size']} x {placement['device']}, {placement['precision']}, "
               f"{plan.micro_batch} images a device and micro-batch, {plan.accumulate} micro-batch{'es' * (plan.accumulate > 1)} a step"),
        *(("from", note) for note in from_notes),
        ("run", f"{run.folder}  ({'resumed' if run.state == 'resume' else 'new'}, seed {config.seed})"),
    ]  # fmt: skip
    return "\n".join(f"{name:>7}  {text}" for name, text in rows)


def _has_batch_norm(config: Config) -> bool:
    return isinstance(config.model.stem, ConvStem) and config.model.stem.norm == "batch"


def _normed(placement: dict[str, Any], plan: Plan) -> str:
    """Over how many images a stem's batch norm takes its statistics: it depends on the devices, so it is said."""
    synced = placement["accelerator"] == "cuda"
    return f"{plan.micro_batch * (plan.world_size if synced else 1)} images"


def _size(img_size: Any) -> str:
    return f"{img_size}x{img_size}" if isinstance(img_size, int) else "x".join(map(str, img_size))


def closing_line(record: dict[str, Any], run: Run) -> str:
    """Result, folder, how to look, how to go on."""
    result = record["result"]
    n = record["data"]["num_test"]
    error = 100 * math.sqrt(max(1e-12, result["test/acc1"] * (1 - result["test/acc1"])) / n)
    lines = [
        f"test top-1 {100 * result['test/acc1']:.2f}% (+-{error:.2f} binomial, {n} images), "
        f"top-5 {100 * result['test/acc5']:.2f}%, {_which_weights(record)}"
    ]
    if "test/acc1_ema" in result:
        lines.append(
            f"averaged weights: top-1 {100 * result['test/acc1_ema']:.2f}%, top-5 {100 * result['test/acc5_ema']:.2f}%"
        )
    reference = record["config"]["recipe"]["reference"]
    if reference and record["config"]["data"]["name"] == "imagenet":
        best = max(published.curve(reference), key=lambda epoch: epoch.test_acc1)
        gap = 100 * (result["test/acc1"] - best.test_acc1)
        lines.append(
            f"published eit_{reference}: top-1 {100 * best.test_acc1:.2f}% at its best epoch; this run {gap:+.2f} points"
        )
    if record.get("unread"):
        lines.append(f"left out: {len(record['unread'])} images that could not be read; unread.jsonl names them")
    lines += [
        f"folder {run.folder}",
        f"look:   python -m eit_lab.report {run.folder}",
        f"again:  python -m eit_lab.evaluate run={run.folder}",
        "resume: nothing left to do; the same command finds this run, more epochs make another",
    ]
    return "\n".join(lines)


def _which_weights(record: dict[str, Any]) -> str:
    if record["config"]["recipe"]["select"] == "last":
        return "last epoch"
    return f"best epoch {record['best']['epoch'] + 1} on the held-out slice"


def stop_line(run: Run, argv: list[str]) -> str:
    """How to go on with a run that did not end."""
    same = shlex.join(word for word in argv if not word.startswith("run.overwrite="))  # which would start anew
    return f"resume: {Path(sys.executable).name} -m eit_lab.train {same}   (folder {run.folder})"
