"""Lightning's Trainer from our config: one process per device, started by us, by torchrun or by Slurm, never by Lightning."""

from __future__ import annotations

import logging
import os
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins import TorchSyncBatchNorm
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, Strategy
from torch import nn

from eit_lab.config import CUDA_GRAPH_MODES, Config, ConfigError, TimmConfig
from eit_lab.models.backbone import Block
from eit_lab.plan import Plan
from eit_lab.processes import is_slurm_rank, started_by_launcher


def build_trainer(
    config: Config,
    *,
    folder: Path,
    callbacks: list[Callback],
    logger: list[Logger],
    plan: Plan | None = None,
    plugins: list[Any] | None = None,
) -> Trainer:
    """The Trainer of a run (with its plan), or of an evaluation. ``auto`` precision is resolved for the accelerator."""
    t = config.trainer
    devices: Any = list(t.devices) if isinstance(t.devices, tuple) else t.devices
    if t.accelerator in ("auto", "cpu") and not torch.cuda.is_available() and devices in ("auto", -1):
        devices = 1
    cuda = t.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    bf16 = cuda and torch.cuda.is_bf16_supported()
    precision: Any = t.precision if t.precision != "auto" else ("bf16-mixed" if bf16 else "32-true")
    plugins = [*(plugins or []), *_environment()]
    if cuda and isinstance(config.model, TimmConfig):
        plugins.append(TimmSyncBatchNorm())
    strategy = _strategy(config, cuda=cuda)
    try:
        trainer = Trainer(
            accelerator=t.accelerator,
            devices=devices,
            num_nodes=t.num_nodes,
            strategy=strategy,
            precision=precision,
            plugins=plugins or None,
            accumulate_grad_batches=plan.accumulate if plan else 1,
            gradient_clip_val=t.gradient_clip_val,
            max_epochs=plan.epochs if plan else 1,
            max_steps=t.max_steps or -1,
            check_val_every_n_epoch=t.check_val_every_n_epoch,
            log_every_n_steps=t.log_every_n_steps,
            limit_train_batches=plan.batches_per_epoch if plan else 1.0,  # of evaluation: the data module's
            deterministic=t.deterministic,
            profiler=_build_profiler(t.profiler, folder),
            default_root_dir=folder,
            logger=logger,
            callbacks=callbacks,
            num_sanity_val_steps=0,
            enable_checkpointing=False,  # Keeper does it
            enable_progress_bar=False,
            enable_model_summary=False,
            # CUDA graphs that were recorded under inference mode cannot be used again outside (pytorch issue 135892).
            inference_mode=t.compile_mode not in CUDA_GRAPH_MODES,
            use_distributed_sampler=False,  # the data module hands each rank its own share
            sync_batchnorm=cuda,
        )
    except (
        MisconfigurationException,
        ValueError,
        ImportError,
    ) as error:  # what only the machine itself can tell, such as a missing GPU
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"trainer: Lightning refuses accelerator={t.accelerator}, devices={t.devices}: {reason}"
        ) from None
    _leave_signals_to_us(trainer)
    return trainer


def set_callbacks(trainer: Trainer, callbacks: list[Callback]) -> None:
    """Exchange a trainer's callbacks: some need to know what only the built trainer tells, such as the number of ranks."""
    cast(Any, trainer).callbacks = callbacks


def _strategy(config: Config, *, cuda: bool) -> str | Strategy:
    t = config.trainer
    timeout = timedelta(minutes=t.process_timeout_minutes)
    if t.strategy == "fsdp":
        if isinstance(config.model, TimmConfig):
            raise ConfigError("trainer.strategy must be ddp or auto with a baseline of timm, got 'fsdp'; nearest: ddp")
        if not cuda:
            raise ConfigError("trainer.strategy=fsdp needs a CUDA device, got none; nearest: ddp")
        if config.recipe.ema_decay is not None:
            raise ConfigError(
                f"recipe.ema_decay must be null with trainer.strategy=fsdp, got {config.recipe.ema_decay}; nearest: null"
            )
        return FSDPStrategy(auto_wrap_policy={Block}, state_dict_type="full", timeout=timeout)
    if t.strategy == "ddp" or started_by_launcher():
        return DDPStrategy(gradient_as_bucket_view=True, timeout=timeout)
    return "auto"


class TimmSyncBatchNorm(TorchSyncBatchNorm):
    """Batch norm over all devices, for architectures of timm.

    NOTE: some of them keep the activation inside their batch norm (BatchNormAct2d). torch's own conversion takes that for a
    plain one and loses the activation, and so does Lightning's way back after training.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        """The model with timm's own synchronised norms."""
        from timm.layers.norm_act import convert_sync_batchnorm

        return convert_sync_batchnorm(model)

    def revert(self, model: nn.Module) -> nn.Module:
        """The model as it is: outside training a synchronised norm is a plain one."""
        return model


def _environment() -> list[Any]:
    """Where the ranks come from. Slurm's requeueing is left to whoever submitted the job."""
    if "LOCAL_RANK" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        return [LightningEnvironment()]  # ours (processes.py): rank and address are in the environment
    if "TORCHELASTIC_RUN_ID" not in os.environ and is_slurm_rank():
        return [SLURMEnvironment(auto_requeue=False)]
    # Lightning takes every process inside an allocation for a rank, and warns of it wherever srun can be found.
    return [] if started_by_launcher() else [LightningEnvironment()]


def _leave_signals_to_us(trainer: Trainer) -> None:
    """Keep Lightning from taking over SIGTERM, and from asking all ranks about it before every micro-batch.

    NOTE: its handler talks to other processes from inside the handler, and its question is a broadcast that every GPU waits
    for. Keeper asks once a step, off the GPU. Both are private names: a test runs signals through real training.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def _build_profiler(name: str | None, folder: Path) -> Profiler | None:
    """Lightning's profiler, its report in the run folder: profile*.txt, or a trace for pytorch."""
    profilers = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
    return profilers[name](dirpath=folder, filename="profile") if name else None


def quiet_lightning() -> None:
    """Lightning's hints off: what they say is in our own summary, or is decided already."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        r".*isinstance\(treespec, LeafSpec\).*",
        r".*does not have many workers.*",
        r".*exists and is not empty.*",
        r".*The `srun` command is available on your system but is not used.*",  # a sweep on a cluster's node may be local
        r".*The number of training batches .* is smaller than the logging interval.*",
        r".*resuming from a checkpoint that ended before the epoch ended.*",  # the data goes on at its own place
        r"(?s).*Grad strides do not match bucket view strides.*",  # convolutions choose their own layout
        r".*callbacks used to create the checkpoint need to be provided.*",  # the final test needs none of them
        r".*It is recommended to use `self.log\(.*, sync_dist=True\)`.*",  # what is logged is a torchmetrics object
    ):
        warnings.filterwarnings("ignore", message=message)


def device_name(device: torch.device) -> str:
    """The accelerator's own name, or the CPU's threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
