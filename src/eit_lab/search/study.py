"""Optuna's part: which point comes next, which trial is stopped early, and the storage that says what all were worth.

Storage is a file that is only ever added to (JournalStorage): no server, and it works on file systems that machines share.
Every trial is drawn with a seed of its own, a hash of the sampler's seed and the trial's number, and arms have the same
seeds. So a search that was stopped and goes on draws what it would have drawn, and the random trials of all arms are the
same points.

NOTE. A trial that diverged is told as pruned: Optuna ranks it below every finished one and keeps away, where a failed trial
would tell it nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eit_lab.config import ConfigError
from eit_lab.search.request import Request
from eit_lab.search.space import Arm, Axis, Value

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import JournalStorage
    from optuna.trial import FrozenTrial

JOURNAL = "optuna.log"
ENDED, RETRY_OF, _IMPOSSIBLE = "ended", "retry_of", "impossible: "
"""Attributes of a trial: how it ended in our words, and which failed trial it does again."""


def import_optuna() -> None:
    """Load Optuna, quiet. Raises ConfigError where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise ConfigError("search needs Optuna: pip install 'eit_lab[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def distribution(axis: Axis) -> BaseDistribution:
    """An axis in Optuna's words."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    match axis.kind:
        case "choice":
            return CategoricalDistribution(axis.choices)
        case "int":
            return IntDistribution(int(axis.low), int(axis.high), log=axis.log, step=int(axis.step or 1))
        case "float":
            return FloatDistribution(axis.low, axis.high, log=axis.log, step=axis.step)


def open_storage(folder: Path) -> JournalStorage:
    """The storage of a search's folder. Call inside its lock: a line that a full disk cut short is taken off."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = folder / JOURNAL
    if path.is_file() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        with path.open("r+b") as handle:
            handle.truncate(content.rfind(b"\n") + 1)
    return JournalStorage(JournalFileBackend(str(path)))


class ArmStudy:
    """The study of one arm."""

    def __init__(self, request: Request, arm: Arm, storage: JournalStorage, *, name: str) -> None:
        import optuna

        self.request, self.arm = request, arm
        self._storage = storage
        self._distributions = {axis.key: distribution(axis) for axis in request.space.axes}
        self._pruner = _pruner(request)
        self._study: Study = optuna.create_study(
            storage=storage,
            study_name=arm.label or name,
            direction="maximize" if request.options.maximize else "minimize",
            pruner=self._pruner,
            load_if_exists=True,
        )
        self._study_id = storage.get_study_id_from_name(self._study.study_name)

    # ------------------------------------------------------------------------------------------------------- what there is

    def trials(self) -> list[FrozenTrial]:
        """Every trial so far, by number."""
        return self._study.get_trials(deepcopy=False)

    def trial(self, number: int) -> FrozenTrial:
        """One of them, as it is now."""
        return self._storage.get_trial(self._id(number))

    def counted(self) -> int:
        """Trials that count: a failed one that is done again does not, nor does a point that is not possible.

        A grid has only so many points: there the impossible ones count too.
        """
        trials = self.trials()
        again = {trial.user_attrs.get(RETRY_OF) for trial in trials}
        grid = self.request.options.sampler == "grid"
        return sum(trial.number not in again and (grid or not is_impossible(trial)) for trial in trials)

    def is_waiting(self) -> bool:
        """Whether a failed trial waits to be done again."""
        return any(trial.state.name == "WAITING" for trial in self.trials())

    # -------------------------------------------------------------------------------------------------------- what is told

    def ask(self) -> tuple[int, dict[str, Value]]:
        """The next trial: its number and its values. Call inside the search's lock."""
        number = len(self.trials())
        self._study.sampler = _sampler(self.request, number)
        if self.request.options.sampler == "grid" and not self.is_waiting():
            self._study.enqueue_trial(self._next_of_grid())
        with warnings.catch_warnings():  # of arguments that are experimental
            warnings.simplefilter("ignore")
            trial = self._study.ask(self._distributions)
        return trial.number, dict(trial.params)

    def retry(self, failed: FrozenTrial) -> None:
        """Let a failed trial be asked for again. Call inside the search's lock."""
        self._study.enqueue_trial(dict(failed.params), user_attrs={RETRY_OF: failed.number})

    def note(self, number: int, key: str, value: Any) -> None:
        """An attribute of a running trial."""
        self._storage.set_trial_user_attr(self._id(number), key, value)

    def report(self, number: int, epoch: int, value: float) -> None:
        """The objective of a running trial after so many epochs."""
        self._storage.set_trial_intermediate_value(self._id(number), epoch, value)

    def should_prune(self, number: int) -> bool:
        """Whether a running trial is to be stopped, by what was reported of it and of the others."""
        return self._pruner.prune(self._study, self.trial(number))

    def finish(self, number: int, value: float) -> None:
        """A trial's value."""
        self._study.tell(number, value, skip_if_finished=True)

    def give_up(self, number: int, why: str, *, pruned: bool) -> None:
        """A trial without a value: pruned or diverged, which says something of its point, or failed, which does not."""
        from optuna.trial import TrialState

        if self.trial(number).state.is_finished():
            return
        self.note(number, ENDED, why)
        self._study.tell(number, state=TrialState.PRUNED if pruned else TrialState.FAIL, skip_if_finished=True)

    def refuse(self, number: int, why: str) -> None:
        """A point that makes no valid config."""
        self.give_up(number, f"{_IMPOSSIBLE}{why}", pruned=False)

    def importances(self) -> dict[str, float]:
        """How much of the spread of the values each axis explains, summing to 1; empty where nothing can be said."""
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

        values = {trial.value for trial in self.trials() if trial.state.name == "COMPLETE"}
        if len(values) < 4:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return get_param_importances(self._study, evaluator=PedAnovaImportanceEvaluator())

    def _id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)

    def _next_of_grid(self) -> dict[str, Value]:
        """The first point of the grid that no trial has, in an order that the sampler's seed shuffles."""
        axes = self.request.space.axes
        points = list(itertools.product(*(axis.values() or () for axis in axes)))
        random.Random(self.request.options.sampler_seed).shuffle(points)
        taken = {tuple(trial.params[axis.key] for axis in axes) for trial in self.trials() if trial.params}
        free = next(point for point in points if point not in taken)
        return {axis.key: value for axis, value in zip(axes, free, strict=True)}


