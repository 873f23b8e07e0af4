"""On a CUDA device: the same program, resumed exactly, compiled, sharded. `make test-gpu` runs these."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from conftest import TINY, only_run, record_of
from eit_lab.selftest import compare

pytestmark = pytest.mark.gpu

CUDA = (*(word for word in TINY if not word.startswith("trainer.accelerator")), "trainer.accelerator=cuda", "trainer.devices=1",
        "recipe=debug", "data.num_samples=256", "trainer.record_samples=true", "model.drop_path_rate=0.2")  # fmt: skip


def train(*args: str) -> int:
    from eit_lab.train import main

    return main([*CUDA, *args])


@pytest.mark.parametrize("precision", ["auto", "32-true", "16-mixed"])
def test_a_stopped_run_goes_on_to_the_same_bits(precision: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eit_lab.training.module import Classifier

    words = ("trainer.deterministic=true", f"trainer.precision={precision}")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert train(*words, "run.root=alone") == 0
    original, sent = Classifier.training_step, []

    def training_step(self: Classifier, *args: object) -> torch.Tensor:
        if self.trainer.global_step == 17 and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return original(self, *args)

    monkeypatch.setattr(Classifier, "training_step", training_step)
    assert train(*words, "run.root=killed") == 75
    assert train(*words, "run.root=killed") == 0
    assert list(compare(only_run(here / "alone"), only_run(here / "killed"))) == []


def test_auto_precision_is_bf16_and_the_speed_is_set_against_the_peak(here: Path) -> None:
    assert train("trainer.peak_tflops=100.0", "trainer.log_every_n_steps=1") == 0
    folder = only_run(here / "runs")
    assert record_of(folder)["placement"]["precision"] == "bf16-mixed"
    assert "perf/mfu" in (folder / "metrics.csv").read_text().splitlines()[0]


def test_compiled_weights_have_clean_keys(here: Path) -> None:
    assert train("run.root=plain", "recipe.epochs=1") == 0
    assert train("run.root=compiled", "recipe.epochs=1", "trainer.compile=true") == 0
    states = [
        torch.load(only_run(here / r) / "checkpoints" / "last.ckpt", weights_only=True) for r in ("plain", "compiled")
    ]
    assert states[0]["state_dict"].keys() == states[1]["state_dict"].keys()


def test_sharding_trains_the_same_model(here: Path) -> None:
    same = (
        "recipe.ema_decay=null",
        "trainer.precision=32-true",
        "model.drop_path_rate=0.0",
        "trainer.log_every_n_steps=1",
    )
    assert train(*same, "run.root=plain") == 0
    assert train(*same, "run.root=sharded", "trainer.strategy=fsdp") == 0
    plain, sharded = (only_run(here / root) for root in ("plain", "sharded"))
    states = [torch.load(f / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for f in (plain, sharded)]
    assert states[0].keys() == states[1].keys()
    for name, weight in states[0].items():
        torch.testing.assert_close(states[1][name], weight, rtol=1e-3, atol=1e-4)
    assert record_of(sharded)["result"]["test/loss"] == pytest.approx(record_of(plain)["result"]["test/loss"], rel=1e-3)


def test_an_analysis_finds_on_the_device_what_it_finds_on_the_cpu(here: Path) -> None:
    import json

    from eit_lab.analyze import main

    assert train("recipe.epochs=1", "trainer.precision=32-true") == 0
    words = [f"run={only_run(here / 'runs')}", "filter_images=64", "field_images=8", "pictures=2", "figures=false"]
    assert main([*words, "out=gpu", "trainer.precision=32-true"]) == 0
    assert main([*words, "out=cpu", "trainer.precision=32-true", "trainer.accelerator=cpu"]) == 0
    gpu, cpu = (json.loads((here / name / "analysis.json").read_text()) for name in ("gpu", "cpu"))
    assert gpu["device"] != cpu["device"]
    assert gpu["means"] == pytest.approx(cpu["means"], rel=1e-3)
    for layer, distances in enumerate(cpu["heads"]["attention_distance"]):
        assert gpu["heads"]["attention_distance"][layer] == pytest.approx(distances, rel=1e-3)
    assert gpu["receptive_field"]["side_px"] == pytest.approx(cpu["receptive_field"]["side_px"], rel=1e-2)


def test_an_analysis_of_a_large_model_takes_four_gigabytes_at_most(here: Path) -> None:
    import json

    from eit_lab.bench import main

    assert main(["analysis", "models=eit_mini", "images=64", "rounds=1", "device=cuda", f"out={here}"]) == 0
    assert json.loads((here / "analysis.json").read_text())["memory"]["gb"] < 4
