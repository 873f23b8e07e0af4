"""The look at a sweep before it starts: are its arms to be compared, what does each cost, is that within the budget?

Refused, with the list: arms that differ beyond the declared factor (fairness.py). Shown: parameters, MACs, training speed,
device-hours and disk of each arm. Over the budget it asks, where somebody is there to answer; else it refuses.

Device-hours are those of training alone: images to train on over the images per second of one device. Evaluation, which the
speed does not know, comes on top; so does waiting for data where the loader is slower than the device.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import socket
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from eit_lab.command import RunError
from eit_lab.config import Config, ConfigError
from eit_lab.loading import dump
from eit_lab.plan import plan
from eit_lab.processes import count_cores, visible_gpus
from eit_lab.runs import DataFacts, code_hash, read_record, run_name, write_text
from eit_lab.sweep.arms import Sweep
from eit_lab.sweep.fairness import compare_arms
from eit_lab.sweep.probe import Probe
from eit_lab.sweep.table import text_table
from eit_lab.units import si

_SPEED_S = 1.0  # of measuring one arm
_ALL_S = 60.0  # of measuring, and of counting, all arms
_RECORDS = 3  # of an arm's finished runs that are asked how fast they were
_ROWS = 40
_MEASURED = "measured, "
_ADAM_STATES = 2
_BYTES = {"bf16-true": 2, "16-true": 2, "64-true": 8}  # of a weight; 4 for any other precision
_STATE_BYTES = 100_000  # of a checkpoint beside its weights: random states, loops, names of parameters
_PREDICTION_BYTES = 36  # of one test image: index, label, predicted, predicted_ema as int64, loss as float32


@dataclasses.dataclass(kw_only=True)
class ArmCost:
    """What the guard knows of one arm."""

    arm: str
    seeds: list[int]
    waiting: int
    """Jobs still to do."""
    params: int | None
    macs: int | None
    img_per_s: float | None = None
    """Training images per second of one device."""
    source: str = ""
    """Where the speed is from, or why there is none."""
    device_hours: float | None = None
    """Of the jobs still to do."""
    at_most: bool = False
    """The speed is one without torch.compile, which the jobs train with: they need fewer hours, nobody knows how many."""
    disk_bytes: int | None = None
    """Of all its runs, at most."""


def guard(
    sweep: Sweep,
    *,
    folder: Path,
    facts: Sequence[DataFacts],
    identities: Sequence[str],
    finished: Collection[str],
    threads: int | None = None,
    probe: Probe | None = None,
) -> list[ArmCost]:
    """Look at a sweep; returns what each arm costs, and keeps it in ``guard.json`` in the sweep's ``folder``.

    ``facts`` and ``identities`` are those of the points, in their order; ``finished`` the identities of runs that are done;
    ``threads`` the CPU threads that a job will have, None for what torch takes by itself.
    Raises ConfigError where arms are not to be compared, or cost more than the budget and nobody says yes.
    """
    compare_arms(sweep, facts)
    if probe is None:
        with Probe() as probe:
            return guard(
                sweep,
                folder=folder,
                facts=facts,
                identities=identities,
                finished=finished,
                threads=threads,
                probe=probe,
            )
    look = _Look(
        sweep, folder=folder, facts=facts, identities=identities, finished=finished, threads=threads, probe=probe
    )
    arms = look.costs()
    print(look.table(arms))
    look.hold_against_budget(arms)
    look.keep(arms)
    return arms


class _Look:
    """One look of the guard."""

    def __init__(
        self,
        sweep: Sweep,
        *,
        folder: Path,
        facts: Sequence[DataFacts],
        identities: Sequence[str],
        finished: Collection[str],
        threads: int | None,
        probe: Probe,
    ) -> None:
        self.sweep, self.folder, self.facts, self.identities = sweep, folder, facts, identities
        self.finished, self.threads, self.probe = finished, threads, probe
        self.speeds = _kept_speeds(folder)
        """Key of what a speed depends on -> what was measured."""
        self._measured_s = self._counted_s = 0.0

    def costs(self) -> list[ArmCost]:
        """What each arm costs."""
        arms = [self._cost(arm, places) for arm, places in self.sweep.arms().items()]
        for arm, places in zip(arms, self.sweep.arms().values(), strict=True):
            if arm.waiting:
                arm.img_per_s, arm.source = self._speed(places)
                arm.at_most = arm.source.startswith(_MEASURED) and self._compiles(arm, places[0])
                arm.source += ", not compiled" if arm.at_most else ""
                images = sum(self._images(place) for place in places if self.identities[place] not in self.finished)
                arm.device_hours = images / arm.img_per_s / 3600 if arm.img_per_s else None
            else:
                arm.source, arm.device_hours = "finished", 0.0
        return arms

    def _cost(self, arm: str, places: Sequence[int]) -> ArmCost:
        config, facts = self.sweep.points[places[0]].config, self.facts[places[0]]
        cost: Mapping[str, int] = {}
        if self._counted_s < _ALL_S:
            began = time.monotonic()
            cost = self.probe.cost(config, num_classes=facts.num_classes)
            self._counted_s += time.monotonic() - began
        params = cost.get("params")
        return ArmCost(
            arm=arm,
            seeds=sorted({self.sweep.points[place].config.seed for place in places}),
            waiting=sum(self.identities[place] not in self.finished for place in places),
            params=params,
            macs=cost.get("macs"),
            disk_bytes=None if params is None else len(places) * disk_bytes(config, facts, params=params),
        )

    def _compiles(self, arm: ArmCost, place: int) -> bool:
        """Whether the jobs will train with torch.compile, on such a device as was measured."""
        config = self.sweep.points[place].config
        if config.trainer.compile != "auto":
            return config.trainer.compile
        on_cpu = arm.source.startswith(f"{_MEASURED}cpu")
        return not on_cpu and arm.macs is not None and plan(config, self.facts[place]).compile_pays(arm.macs)

    def _images(self, place: int) -> int:
        counts = plan(self.sweep.points[place].config, self.facts[place])
        return counts.images(counts.total_steps)

    # ------------------------------------------------------------------------------------------------------------- speed

    def _speed(self, places: Sequence[int]) -> tuple[float | None, str]:
        """(training images per second of one device or None, where from or why not)."""
        told = [speed for place in self._some_finished(places) if (speed := self._recorded(place)) is not None]
        if told:
            return sum(told) / len(told), "its finished runs"
        config, facts = self.sweep.points[places[0]].config, self.facts[places[0]]
        key = self._key(config, facts)
        known = self.speeds.get(key)
        if known is None:
            why_not = self._why_not()
            if why_not:
                return None, f"not measured: {why_not}"
            known = self._measure(config, facts)
            if known.get("img_per_s"):
                self.speeds[key] = known
        if not known.get("img_per_s"):
            return None, f"not measured: {known['error']}"
        return float(known["img_per_s"]), f"{_MEASURED}{known['device']}"

    def _some_finished(self, places: Sequence[int]) -> list[int]:
        return [place for place in places if self.identities[place] in self.finished][:_RECORDS]

    def _recorded(self, place: int) -> float | None:
        config = self.sweep.points[place].config
        record = read_record(Path(config.run.root) / run_name(config, self.identities[place])) or {}
        speed, placement = record.get("img_per_s"), record.get("placement") or {}
        return float(speed) / int(placement.get("world_size", 1)) if speed else None

    def _why_not(self) -> str:
        wanted = self.sweep.options.guard.speed_s
        if wanted == 0:
            return "guard.speed_s=0"
        if wanted is None and self.sweep.launcher.get("kind") == "slurm":
            return "this is not the cluster's device"
        return f"{_ALL_S:.0f} s of measuring are over" if self._measured_s > _ALL_S * max(1.0, wanted or 0.0) else ""

    def _measure(self, config: Config, facts: DataFacts) -> dict[str, Any]:
        seconds = self.sweep.options.guard.speed_s or _SPEED_S
        began = time.monotonic()
        try:
            return self.probe.speed(
                config, num_classes=facts.num_classes, seconds=seconds, threads=self.threads, within_s=20 * seconds
            )
        except RunError as error:
            return {"error": str(error)}
        finally:
            self._measured_s += time.monotonic() - began

    def _key(self, config: Config, facts: DataFacts) -> str:
        """What a speed depends on: model, images, what a step does, and where."""
        recipe, trainer = config.recipe, config.trainer
        what = [
            dump(config.model), facts.num_classes, dump(config.data)["img_size"], config.data.in_chans, recipe.batch_size,
            recipe.mixes, recipe.random_erasing_prob, recipe.ema_decay is None, trainer.precision, trainer.accelerator,
            trainer.micro_batch_size, trainer.accumulate_grad_batches, str(trainer.devices), trainer.num_nodes, trainer.activation_checkpointing,
            socket.gethostname(), visible_gpus(), self.threads or count_cores(), code_hash(),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]

    # ------------------------------------------------------------------------------------------------- what is said of it

    def table(self, arms: Sequence[ArmCost]) -> str:
        """The arms, and what they cost in all."""
        rows = [
            (
                arm.arm,
                _range(arm.seeds),
                "-" if arm.params is None else f"{arm.params:,}",
                "-" if arm.macs is None else si(arm.macs),
                "-"
                if arm.img_per_s is None
                else f"{arm.img_per_s:,.3g}"
                if arm.img_per_s < 100
                else f"{arm.img_per_s:,.0f}",
                ("< " if arm.at_most else "") + _hours(arm.device_hours),
                "-" if arm.disk_bytes is None else _size(arm.disk_bytes),
                arm.source,
            )
            for arm in arms[:_ROWS]
        ]
        head = ("arm", "seeds", "parameters", "MACs", "images/s", "device-hours", "disk", "speed from")
        lines = [text_table(head, rows, left=(0, len(head) - 1))]
        if len(arms) > _ROWS:
            lines.append(f"... and {len(arms) - _ROWS} arms more")
        jobs, waiting = len(self.sweep.points), sum(arm.waiting for arm in arms)
        limit, hours, disk = self.sweep.declaration.budget, device_hours(arms), disk_of(arms)
        free = self._free_bytes()
        unknown, bounded = sum(arm.device_hours is None for arm in arms), sum(arm.at_most for arm in arms)
        if bounded and unknown:  # neither at least nor at most
            hours = device_hours([arm for arm in arms if not arm.at_most])
        parts = [
            f"{waiting} of {jobs} jobs to do",
            ("" if not unknown else "at least " if hours else "unknown ")
            + ("fewer than " if bounded and not unknown else "")
            + (f"{_hours(hours)} " if hours or not unknown else "")
            + f"device-hours{_of(limit.device_hours, '')}",
            f"{_size(disk)} on disk at most{_of(limit.disk_gb, ' GB')}, {_size(free)} free",
        ]
        lines.append("in all: " + "; ".join(parts))
        if disk > free:
            lines.append("that may be more than is free on that disk")
        if unknown and limit.device_hours is not None:
            lines.append(
                f"budget.device_hours={limit.device_hours:g} says nothing of {unknown} of the arms: their speed is not known"
            )
        if bounded and limit.device_hours is not None and hours > limit.device_hours:
            lines.append(
                f"budget.device_hours={limit.device_hours:g} is not held against {bounded} of the arms: they train with "
                "torch.compile, and were measured without"
            )
        return "\n".join(lines)

    def hold_against_budget(self, arms: Sequence[ArmCost]) -> None:
        """Ask or refuse where the budget is too small; refuse where the disk is."""
        limit, disk = self.sweep.declaration.budget, disk_of(arms)
        hours = device_hours([arm for arm in arms if not arm.at_most])
        over = []
        if limit.device_hours is not None and hours > limit.device_hours:
            over.append(f"{_hours(hours)} device-hours, and budget.device_hours is {limit.device_hours:g}")
        if limit.disk_gb is not None and disk > limit.disk_gb * 1e9:
            over.append(f"{_size(disk)} on disk, and budget.disk_gb is {limit.disk_gb:g}")
        if not over or self.sweep.options.yes:
            return
        said = f"guard: {self.sweep.id} would take {'; '.join(over)}"
        if sys.stdin.isatty() and sys.stdout.isatty():
            print(f"{said}\ngo on? [y/N] ", end="", flush=True)
            if sys.stdin.readline().strip().lower() in ("y", "yes"):
                return
            raise ConfigError(f"{said}; not started")
        raise ConfigError(f"{said}; raise the budget, or yes=true goes on")

    def _free_bytes(self) -> int:
        place = self.folder.absolute()
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free

    def keep(self, arms: Sequence[ArmCost]) -> None:
        """guard.json: what was found, and the speeds that were measured."""
        plain = {
            "arms": [dataclasses.asdict(arm) for arm in arms],
            "device_hours": device_hours(arms),
            "disk_bytes": disk_of(arms),
            "budget": dump(self.sweep.declaration.budget),
            "speeds": self.speeds,
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / "guard.json", json.dumps(plain, indent=1) + "\n")
        except OSError as error:
            raise ConfigError(
                f"run.root must be a folder that can be written, got {str(self.folder.parents[1])!r}: {error.strerror}"
            ) from None


def disk_bytes(config: Config, facts: DataFacts, *, params: int) -> int:
    """Bytes of one run's folder, at most: its checkpoints (whole states), and what it said of every test image."""
    copies = 1 + _ADAM_STATES + (config.recipe.ema_decay is not None)
    state = params * copies * _BYTES.get(config.trainer.precision, 4) + _STATE_BYTES
    files = 3 + min(config.trainer.keep_epochs, plan(config, facts).epochs)  # best, last, previous
    return files * state + facts.num_test * _PREDICTION_BYTES


