"""On a CUDA device: the same program, resumed exactly, compiled, sharded. `make test-gpu` runs these."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from conftest import TINY, only_run, record_of
from eit_lab.selftest import compare
from grid_conv_cases import CASES, LARGE_CASES, Case
from grid_conv_cases import compare as compare_grid_conv

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


# ------------------------------------------------------------------------------------------------ compiled, graphs, blocks anew


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"])
def test_a_compiled_run_learns_what_an_eager_one_does_and_is_evaluated_to_its_own_digits(
    mode: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from eit_lab.evaluate import main as evaluate

    # Stochastic depth draws other numbers in a compiled pass; half of the validation's last batch is another shape.
    words = ("recipe.epochs=2", "model.drop_path_rate=0.0", "trainer.precision=32-true", "trainer.eval_batch_size=50")
    assert train(*words, "run.root=eager", "trainer.compile=false") == 0
    assert train(*words, "run.root=compiled", "trainer.compile=true", f"trainer.compile_mode={mode}") == 0
    eager, compiled = (only_run(here / root) for root in ("eager", "compiled"))
    assert record_of(compiled)["placement"]["compile"] == {
        "on": True, "mode": mode, "by_block": False, "why": "trainer.compile=true",
    }  # fmt: skip
    losses = [record_of(folder)["result"]["test/loss"] for folder in (eager, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    capsys.readouterr()
    assert evaluate([f"run={compiled}"]) == 0
    assert "the same as on record, to the last digit" in capsys.readouterr().out


def test_cuda_graphs_go_on_after_stochastic_depth_and_a_shorter_last_step(here: Path) -> None:
    words = ("recipe.epochs=3", "recipe.last_batch=keep", "data.num_samples=250", "trainer.compile=true")
    assert train(*words, "trainer.compile_mode=reduce-overhead", "trainer.log_every_n_steps=1") == 0
    assert record_of(only_run(here / "runs"))["status"] == "finished"


def test_auto_finds_its_compiler_and_leaves_a_short_run_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from eit_lab.training.compiling import why_not

    assert why_not(torch.device("cuda")) == ""
    assert train("recipe.epochs=1") == 0
    assert "steps would save about" in capsys.readouterr().out
    assert not record_of(only_run(here / "runs"))["placement"]["compile"]["on"]


def test_sharded_blocks_are_compiled_one_by_one(here: Path) -> None:
    words = ("recipe.ema_decay=null", "recipe.epochs=1", "trainer.strategy=fsdp", "trainer.compile=true")
    assert train(*words, "model.drop_path_rate=0.0") == 0
    assert record_of(only_run(here / "runs"))["placement"]["compile"]["by_block"]


@pytest.mark.parametrize("compiled", [False, True])
def test_blocks_computed_anew_take_less_memory_and_give_the_same_gradients(compiled: bool) -> None:
    from eit_lab.compose import compose_one
    from eit_lab.models.build import build_model

    config = compose_one(["model=eit_mini", "data=synthetic", "data.img_size=224"])
    torch.manual_seed(0)
    model = build_model(config.model, num_classes=10, img_size=224).cuda()
    images = torch.randn(32, 3, 224, 224, device="cuda")
    forward = torch.compile(model, dynamic=False) if compiled else model
    gradients, peaks = [], []
    for anew in (False, True):
        model.set_grad_checkpointing(anew)
        for _ in range(2):  # the first pass compiles
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            with torch.autocast("cuda", torch.bfloat16):
                loss = forward(images).float().square().mean()
            found = torch.autograd.grad(loss, list(model.parameters()))
        gradients.append(found)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 0.6 * peaks[0]
    for kept, anew in zip(*gradients, strict=True):
        if compiled:
            assert (kept - anew).norm() <= 2e-2 * kept.norm() + 1e-6
        else:
            torch.testing.assert_close(anew, kept, rtol=1e-4, atol=1e-6)  # sums of atomic operations may differ


# ------------------------------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("case", [*CASES, *LARGE_CASES], ids=str)
def test_the_triton_kernel_is_the_convolution_forwards_and_back(case: Case) -> None:
    compare_grid_conv(case, torch.device("cuda"))


def test_the_triton_kernel_repeats_to_the_last_bit_and_goes_through_the_compiler() -> None:
    from eit_lab.models.triton_conv import grid_conv

    torch.manual_seed(0)
    x = torch.randn(64, 362, 400, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(368, 1, 3, 3, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def mixed() -> torch.Tensor:
        return grid_conv(x[..., :368], weight, (19, 19), tail=x[..., 368:])

    slope = torch.randn_like(mixed())
    first, again = ((out := mixed(), *torch.autograd.grad(out, [x, weight], slope)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    out = torch.compile(mixed, fullgraph=True, mode="reduce-overhead")()
    torch.testing.assert_close(out, first[0])


@pytest.mark.parametrize("path", ["sdpa", "flash", "efficient", "cudnn", "math"])
@pytest.mark.parametrize("head_dim", [2, 13, 25, 29])
def test_padded_heads_give_the_same_attention_by_every_kernel_that_takes_them(path: str, head_dim: int) -> None:
    from eit_lab.models.attention import attend, padded_self_attention

    torch.manual_seed(0)
    a = 16 * head_dim
    shapes = (4, 362, a), (3 * a, a), (3 * a,), (a, a), (a,)
    given = [0.1 * torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    x, qkv, projection = given[0], (given[1], given[2]), (given[3], given[4])
    wide = [tensor.double() for tensor in given]
    q, k, v = torch.nn.functional.linear(wide[0], wide[1], wide[2]).view(4, 362, 3, 16, head_dim).permute(2, 0, 3, 1, 4)
    mixed = attend(q, k, v, path="written_out").transpose(1, 2).flatten(2)
    expected = torch.nn.functional.linear(mixed, wide[3], wide[4])
    try:
        found = padded_self_attention(x, qkv, projection, num_heads=16, multiple=8, path=path)
    except RuntimeError as error:
        if "kernel" not in str(error).lower() and "backend" not in str(error).lower():
            raise
        pytest.skip(f"torch has no {path} kernel for this GPU: {str(error).splitlines()[0]}")
    assert (found.double() - expected).norm() < 2e-2 * expected.norm()
