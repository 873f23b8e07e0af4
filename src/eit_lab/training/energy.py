"""What the training devices take, in watt-hours, where the machine lets it be read.

GPUs: the driver's counter of each GPU's energy (NVML, nvmlDeviceGetTotalEnergyConsumption, from Volta on). CPU runs: the RAPL
counters of the processor packages under /sys/class/powercap, which are the whole machine's, whatever else runs on it; memory
and the rest of the machine are not in them. A GPU run counts its GPUs only. What cannot be read is None, never an estimate.
"""

from __future__ import annotations

import ctypes
import socket
import time
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from eit_lab.training.ranks import Ranks

NOT_READ = "not read"
POWERCAP = Path("/sys/class/powercap")
_NVML = "libnvidia-ml.so.1"
_JOULES_PER_WH = 3600.0
_SAMPLE_S = 20.0  # a package's counter runs over after some 20 minutes at 200 W, which only a reading in time notices
_PACKAGE = "package-"  # a domain's name; "psys", "core", "dram" and the like overlap with it or are not the processor


class Counter(Protocol):
    """An energy counter of a device."""

    @property
    def source(self) -> Literal["nvml", "rapl"]:
        """Whose counter it is."""
        ...

    @property
    def key(self) -> str:
        """Of the device on this machine: processes that read the same counter give the same key."""
        ...

    def advance(self) -> float | None:
        """Joules since the last call, or since the counter was opened; None where it cannot be read any more."""
        ...


class PackageCounters:
    """RAPL: the processor packages of this machine. Raises OSError or ValueError where one of them cannot be read."""

    source: Literal["rapl"] = "rapl"
    key = "packages"

    def __init__(self, root: Path = POWERCAP) -> None:
        # Packages are the top level of the control type; intel-rapl-mmio shows the same counters a second time.
        zones = sorted(root.glob("intel-rapl:*"))
        zones = [zone for zone in zones if zone.name.count(":") == 1]
        self._zones = [zone for zone in zones if (zone / "name").read_text().startswith(_PACKAGE)]
        if not self._zones:
            raise FileNotFoundError(f"{root} has no processor package")
        self._ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in self._zones]
        self._last = self._read()

    def _read(self) -> list[int]:
        return [int((zone / "energy_uj").read_text()) for zone in self._zones]

    def advance(self) -> float | None:
        try:
            now = self._read()
        except (OSError, ValueError):
            return None
        spent = 0
        for value, before, largest in zip(now, self._last, self._ranges, strict=True):
            spent += value - before if value >= before else value + largest - before
        self._last = now
        return spent / 1e6


class GpuCounter:
    """NVML: one GPU. Raises OSError where the driver's library or the counter is not there."""

    source: Literal["nvml"] = "nvml"

    def __init__(self, uuid: str, *, library: str = _NVML) -> None:
        self.key = uuid
        self._nvml = ctypes.CDLL(library)
        self._handle = ctypes.c_void_p()
        found = self._nvml.nvmlInit_v2() == 0 and (
            self._nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(self._handle)) == 0
        )
        first = self._read() if found else None
        if first is None:
            raise OSError(f"{library} has no energy counter of {uuid}")
        self._last = first

    def _read(self) -> int | None:
        millijoules = ctypes.c_ulonglong()
        status = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(millijoules))
        return None if status else millijoules.value

    def advance(self) -> float | None:
        now = self._read()
        if now is None or now < self._last:  # it counts from the driver's start: less than before is another count
            return None
        spent, self._last = now - self._last, now
        return spent / 1e3


def open_counter(device: torch.device) -> Counter | None:
    """The counter of this process's training device; None where there is none, or none that may be read."""
    try:
        match device.type:
            case "cuda":
                # A slice of a GPU (MIG) has a UUID that NVML does not know as a GPU's: no counter, rather than the whole GPU's.
                return GpuCounter(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            case "cpu":
                return PackageCounters(POWERCAP)
    except (OSError, ValueError, AttributeError):  # AttributeError: a library or a build of torch that is too old
        return None
    return None


class Energy:
    """Energy of all devices of a run while it trains, over all parts of the run and all its processes.

    Between ``start`` and ``stop``: training, validation and checkpoints, as device_hours. What a part that was killed took
    after its last checkpoint is not in it, as little as its steps are in the run.
    """

    def __init__(self, counter: Counter | None, ranks: Ranks) -> None:
        self._counter, self._ranks = counter, ranks
        self._earlier: float | None = 0.0
        """Watt-hours of the parts before this one, of all devices; None where one of them was not read."""
        self._sources: set[str] = set()
        self._joules: float | None = None
        """Of this process's device in this part."""
        self._sampled_at: float | None = None

    def start(self) -> None:
        """Count from here."""
        if self._counter is not None:
            self._joules = None if self._counter.advance() is None else 0.0
        self._sampled_at = time.monotonic()

    def stop(self) -> None:
        """Count to here, and no further."""
        self._sample()
        self._sampled_at = None

    def keep_up(self) -> None:
        """Read the counter now and then, so that none runs over unseen; call it often, it mostly does nothing."""
        if self._sampled_at is not None and time.monotonic() - self._sampled_at > _SAMPLE_S:
            self._sample()

    def _sample(self) -> None:
        if self._sampled_at is None:
            return
        self._sampled_at = time.monotonic()
        if self._counter is not None and self._joules is not None:
            spent = self._counter.advance()
            self._joules = None if spent is None else self._joules + spent

    def state(self) -> dict[str, Any]:
        """energy_wh (None where any part or device was not read) and energy_source so far. All ranks must call."""
        self._sample()
        key = None if self._counter is None else (socket.gethostname(), self._counter.source, self._counter.key)
        readings = self._ranks.gather((key, self._joules))
        sources = self._sources | {key[1] for key, _ in readings if key is not None}
        joules = dict(readings)  # processes that share a counter count once
        if self._earlier is None or None in joules or None in joules.values():
            return {"energy_wh": None, "energy_source": NOT_READ}
        spent = self._earlier + sum(joules.values()) / _JOULES_PER_WH
        return {"energy_wh": spent, "energy_source": "+".join(sorted(sources))}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from an earlier part's ``state``."""
        self._earlier = state["energy_wh"]
        self._sources = set() if self._earlier is None else set(state["energy_source"].split("+"))
