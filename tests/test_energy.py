"""Energy: counters that run over, that may not be read, that vanish; added up over devices and over the parts of a run."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TINY, only_run, record_of
from eit_lab.training import energy
from eit_lab.training.energy import Energy, GpuCounter, PackageCounters, open_counter

A_STEP_J = 36  # 0.01 Wh
RANGE_UJ = 5 * A_STEP_J * 1_000_000


class FakeRanks:
    """What ``Energy`` needs of Ranks: this process's value, and what the others are to say."""

    def __init__(self, *others: Any) -> None:
        self.others = others

    def gather(self, value: Any) -> list[Any]:
        return [value, *self.others]


class FakeGpu:
    source = "nvml"

    def __init__(self, *joules: float | None, key: str = "GPU-a") -> None:
        self.key, self.joules = key, list(joules)

    def advance(self) -> float | None:
        return self.joules.pop(0)


def zone(root: Path, folder: str, name: str, microjoules: int, *, largest: int = RANGE_UJ) -> Path:
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{largest}\n")
    return path


def two_packages(root: Path) -> tuple[Path, Path]:
    """As a machine with two processors shows them, beside what must not be counted."""
    packages = zone(root, "intel-rapl:0", "package-0", 1_000_000), zone(root, "intel-rapl:1", "package-1", 2_000_000)
    zone(root, "intel-rapl:0:0", "core", 500_000)
    zone(root, "intel-rapl:0:1", "dram", 500_000)
    zone(root, "intel-rapl:2", "psys", 5_000_000)
    zone(root, "intel-rapl-mmio:0", "package-0", 1_000_000)
    (root / "intel-rapl").mkdir()
    return packages


def add(path: Path, joules: float) -> None:
    """Let a package use some energy, its counter running over at its range."""
    now = int((path / "energy_uj").read_text())
    largest = int((path / "max_energy_range_uj").read_text())
    (path / "energy_uj").write_text(f"{(now + int(joules * 1e6)) % largest}\n")


def test_packages_are_added_up_and_a_counter_that_runs_over_goes_on(tmp_path: Path) -> None:
    first, second = two_packages(tmp_path)
    counter = PackageCounters(tmp_path)
    assert counter.advance() == 0.0
    add(first, 10)
    add(second, 0.5)
    for other in ("intel-rapl:0:0", "intel-rapl:2", "intel-rapl-mmio:0"):
        add(tmp_path / other, 7)
    assert counter.advance() == 10.5
    add(first, RANGE_UJ / 1e6 - 4)  # from 11 J over the range, to 7 J
    assert int((first / "energy_uj").read_text()) == 7_000_000
    assert counter.advance() == RANGE_UJ / 1e6 - 4
    assert counter.advance() == 0.0


