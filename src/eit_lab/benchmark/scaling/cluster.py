"""The machine that the model is of, one number a field, each with its unit and where it comes from. No torch.

Four kinds of numbers: *published* by those who make or measured the thing; *measured* by this project, read from the record of
``bench data``; *counted* in this project's code; *assumed* by us, because no source says it. A conclusion that hangs on an
assumed one is in the table of scenarios, with another value.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from eit_lab.config import ConfigError

Kind = Literal["published", "measured", "counted", "assumed"]

_NCCL = "NCCL 2.2x, src/graph/tuning.cc, protocol LL128"
_DGX = "NVIDIA DGX H100, user guide"
_H100 = "NVIDIA H100 SXM, data sheet"


def _fact(kind: Kind, unit: str, what: str, source: str, value: Any = dataclasses.MISSING) -> Any:
    facts = {"kind": kind, "unit": unit, "what": what, "source": source}
    return dataclasses.field(default=value, metadata=facts)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Machines of eight H100, joined by InfiniBand, a network card a GPU."""

    gpus_per_node: int = _fact("published", "", "GPUs of a machine", _DGX, 8)
    cores_per_node: int = _fact("published", "", "CPU cores of a machine", _DGX, 112)
    peak_flops: float = _fact("published", "FLOP/s", "dense bf16 peak of a GPU", _H100, 989e12)
    memory_bps: float = _fact("published", "B/s", "memory bandwidth of a GPU", _H100, 3.35e12)
    mfu: float = _fact(
        "published", "", "share of the peak that a large batch reaches, compiled",
        "a ViT of 22 M parameters, 224 px, batch 256, bf16, one H100: 8,003 images/s (nvSubquadratic, benchmarks)", 0.229,
    )  # fmt: skip
    op_s: float = _fact(
        "assumed",
        "s",
        "least time of an operation, however small its batch",
        "a compiled model; eager about 20e-6",
        5e-6,
    )
    host_step_s: float = _fact("assumed", "s", "Python between two steps, the GPU idle", "Lightning's loop", 1e-3)
    jitter: float = _fact("assumed", "", "spread of a rank's compute time, std over mean", "lognormal", 0.03)

    nvlink_bps: float = _fact("assumed", "B/s", "NVLink of a GPU, each way", "80% of the data sheet's 450e9", 360e9)
    nic_bps: float = _fact(
        "published", "B/s", "InfiniBand of a GPU, each way",
        "NDR 400 Gb/s: 46 to 48e9 expected by NCCL's authors (nccl-tests, issue 290)", 47e9,
    )  # fmt: skip
    protocol_share: float = _fact("published", "", "of the bandwidth that is payload", _NCCL, 120 / 128)
    collective_s: float = _fact("published", "s", "start of a collective", _NCCL, 14e-6)
    nvlink_ring_s: float = _fact("published", "s", "a hop of a ring on NVLink", _NCCL, 1.9e-6)
    nic_ring_s: float = _fact("published", "s", "a hop of a ring between machines", _NCCL, 4.0e-6)
    nvlink_tree_s: float = _fact("published", "s", "a hop of a tree on NVLink", _NCCL, 1.25e-6)
    nic_tree_s: float = _fact("published", "s", "a hop of a tree between machines", _NCCL, 8.5e-6)
    tree_chunk_bytes: int = _fact("assumed", "B", "piece in which a tree hands data on", "pipelining", 128 * 1024)

    agreements: int = _fact(
        "counted",
        "",
        "host all-reduces over gloo that a step waits for",
        "training/module.py, training/checkpoint.py",
        0,
    )
    question_s: float = _fact(
        "counted",
        "s",
        "after which a question of all hosts is looked at, which no step waits for",
        "training/ranks.py",
        0.1,
    )
    question_steps: int = _fact("counted", "steps", "after which it is looked at in any case", "training/ranks.py", 16)
    tcp_local_s: float = _fact("assumed", "s", "a hop of gloo's ring inside a machine", "loopback, two wake-ups", 25e-6)
    tcp_s: float = _fact("assumed", "s", "a hop of gloo's ring between machines", "TCP, two wake-ups", 50e-6)

    core_images_per_s: float = _fact(
        "measured", "images/s", "a loader worker, one core, the full recipe on shards", "data.json"
    )
    image_bytes: float = _fact("measured", "B", "an image in the store", "data.json")
    first_batch_s: float = _fact(
        "measured", "s", "until a loader's first batch, at the start and between epochs", "data.json"
    )
    image_spread: float = _fact(
        "assumed", "", "spread of a worker's time for one image, std over mean", "lognormal", 0.5
    )
    prefetch: int = _fact("published", "", "batches ahead of each worker", "torch DataLoader, prefetch_factor", 2)
    storage_bps: float = _fact(
        "assumed", "B/s", "shared storage, all machines together", "a parallel file system", 20e9
    )
    disk_bps: float = _fact("assumed", "B/s", "writing a checkpoint, one process", "shared disk, fsync", 1e9)
    startup_s: float = _fact("assumed", "s", "imports, process groups, compilation", "", 60.0)
    startup_rank_s: float = _fact("assumed", "s", "of that, more for each rank", "rendezvous", 0.02)

    @property
    def workers(self) -> int:
        """Loader workers of a GPU: its share of the cores, less the one of the training process itself."""
        return self.cores_per_node // self.gpus_per_node - 1

    def facts(self) -> list[dict[str, Any]]:
        """name, value, unit, kind, what and source of every number, for the record."""
        return [
            {"name": field.name, "value": getattr(self, field.name), **field.metadata}
            for field in dataclasses.fields(self)
        ]


@dataclass(frozen=True)
class Group:
    """``gpus`` ranks on whole machines, or on a part of one; ranks of a machine follow each other."""

    gpus: int
    per_node: int

    @property
    def local(self) -> int:
        """Ranks of one machine."""
        return min(self.gpus, self.per_node)

    @property
    def nodes(self) -> int:
        """Machines."""
        return self.gpus // self.local

    def __post_init__(self) -> None:
        assert self.gpus % self.local == 0, "whole machines only"


def measured_cluster(record: Path) -> Cluster:
    """The cluster with the loader's numbers from a record of ``bench data`` (data.json). Raises ConfigError."""
    try:
        content = json.loads(record.read_text())
        return Cluster(**loader_facts(content))
    except OSError as error:
        said = f"data must be a record of `bench data` (data.json), got {str(record)!r}: {error.strerror}"
    except (ValueError, LookupError, TypeError, AttributeError):
        said = f"data must be a record of `bench data` (data.json), got {str(record)!r}, which is another file"
    raise ConfigError(said)


def loader_facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the model takes from a record of ``bench data``: a worker's rate is that of one beside another."""
    facts = {
        "core_images_per_s": median(record["rates"]["shards_full_2"]) / 2,
        "image_bytes": float(record["material"]["mean_bytes"]),
        "first_batch_s": median(record["alone"]["first_batch_s"]["shards"]),
    }
    if not all(math.isfinite(value) and value > 0 for value in facts.values()):
        raise ValueError("numbers of a loader are above 0")
    return facts
