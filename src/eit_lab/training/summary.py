"""What a run says: a few lines before the first step, a few after the last, and how to go on."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from eit_lab import published
from eit_lab.config import AnyModelConfig, Config, TimmConfig
from eit_lab.models.cost import Cost
from eit_lab.plan import Plan
from eit_lab.runs import DataFacts, Run
from eit_lab.training import inside
from eit_lab.units import si


def summary(
    config: Config,
    facts: DataFacts,
    run: Run,
    cost: Cost,
    plan: Plan,
    placement: dict[str, Any],
    *,
    batch_norm: bool,
    from_notes: Sequence[str] = (),
    data_notes: Sequence[str] = (),
    inside_note: str = "",
    compile_note: str = "",
) -> str:
    """Model, data and cost in a few lines, before the first step; notes of the weights it starts from, of the data, the inside
    and of how the model is run.

    ``batch_norm``: whether the model has any.
    """
    data, recipe = config.data, config.recipe
    images = plan.images(plan.total_steps)
    norm = "; batch norm over " + _normed(placement, plan) if batch_norm else ""
    rows = [
        *_model_rows(config.model, cost, norm),
        ("cost", f"{cost.params:,} parameters; {si(cost.macs, digits=3)} MACs an image ({si(cost.macs_thop, digits=3)} as thop counts)"),
        ("data", f"{data.name}: {facts.num_train:,} train, {facts.num_val:,} held out of train, {facts.num_test:,} test; "
                 f"{facts.num_classes} classes; {_size(data.img_size)} px"),
        *(("", note) for note in data_notes),
        ("recipe", f"{recipe.name}: {plan.total_steps:,} steps of {recipe.batch_size} images ({images / facts.num_train:.3g} epochs), "
                   f"peak learning rate {recipe.lr:g}; {si(3 * cost.macs * images)} MACs in all"),
        ("on", f"{placement['world_size']} x {placement['device']}, {placement['precision']}, "
               f"{plan.micro_batch} images a device and micro-batch, {plan.accumulate} micro-batch{'es' * (plan.accumulate > 1)} a step"),
        *([("", f"attention by the kernels of {placement['attention']}")] if "(" in placement["attention"] else []),
        *([("", compile_note + _recomputed(config))] if compile_note else []),
        *(("from", note) for note in from_notes),
        *([("inside", inside_note)] if inside_note else []),
        ("run", f"{run.folder}  ({'resumed' if run.state == 'resume' else 'new'}, seed {config.seed})"),
    ]  # fmt: skip
    return "\n".join(f"{name:>7}  {text}" for name, text in rows)


def _recomputed(config: Config) -> str:
    return "; the backward pass computes blocks anew" if config.trainer.activation_checkpointing == "blocks" else ""


def _model_rows(model: AnyModelConfig, cost: Cost, norm: str) -> Iterator[tuple[str, str]]:
    if isinstance(model, TimmConfig):
        name = "" if model.name == model.timm_name else f"{model.name}: "
        yield "model", f"{name}{model.timm_name} of timm{norm}"
        return
    h, w = cost.grid
    size, ib = model.size, model.ib
    yield (
        "model",
        (
            f"{model.name}: {size.embed_dim} wide, {size.depth} deep, {size.num_heads} heads; stem {model.stem.kind}, "
            f"{h}x{w} tokens; position embedding {model.pos_embed}{norm}"
        ),
    )
    splits = model.layer_splits()
    kind = "" if ib.conv == "depthwise" else f"{ib.conv} convolution{' behind a gate' if ib.glu else ''}, "
    attention = " ".join(str(split.attn_dim) for split in splits)
    yield "mixer", f"{ib.rule}, {kind}strength {ib.strength:g}: attention channels {attention} of {size.embed_dim}"


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a model's result depends on which images are normalised together."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def _normed(placement: dict[str, Any], plan: Plan) -> str:
    """Over how many images a batch norm takes its statistics: it depends on the devices, so it is said."""
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
    if record.get("analysis"):
        lines.append(inside.in_words(record["analysis"]))
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
