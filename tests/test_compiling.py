"""Compiled or not, and why; what the backward pass computes anew: the same gradients to the last bit, less memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from conftest import TINY, only_run, record_of
from eit_lab.compose import compose_one
from eit_lab.config import Config, ConfigError
from eit_lab.data.catalog import describe
from eit_lab.models.backbone import Backbone
from eit_lab.models.build import build_model
from eit_lab.models.intermediates import Tap
from eit_lab.plan import COMPILE_S, Plan, plan
from eit_lab.runs import identity
from eit_lab.training import compiling
from eit_lab.training.compiling import (
    Compilation,
    choose_compilation,
    compilation_of_run,
    compile_model,
    recompute_blocks,
    why_not,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
EIT_BASE_MACS = 7_073_000_000


@cache
def config_of(*words: str) -> Config:
    return compose_one([*TINY, *words])


def steps(count: int, *, batch_size: int = 512, world_size: int = 1, accumulate: int = 1) -> Plan:
    return Plan(
        world_size=world_size, batch_size=batch_size, micro_batch=batch_size // accumulate // world_size, accumulate=accumulate,
        batches_per_epoch=100 * accumulate, steps_per_epoch=100, total_steps=count,
    )  # fmt: skip


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which torch.compile has what it needs."""
    monkeypatch.setattr(compiling, "why_not", lambda device: "")


# ------------------------------------------------------------------------------------------------------------ the decision


def test_auto_compiles_where_the_whole_plan_pays_for_it(compiler: None) -> None:
    def choose(words: tuple[str, ...], cut: Plan, device: torch.device = CUDA) -> Compilation:
        return choose_compilation(config_of(*words), cut, macs=EIT_BASE_MACS, device=device)

    long, short = steps(100_000), steps(100)
    assert choose((), long).on
    assert "100,000 steps save about" in choose((), long).why
    assert not choose((), short).on
    assert f"compiling takes up to {COMPILE_S:.0f} s" in choose((), short).why
    assert choose((), long, CPU) == Compilation(on=False, why="on CPU it takes minutes and gains little")
    assert choose(("trainer.compile=true",), short).on
    assert not choose(("trainer.compile=false",), long).on


def test_what_compiling_saves_is_counted_for_each_device_and_grows_with_the_steps() -> None:
    def saves(cut: Plan) -> float:
        return cut.compile_saves(EIT_BASE_MACS)

    assert saves(steps(2000)) == pytest.approx(2 * saves(steps(1000)))
    assert saves(steps(1000, world_size=4)) == pytest.approx(saves(steps(1000)) / 4)
    tiny = 1000  # MACs: only the launches of the kernels count
    assert steps(1000, accumulate=2).compile_saves(tiny) == pytest.approx(2 * steps(1000).compile_saves(tiny))
    assert steps(1000).compile_saves(tiny) > 0
    # The published run is compiled on any number of devices there may be; a test of the program never is.
    published = steps(300 * 2502, batch_size=512, world_size=64)
    assert published.compile_pays(EIT_BASE_MACS)
    small = config_of()
    assert not plan(small, describe(small.data)).compile_pays(EIT_BASE_MACS)


