"""What this machine can check of the model: DistributedDataParallel's own buckets, and the bytes that a ring really sends.

Real processes on this machine, over gloo and the loopback, a step of each size: the buckets as DDP hands them to a communication
hook, and what the kernel counted on the processes' own TCP connections. Bytes and messages only: no times.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from eit_lab.command import RunError

_IMAGE_PX = 224  # smaller images would have another stem
_RAW_BYTES = 8 << 20
_AGREED = 2  # numbers that the hosts agree on in a step, twice: float64, int64
_TIMEOUT_S = 600
_TCP_INFO_BYTES = 160
_BYTES_RECEIVED, _DATA_SEGMENTS_OUT = struct.Struct("=Q"), struct.Struct("=I")
# Places in the kernel's struct tcp_info (include/uapi/linux/tcp.h): tcpi_bytes_received, tcpi_data_segs_out.
_BYTES_RECEIVED_AT, _DATA_SEGMENTS_OUT_AT = 128, 156


def check(sizes: Sequence[str], *, processes: int, timeout_s: float = _TIMEOUT_S) -> list[dict[str, Any]]:
    """Each rank's findings: ``buckets`` and ``ddp_bytes`` by size, ``raw_bytes`` and ``raw``, ``agreement_messages``;
    ``question_messages`` of what training/ranks.py asks, and ``asked_without_waiting``.

    Raises RunError.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", __name__, str(Path(folder) / "store"), str(processes)]
        # Without our kernel for CPUs: on a GPU gradients come as torch's own operations bring them.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "EIT_LAB_NATIVE": "0"}
        ranks = [
            subprocess.Popen(
                [*words, str(rank), *sizes], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            for rank in range(processes)
        ]
        try:
            outputs = [rank.communicate(timeout=timeout_s) for rank in ranks]
        except subprocess.TimeoutExpired:
            raise RunError(f"checking DDP's buckets on {processes} processes took more than {timeout_s:g} s") from None
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    for rank, (_, err) in zip(ranks, outputs, strict=True):
        if rank.returncode:
            last = (err.strip() or "no message").splitlines()[-1]
            raise RunError(f"checking DDP's buckets on {processes} processes failed: {last}")
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


def _main(store: str, world_size: int, rank: int, sizes: Sequence[str]) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    found: dict[str, Any] = {"buckets": {}, "ddp_bytes": {}, "raw_bytes": _RAW_BYTES}
    for size in sizes:
        found["buckets"][size], found["ddp_bytes"][size] = _step(size)
    content = torch.ones(_RAW_BYTES // 4)
    dist.all_reduce(content)  # connections are made
    dist.barrier()
    before, _ = _traffic()
    dist.all_reduce(content)
    found["raw"] = _traffic()[0] - before
    dist.barrier()
    few = torch.ones(_AGREED, dtype=torch.float64)
    dist.all_reduce(few)
    dist.barrier()
    _, before = _traffic()
    dist.all_reduce(few)
    found["agreement_messages"] = _traffic()[1] - before
    dist.barrier()
    found["question_messages"], found["asked_without_waiting"] = _question(
        rank, world_size, Path(store).with_name("asked")
    )
    dist.destroy_process_group()
    return found


def _question(rank: int, world_size: int, asked: Path) -> tuple[int, bool]:
    """(TCP segments that this rank sent for a question of the training loop, whether the first to ask did not wait for the rest)."""
    import torch.distributed as dist

    from eit_lab.training.ranks import Ranks

    class Alike(Ranks):
        """The loop's own, without a trainer."""

        def __init__(self) -> None:
            self.rank, self.world_size, self._group = rank, world_size, dist.group.WORLD

    ranks = Alike()
    ranks.ask_largest(0, 0, 0).take()
    dist.barrier()
    _, before = _traffic()
    while rank > 0 and not asked.exists():
        time.sleep(0.01)
    answer = ranks.ask_largest(rank, 0, 0)
    went_on = not answer.is_there if rank == 0 else True
    if rank == 0:  # were it waiting above, nobody else would ever ask
        asked.touch()
    largest = answer.take().tolist()
    assert largest == [world_size - 1, 0, 0]
    sent = _traffic()[1] - before
    dist.barrier()
    return sent, went_on


def _step(size: str) -> tuple[list[int], int]:
    """(bytes of each bucket in the order of their all-reduce, bytes that came meanwhile) of DDP's third step."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    from eit_lab.compose import compose_model
    from eit_lab.config import ModelConfig
    from eit_lab.models.backbone import Backbone
    from eit_lab.models.linear import Linear

    torch.manual_seed(0)
    config = compose_model(f"eit_{size}")
    assert isinstance(config, ModelConfig)
    model = Backbone(config, num_classes=1000, img_size=_IMAGE_PX)
    for module in model.modules():
        if isinstance(module, Linear):  # likewise: oneDNN's product hands over a weight's gradient before its bias's
            module.__class__ = torch.nn.Linear  # type: ignore[assignment]
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)  # as training/trainer.py does
    buckets: list[int] = []

    def note(bucket: Any) -> Any:
        buckets.append(bucket.buffer().nbytes)
        return bucket

    # NOTE: a lambda, for DDP refuses annotations that are text.
    ddp.register_comm_hook(dist.group.WORLD, lambda state, bucket: allreduce_hook(state, note(bucket)))
    images, targets = torch.zeros(1, 3, _IMAGE_PX, _IMAGE_PX), torch.zeros(1, dtype=torch.int64)
    came = 0
    for _ in range(3):  # buckets are made anew after the first, in the order of its gradients
        buckets.clear()
        dist.barrier()
        before, _ = _traffic()
        F.cross_entropy(ddp(images), targets).backward()  # type: ignore[no-untyped-call]
        came = _traffic()[0] - before
        dist.barrier()
    return list(buckets), came


def _traffic() -> tuple[int, int]:
    """(bytes received, data segments sent) so far by all TCP connections of this process, as the kernel counts them."""
    came = sent = 0
    for number in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        with suppress(OSError):  # closed meanwhile, or not connected
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            with socket.socket(fileno=os.dup(number)) as connection:
                if connection.type != socket.SOCK_STREAM or connection.family == socket.AF_UNIX:
                    continue
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
            came += _BYTES_RECEIVED.unpack_from(info, _BYTES_RECEIVED_AT)[0]
            sent += _DATA_SEGMENTS_OUT.unpack_from(info, _DATA_SEGMENTS_OUT_AT)[0]
    return came, sent


if __name__ == "__main__":
    _store, _world_size, _rank, *_sizes = sys.argv[1:]
    print(json.dumps(_main(_store, int(_world_size), int(_rank), _sizes)))