@pytest.mark.parametrize("wrong", ["nothing", "no package", "forbidden", "no number"])
def test_what_cannot_be_read_is_no_counter(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    if wrong == "no package":
        zone(tmp_path, "intel-rapl:0", "psys", 1)
    if wrong in ("forbidden", "no number"):
        first, _ = two_packages(tmp_path)
        assert open_counter(torch.device("cpu")) is not None
        if wrong == "no number":
            (first / "energy_uj").write_text("soon\n")
        else:
            forbid(first / "energy_uj", monkeypatch)
    assert open_counter(torch.device("cpu")) is None
    assert Energy(None, FakeRanks()).state() == {"energy_wh": None, "energy_source": "not read"}
    assert open_counter(torch.device("meta")) is None


def forbid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, and tests may run as root: the error itself."""
    read_text = Path.read_text

    def refuse(self: Path, *args: Any, **kwargs: Any) -> str:
        if self == path:
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refuse)


def test_a_counter_that_vanishes_leaves_no_number_behind(tmp_path: Path) -> None:
    first, _ = two_packages(tmp_path)
    spent = Energy(PackageCounters(tmp_path), FakeRanks())
    spent.start()
    add(first, 3600)
    assert spent.state()["energy_wh"] is not None
    shutil.rmtree(first)
    assert spent.state() == {"energy_wh": None, "energy_source": "not read"}
    two_packages(tmp_path / "again")
    later = Energy(PackageCounters(tmp_path / "again"), FakeRanks())
    later.load(spent.state())
    later.start()
    assert later.state()["energy_wh"] is None, "a part that was not read makes the whole unknown"


def test_devices_are_added_up_and_a_counter_that_processes_share_counts_once() -> None:
    host = os.uname().nodename

    def total(counter: Any, *others: Any) -> dict[str, Any]:
        spent = Energy(counter, FakeRanks(*others))
        spent.start()
        return spent.state()

    def other(key: str, joules: float | None, machine: str = host) -> Any:
        return (machine, "nvml", key), joules

    assert total(FakeGpu(99.0, 1800.0)) == {"energy_wh": 0.5, "energy_source": "nvml"}  # 99 J were before the start
    assert total(FakeGpu(0.0, 1800.0), other("GPU-b", 1800.0))["energy_wh"] == 1.0
    assert total(FakeGpu(0.0, 1800.0), other("GPU-a", 1800.0, "node2"))["energy_wh"] == 1.0
    assert total(FakeGpu(0.0, 1800.0), other("GPU-a", 1800.0))["energy_wh"] == 0.5
    assert total(FakeGpu(0.0, 1800.0), other("GPU-b", None))["energy_wh"] is None
    assert total(FakeGpu(0.0, 1800.0), (None, None))["energy_wh"] is None
    assert total(FakeGpu(None, 5.0))["energy_wh"] is None


def test_a_run_that_goes_on_elsewhere_has_the_sum_and_both_sources() -> None:
    first = Energy(FakeGpu(0.0, 3600.0, 3600.0), FakeRanks())
    first.start()
    first.stop()
    assert first.state()["energy_wh"] == 1.0, "stopped: the counter is not read again"
    second = Energy(FakeGpu(0.0, 360.0), FakeRanks())
    second._counter.source = "rapl"  # type: ignore[union-attr,misc,assignment]
    second.load(first.state())
    second.start()
    assert second.state() == {"energy_wh": 1.1, "energy_source": "nvml+rapl"}


def test_a_long_epoch_is_read_before_its_counter_runs_over(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("eit_lab.training.energy.time.monotonic", lambda: now[0])
    gpu = FakeGpu(0.0, 7.0, 9.0)
    spent = Energy(gpu, FakeRanks())
    spent.keep_up()
    spent.start()
    for now[0] in (5.0, 10.0, 20.0):
        spent.keep_up()
    assert gpu.joules == [7.0, 9.0], "not at every step"
    now[0] = 21.0
    spent.keep_up()
    assert gpu.joules == [9.0]


FAKE_NVML = """
#include <string.h>
static unsigned long long count = 5000;
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) { *handle = &count; return strcmp(uuid, "GPU-a") ? 6 : 0; }
int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *mj) {
    unsigned long long *at = handle;
    if (*at > 20000) return 3;
    *mj = *at; *at += 2500;
    return 0;
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler for the stand-in of the driver's library")
def test_the_drivers_library_is_called_as_it_is_declared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, library = tmp_path / "nvml.c", tmp_path / "libnvidia-ml.so.1"
    source.write_text(FAKE_NVML)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True, timeout=60)
    counter = GpuCounter("GPU-a", library=str(library))
    assert [counter.advance() for _ in range(7)] == [2.5, 2.5, 2.5, 2.5, 2.5, 2.5, None]
    with pytest.raises(OSError, match="has no energy counter of GPU-b"):
        GpuCounter("GPU-b", library=str(library))
    with pytest.raises(OSError, match="not-there"):
        GpuCounter("GPU-a", library="libnot-there.so.1")


def test_a_run_that_is_stopped_and_goes_on_counts_each_steps_energy_once_and_its_hours_grow(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eit_lab.train import main
    from eit_lab.training.module import Classifier

    first, _ = two_packages(here / "powercap")
    monkeypatch.setattr(energy, "POWERCAP", here / "powercap")
    training_step, sent = Classifier.training_step, []

    def spend(self: Classifier, *args: Any) -> torch.Tensor:
        add(first, A_STEP_J)
        if self.trainer.global_step == 4 and not sent:  # in the second of two epochs of three steps
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return training_step(self, *args)

    monkeypatch.setattr(Classifier, "training_step", spend)
    words = (*TINY, "trainer.log_every_n_steps=1", "run.root=runs")
    assert main(words) == 75
    folder = only_run(here / "runs")
    before = record_of(folder)
    assert before["energy_wh"] == pytest.approx(0.03), "of the validated epoch"
    add(first, 77)  # while the run rests
    assert main(words) == 0
    record = record_of(folder)
    assert record["steps"] == 6
    assert record["energy_wh"] == pytest.approx(0.06)
    assert record["energy_source"] == "rapl"
    with (folder / "metrics.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [(row["step"], float(row["perf/energy_wh"])) for row in rows if row["val/acc1"]] == [
        ("3", pytest.approx(0.03)),
        ("6", pytest.approx(0.06)),
    ]
    hours = [float(row["perf/hours"]) for row in rows]
    assert len(hours) == 6
    assert hours == sorted(set(hours))
    assert 0 < before["hours"] < record["hours"] == hours[-1]
    assert record["hours"] < record["device_hours"], "validation and checkpoints are in the one and not in the other"