def test_without_a_compiler_auto_says_so_and_true_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert why_not(CPU) == "torch.compile needs a C++ compiler, and there is no no-such-compiler"
    with pytest.raises(
        ConfigError, match=r"^trainer\.compile must be auto or false here \(.*\), got true; nearest: auto$"
    ):
        choose_compilation(config_of("trainer.compile=true"), steps(10), macs=1, device=CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    chosen = choose_compilation(config_of(), steps(10**6), macs=EIT_BASE_MACS, device=CUDA)
    assert not chosen.on
    assert "capability 7.0" in chosen.describe() or "Triton, which is not installed" in chosen.describe()


@pytest.mark.parametrize(
    ("words", "cut", "device", "said"),
    [
        (("trainer.compile=true",), steps(9), CPU, "without CUDA graphs without a CUDA device"),
        ((), steps(9, accumulate=2), CUDA, "without CUDA graphs with 2 micro-batches a step"),
        ((), steps(9, world_size=8), CUDA, "without CUDA graphs with 8 processes"),
    ],
)
def test_cuda_graphs_are_refused_where_they_cannot_be(
    words: tuple[str, ...], cut: Plan, device: torch.device, said: str, compiler: None
) -> None:
    config = config_of("trainer.compile_mode=reduce-overhead", *words)
    with pytest.raises(
        ConfigError, match=f"^trainer.compile_mode must be one {said}, got 'reduce-overhead'; nearest: default$"
    ):
        choose_compilation(config, cut, macs=EIT_BASE_MACS, device=device)
    same = config_of("trainer.compile_mode=max-autotune-no-cudagraphs", *words)
    choose_compilation(same, cut, macs=EIT_BASE_MACS, device=device)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("trainer.compile=maybe",), "trainer.compile must be a boolean or 'auto', got 'maybe'"),
        (
            ("trainer.compile=false", "trainer.compile_mode=max-autotune"),
            "trainer.compile_mode must be default with trainer.compile=false, got 'max-autotune'; nearest: default",
        ),
        (
            ("trainer.compile_mode=max-autotune", "trainer.strategy=fsdp", "recipe.ema_decay=null"),
            "trainer.compile_mode must be one without CUDA graphs with trainer.strategy=fsdp, got 'max-autotune'; nearest: "
            "max-autotune-no-cudagraphs",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line(words: tuple[str, ...], line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config_of(*words)
    assert str(refused.value) == line


# -------------------------------------------------------------------------------------------------------- what is compiled


@pytest.fixture
def calls_of_compile(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[nn.Module, dict[str, Any]]]]:
    """(module, options) of each call; what is set for the whole process is set back."""
    calls: list[tuple[nn.Module, dict[str, Any]]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: calls.append((self, options)))
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        yield calls


def test_the_model_is_one_graph_for_each_shape_and_the_cache_is_the_users(
    calls_of_compile: list[tuple[nn.Module, dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = calls_of_compile
    monkeypatch.setenv("EIT_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    model = build(config_of())
    compile_model(model, Compilation(on=False, why=""))
    assert not calls
    compile_model(model, Compilation(on=True, why="", mode="max-autotune"))
    assert calls == [(model, {"mode": "max-autotune", "dynamic": False})]
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "cache" / "compiled")
    assert (tmp_path / "cache" / "compiled").is_dir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    compile_model(model, Compilation(on=True, why="", by_block=True))
    assert [region for region, _ in calls[1:]] == list(model.blocks)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"
    assert torch._dynamo.config.recompile_limit >= 8 * len(model.blocks)


def test_sharded_blocks_are_compiled_one_by_one(compiler: None) -> None:
    words = ("trainer.strategy=fsdp", "recipe.ema_decay=null", "trainer.compile=true")
    chosen = choose_compilation(config_of(*words), steps(9), macs=1, device=CUDA)
    assert chosen.by_block
    assert chosen.describe() == "compiled block by block: trainer.compile=true"


def test_weights_are_evaluated_as_they_were_trained(tmp_path: Path, compiler: None) -> None:
    def found(words: tuple[str, ...], placement: dict[str, Any] | None, device: torch.device = CUDA) -> Compilation:
        folder = tmp_path / "run"
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").touch()
        (folder / "record.json").write_text(json.dumps({"schema": 1, "placement": placement}))
        return compilation_of_run(config_of(*words), [folder / "checkpoints" / "best.ckpt"], device=device)

    on = {"accelerator": "cuda", "compile": {"on": True, "mode": "default", "by_block": True, "why": ""}}
    off = {"accelerator": "cuda", "compile": {"on": False, "mode": "default", "by_block": False, "why": ""}}
    assert found((), on) == Compilation(on=True, why="as in training", by_block=True)
    assert not found((), off).on
    assert not found((), on, CPU).on
    assert not found(("trainer.compile=false",), on).on
    assert found(("trainer.compile=true",), {"accelerator": "cuda"}).on  # of a run from before there was an auto
    assert not found((), {"accelerator": "cuda"}).on
    assert not compilation_of_run(config_of(), [tmp_path / "weights.pth"], device=CUDA).on


# ---------------------------------------------------------------------------------------------------------- blocks anew


def build(config: Config) -> Backbone:
    torch.manual_seed(0)
    model = build_model(config.model, num_classes=10, img_size=config.data.img_size, in_chans=config.data.in_chans)
    assert isinstance(model, Backbone)
    return model


def gradients(model: nn.Module, run: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    torch.manual_seed(1)
    images = torch.randn(4, 3, 8, 8)
    loss = (model if run is None else run)(images).float().square().mean()
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(
    "words",
    [("model.drop_path_rate=0.5",), ("model=lsra_lite_nano", "model.ib.weight_dropout=0.3", "model.size.depth=2")],
)
def test_blocks_computed_anew_give_the_same_gradients_to_the_last_bit(words: tuple[str, ...], mixed: bool) -> None:
    config = config_of(*words, "trainer.activation_checkpointing=blocks")
    model = build(config)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        kept = gradients(model)
        recompute_blocks(model, config)
        anew = gradients(model)
    assert all(torch.equal(one, other) for one, other in zip(kept, anew, strict=True))
    assert any(one.any() for one in kept)


def test_blocks_computed_anew_are_not_kept() -> None:
    def saved_bytes(model: nn.Module) -> int:
        storages: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            alive.append(x)
            return x

        alive: list[Tensor] = []
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(torch.randn(4, 3, 8, 8))
        return sum(size for place, size in storages.items() if place not in weights)

    model = build(config_of("model.size.depth=6"))
    kept = saved_bytes(model)
    model.set_grad_checkpointing()
    anew = saved_bytes(model)
    tokens = 4 * (1 + model.grid[0] * model.grid[1]) * 16 * 4  # of one block's input
    assert 6 * tokens <= anew < kept / 4
    model.set_grad_checkpointing(False)
    assert saved_bytes(model) == kept


def test_a_tap_hears_each_intermediate_once_where_blocks_are_computed_anew() -> None:
    class Names(Tap):
        def __init__(self) -> None:
            self.heard: list[str] = []

        def tokens(self, name: str, x: Tensor, grid: tuple[int, int]) -> Tensor:
            self.heard.append(name)
            return x

    model = build(config_of())
    plain = gradients(model)
    model.set_grad_checkpointing()
    tap = Names()
    tapped = gradients(model, lambda images: model.forward(images, tap=tap))
    assert tap.heard == ["stem", *(f"blocks.{layer}.{part}" for layer in range(2) for part in ("mixer", "mlp"))]
    assert all(torch.equal(one, other) for one, other in zip(plain, tapped, strict=True))


@pytest.mark.slow
def test_blocks_computed_anew_are_one_graph_under_the_compiler() -> None:
    model = build(config_of())
    plain = gradients(model)
    model.set_grad_checkpointing()
    compiled = gradients(model, torch.compile(model, backend="aot_eager", fullgraph=True))
    for one, other in zip(plain, compiled, strict=True):
        torch.testing.assert_close(one, other)


def test_a_model_that_cannot_compute_blocks_anew_is_refused() -> None:
    class Refuses(nn.Module):
        def set_grad_checkpointing(self, enable: bool = True) -> None:
            assert not enable, "gradient checkpointing not supported"

    class Notes(nn.Module):
        def set_grad_checkpointing(self, enable: bool = True) -> None:
            self.anew = enable

    config = config_of("trainer.activation_checkpointing=blocks")
    line = "^trainer.activation_checkpointing must be off for {}, which cannot compute its blocks anew, got 'blocks'; nearest: off$"
    for model in (Refuses(), nn.Linear(1, 1)):
        with pytest.raises(ConfigError, match=line.format(config.model.name)):
            recompute_blocks(model, config)
    notes = Notes()
    recompute_blocks(notes, config)
    assert notes.anew
    recompute_blocks(Refuses(), config_of())


# ------------------------------------------------------------------------------------------------------------ through a run


@pytest.mark.slow
def test_a_run_says_how_it_is_run_and_blocks_anew_are_the_same_run(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from eit_lab.train import main

    words = [*TINY, "recipe.epochs=1", "model.drop_path_rate=0.3"]
    assert main([*words, "run.root=kept"]) == 0
    assert "not compiled: on CPU it takes minutes and gains little\n" in capsys.readouterr().out
    assert main([*words, "run.root=anew", "trainer.activation_checkpointing=blocks"]) == 0
    assert (
        "not compiled: on CPU it takes minutes and gains little; the backward pass computes blocks anew\n"
        in capsys.readouterr().out
    )
    kept, anew = (only_run(here / root) for root in ("kept", "anew"))
    assert kept.name == anew.name  # which ends in the run's identity
    placement = record_of(anew)["placement"]
    assert placement["activation_checkpointing"] == "blocks"
    assert placement["compile"] == {
        "on": False, "mode": "default", "by_block": False, "why": "on CPU it takes minutes and gains little",
    }  # fmt: skip
    one, other = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for f in (kept, anew))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_mode_is_part_of_what_a_run_is_and_where_blocks_are_kept_is_not() -> None:
    plain = config_of()
    facts = describe(plain.data)
    assert identity(config_of("trainer.activation_checkpointing=blocks"), facts) == identity(plain, facts)
    others = ("trainer.compile=true", "trainer.compile=false", "trainer.compile_mode=max-autotune")
    assert len({identity(config_of(word), facts) for word in others} | {identity(plain, facts)}) == 4


@pytest.mark.slow
def test_a_compiled_run_is_found_in_the_cache_and_evaluated_to_its_own_digits(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eit_lab.evaluate import main as evaluate
    from eit_lab.train import main

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(here / "graphs"))  # that of the other tests is warm
    words = [*TINY, "recipe.epochs=1", "trainer.compile=true"]
    spent = []
    for root in ("cold", "warm"):
        torch._dynamo.reset()
        before = os.times()
        assert main([*words, f"run.root={root}"]) == 0
        after = os.times()
        spent.append(sum(after[:4]) - sum(before[:4]))
    assert spent[1] < spent[0] / 2
    cold, warm = (only_run(here / root) for root in ("cold", "warm"))
    assert record_of(cold)["result"] == record_of(warm)["result"]
    assert record_of(cold)["placement"]["compile"]["on"]
    torch._dynamo.reset()
    assert evaluate([f"run={cold}"]) == 0