def ended(trial: FrozenTrial) -> str:
    """How a trial that has no value ended, in our words."""
    return str(trial.user_attrs.get(ENDED, ""))


def is_impossible(trial: FrozenTrial) -> bool:
    """Whether the values of a trial make no valid config."""
    return ended(trial).startswith(_IMPOSSIBLE)


def _sampler(request: Request, number: int) -> BaseSampler:
    from optuna.samplers import RandomSampler, TPESampler

    digest = hashlib.sha256(f"{request.options.sampler_seed}:{number}".encode()).digest()
    seed = int.from_bytes(digest[:4], "big")
    if request.options.sampler == "tpe":
        return TPESampler(seed=seed, n_startup_trials=request.options.startup)
    return RandomSampler(seed=seed)


def _pruner(request: Request) -> BasePruner:
    from optuna.pruners import HyperbandPruner, MedianPruner, NopPruner

    first = request.prune_after
    match request.options.pruner:
        case "median":
            return MedianPruner(n_startup_trials=5, n_warmup_steps=first)
        case "hyperband":
            assert request.epochs is not None, "checked when the command was read"
            return HyperbandPruner(min_resource=first, max_resource=request.epochs, reduction_factor=3)
        case "none":
            return NopPruner()


def describe(request: Request) -> Mapping[str, Any]:
    """What must not change in the life of a search: its trials would not be comparable."""
    o, space = request.options, request.space
    return {
        "space": [axis.describe() for axis in space.axes],
        "arms": {arm.label: list(arm.overrides) for arm in space.arms},
        "seeds": list(space.seeds),
        "objective": o.objective,
        "at": request.at,
        "direction": "maximize" if o.maximize else "minimize",
        "sampler": [o.sampler, o.sampler_seed, o.startup if o.sampler == "tpe" else None],
        "pruner": [o.pruner, request.prune_after if o.pruner != "none" else None],
    }