def device_hours(arms: Sequence[ArmCost]) -> float:
    """Of all arms whose speed is known."""
    return sum(arm.device_hours for arm in arms if arm.device_hours is not None)


def disk_of(arms: Sequence[ArmCost]) -> int:
    """Bytes of all arms that were counted."""
    return sum(arm.disk_bytes for arm in arms if arm.disk_bytes is not None)


def _kept_speeds(folder: Path) -> dict[str, Any]:
    """The speeds in an earlier ``guard.json``; none where it is damaged, for it can be measured again."""
    try:
        speeds = json.loads((folder / "guard.json").read_text())["speeds"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return dict(speeds) if isinstance(speeds, dict) else {}


def _range(seeds: Sequence[int]) -> str:
    """Seeds as one would type them: 0,1,2 or 0..99."""
    if len(seeds) > 5 and seeds[-1] - seeds[0] == len(seeds) - 1:
        return f"{seeds[0]}..{seeds[-1]}"
    return ",".join(map(str, seeds)) if len(seeds) <= 5 else f"{len(seeds)} seeds"


def _hours(hours: float | None) -> str:
    return "-" if hours is None else f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def _size(count: float) -> str:
    return f"{si(count, digits=1)}B"


def _of(limit: float | None, unit: str) -> str:
    return "" if limit is None else f" (budget {limit:g}{unit})"
