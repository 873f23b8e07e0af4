"""Where a step's time goes: the work is counted exactly, every event of a profile finds its operator, and the page is its records."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eit_lab import create_model
from eit_lab.bench import main
from eit_lab.benchmark.page import ENTRY, draw, read_candidates, sections
from eit_lab.benchmark.roofline import command, peaks
from eit_lab.benchmark.roofline.attribution import STEP, Key, attribute, scopes
from eit_lab.benchmark.roofline.groups import GROUPS
from eit_lab.benchmark.roofline.measure import Setting, build_step, measure
from eit_lab.benchmark.roofline.peaks import Peaks
from eit_lab.benchmark.roofline.peers import read_peer
from eit_lab.benchmark.roofline.record import measured_s
from eit_lab.benchmark.roofline.tables import attention_table, roofline_table, times_table
from eit_lab.benchmark.roofline.work import operators
from eit_lab.compose import compose_model
from eit_lab.config import ConfigError
from eit_lab.models.cost import count_cost

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
RECORDS = ROOT / "benchmarks" / "records"
MADE = Peaks(
    flops={"float32": 200e9, "bfloat16": 800e9}, matmul={"float32": 100e9, "bfloat16": 800e9}, memory=50e9, cache=100e9,
    cache_bytes=32 << 20, exponentials=2e9, data_sheet=None,
)  # fmt: skip


def work_of(name: str, *, img_size: int = 224, batch: int = 1, precision: str = "float32"):
    with torch.device("meta"):
        return operators(create_model(name, img_size=img_size), batch=batch, precision=precision)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------------ work


@pytest.mark.parametrize("name", ["eit_nano", "vit_nano", "lsra_nano"])
def test_the_forward_work_is_the_models_macs_and_a_step_less_than_three_times_that(name: str) -> None:
    cost = count_cost(compose_model(name), num_classes=1000, img_size=224)
    work = work_of(name, batch=4)
    flops = {phase: sum(one.flops for one in work if one.phase == phase) for phase in ("forward", "backward")}
    assert flops["forward"] == 2 * 4 * cost.macs
    stem = sum(one.flops for one in work if one.group == "stem convolution" and one.phase == "forward")
    assert stem > 0
    assert flops["backward"] == 2 * flops["forward"] - stem  # images need no gradient
    (adamw,) = [one for one in work if one.group == "optimizer"]
    assert adamw.num_bytes == 28 * cost.params


def test_operators_of_eit_base_by_hand() -> None:
    work = {(one.shape, one.phase): one for one in work_of("eit_base", batch=8, precision="bfloat16")}
    rows = 8 * 362
    first = work["attention 16 x 2, 362 tokens", "forward"]
    assert first.flops == 2 * 8 * 16 * (2 * 362 * 362 * 2)
    assert first.num_bytes == 4 * rows * 32 * 2
    assert first.exponentials == 8 * 16 * 362 * 362
    assert work["attention 16 x 2, 362 tokens", "backward"].flops == 2 * first.flops
    assert work["attention 16 x 2, 362 tokens", "backward"].exponentials == 0
    up = work[f"linear {rows} x 400 -> 1600", "forward"]
    assert up.places == tuple(f"blocks.{layer}.mlp.fc1" for layer in range(10))
    assert up.flops == 10 * 2 * rows * 400 * 1600
    assert up.num_bytes == 10 * 2 * (rows * 400 + 400 * 1600 + 1600 + rows * 1600)
    depthwise = work["depthwise 3x3, 368, 19x19", "forward"]
    assert depthwise.flops == 2 * 8 * 361 * 368 * 9
    assert depthwise.num_bytes == 2 * (2 * rows * 368 + 368 * 9)
    stem = work["convolution 16x16/4, 3 -> 400, 57x57", "forward"]
    assert stem.flops == 2 * 8 * 57 * 57 * 400 * 768
    assert "casts and copies" in {one.group for one in work.values()}
    assert "casts and copies" not in {one.group for one in work_of("eit_base")}


def test_a_bound_is_the_longer_of_products_and_bytes_and_a_cache_counts_where_all_fits() -> None:
    assert MADE.bound(200e9, 1e9, precision="float32") == (1.0, "products")
    assert MADE.bound(200e9, 100e9, precision="float32") == (2.0, "bytes")
    assert MADE.bound(200e9, 100e9, precision="bfloat16") == (2.0, "bytes")
    small = 32 << 20
    assert MADE.bound(0, 10 * small, precision="float32", count=10) == (10 * small / 100e9, "bytes")
    assert MADE.bound(0, 10 * small, precision="float32", count=9) == (10 * small / 50e9, "bytes")
    assert MADE.softmax_s(1e9) == 0.5


def test_the_machine_is_measured() -> None:
    found = peaks.measure(torch.device("cpu"), ["float32", "bfloat16"], seconds=0.001, scale=32)
    assert set(found.flops) == {"float32", "bfloat16"}
    assert all(found.flops[one] >= found.matmul[one] > 1e6 for one in found.flops)
    assert found.memory > 1e6
    assert found.exponentials > 1e5
    twice = peaks.better(found, MADE)
    assert twice.memory == max(found.memory, 50e9)
    assert twice.flops["float32"] == max(found.flops["float32"], 200e9)


# ----------------------------------------------------------------------------------------------------------- attribution


@dataclass
class Event:
    """One event of a made profile."""

    name: str
    cpu_parent: Event | None = None
    sequence_nr: int = -1
    us: float = 0.0
    thread: int = 1
    fwd_thread: int = 0
    time_range: Any = field(default_factory=lambda: SimpleNamespace(start=0.0))
    self_device_time_total: float = 0.0

    @property
    def self_cpu_time_total(self) -> float:
        return self.us


class Profile:
    """Events as a step makes them, one after the other."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.step = self.add(STEP)

    def add(self, name: str, parent: Event | None = None, **more: Any) -> Event:
        event = Event(name, parent, **more)
        event.time_range = SimpleNamespace(start=float(len(self.events)))
        self.events.append(event)
        return event

    def forward(self, kind: str, place: str, *names: str, seq: int, us: float) -> None:
        """Operations one in the other, in a scope; the innermost takes the time."""
        inner = self.add(f"eit_lab/scope/{kind}/{place}", self.step)
        for name in names:
            inner = self.add(name, inner, sequence_nr=seq)
        inner.us = us

    def backward(self, node: str, *names: str, seq: int, us: float) -> None:
        """The same of a node of the graph."""
        inner = self.add(f"autograd::engine::evaluate_function: {node}", self.step, sequence_nr=seq, fwd_thread=1)
        for name in names:
            inner = self.add(name, inner)
        inner.us = us

    def seconds(self) -> dict[tuple[str, str, str], int]:
        """Whole microseconds by key."""
        return {tuple(key): round(1e6 * value) for key, value in attribute(self.events).seconds.items()}


def test_a_backward_event_goes_where_the_number_of_its_node_was_made() -> None:
    made = Profile()
    made.forward("attention", "blocks.3.mixer.attn", "aten::matmul", "aten::bmm", seq=7, us=10)
    # A view at the end of one scope that makes no node leaves its number to the next one.
    made.forward("norm", "blocks.3.norm2", "aten::view", seq=8, us=1)
    made.forward("linear", "blocks.3.mlp.fc1", "aten::linear", "aten::addmm", seq=8, us=20)
    made.backward("AddmmBackward0", "AddmmBackward0", "aten::mm", seq=8, us=40)
    made.backward("BmmBackward0", "BmmBackward0", "aten::bmm", seq=7, us=30)
    assert made.seconds() == {
        ("attention", "forward", "blocks.3"): 10,
        ("norms", "forward", "blocks.3"): 1,
        ("matrix products", "forward", "blocks.3.mlp.fc1"): 20,
        ("matrix products", "backward", "blocks.3.mlp.fc1"): 40,
        ("attention", "backward", "blocks.3"): 30,
    }


@pytest.mark.parametrize(
    ("scope", "names", "group"),
    [
        (("linear", "blocks.0.mlp.fc1"), ("aten::to", "aten::_to_copy", "aten::copy_"), "casts and copies"),
        (("linear", "blocks.0.mlp.fc1"), ("aten::linear", "aten::clone", "aten::copy_"), "casts and copies"),
        (("attention", "blocks.0.mixer.attn"), ("aten::clone", "aten::copy_"), "attention"),
        (("attention", "blocks.0.mixer.attn"), ("aten::linear", "aten::addmm"), "matrix products"),
        (("attention", "blocks.0.mixer.attn"), ("NativeAttention",), "attention"),
        (("conv", "blocks.0.mixer.conv"), ("aten::cat",), "convolution branch"),
        (("conv", "blocks.0.mixer.conv"), ("aten::conv2d", "aten::_to_copy", "aten::copy_"), "convolution branch"),
        (("mixer", "blocks.0.mixer"), ("aten::cat",), "concatenation"),
        (("mixer", "blocks.0.mixer"), ("eit_lab::grid_conv",), "convolution branch"),
        (("stem", "stem"), ("aten::conv2d", "aten::mkldnn_convolution"), "stem convolution"),
        (("stem", "stem"), ("aten::max_pool2d", "aten::max_pool2d_with_indices"), "max pool"),
        (("mlp", "blocks.0.mlp"), ("aten::gelu",), "GELU"),
        (("mlp", "blocks.0.mlp"), ("_Activated",), "GELU"),
        (("mlp", "blocks.0.mlp"), ("_Activated", "mkldnn::_linear_pointwise"), "matrix products"),
        (("block", "blocks.0"), ("aten::add",), "residual sums"),
        (("norm", "blocks.0.norm1"), ("aten::layer_norm", "aten::native_layer_norm"), "norms"),
        (("model", ""), ("aten::cat",), "concatenation"),
    ],
)
def test_what_an_operation_in_a_scope_is(scope: tuple[str, str], names: tuple[str, ...], group: str) -> None:
    made = Profile()
    made.forward(*scope, *names, seq=3, us=5)
    assert {key[0] for key in made.seconds()} == {group}


def test_what_happens_between_the_nodes_of_the_graph() -> None:
    made = Profile()
    made.forward("norm", "blocks.0.norm1", "aten::layer_norm", seq=1, us=1)
    made.forward("linear", "blocks.0.mlp.fc1", "aten::to", seq=2, us=1)
    made.forward("mixer", "blocks.0.mixer", "aten::slice", seq=3, us=1)
    made.backward(
        "NativeLayerNormBackward0", "NativeLayerNormBackward0", "aten::native_layer_norm_backward", seq=1, us=7
    )
    made.backward("NativeLayerNormBackward0", "aten::add_", seq=1, us=11)  # the residual branch's gradient comes to it
    made.backward("ToCopyBackward0", "ToCopyBackward0", "aten::to", "aten::_to_copy", "aten::copy_", seq=2, us=13)
    made.backward("SliceBackward0", "SliceBackward0", "aten::slice_backward", "aten::copy_", seq=3, us=17)
    made.backward("torch::autograd::AccumulateGrad", "torch::autograd::AccumulateGrad", "aten::detach", seq=-1, us=19)
    made.add("aten::_fused_adamw_", made.add("Optimizer.step#AdamW.step", made.step), us=23)
    made.add("aten::nll_loss", made.step, us=29)
    made.add("aten::mm", us=1000)  # outside any step
    assert {key: us for key, us in made.seconds().items() if key[1] != "forward" or us == 29} == {
        ("norms", "backward", "blocks.0"): 7,
        ("residual sums", "backward", "blocks.0"): 11,
        ("casts and copies", "backward", "blocks.0"): 13,
        ("concatenation", "backward", "blocks.0"): 17,
        ("everything else", "backward", ""): 19,
        ("optimizer", "update", ""): 23,
        ("everything else", "forward", ""): 29,
    }


def test_on_a_gpu_kernels_count_and_the_backwards_thread_is_another() -> None:
    made = Profile()
    made.forward("linear", "head", "aten::linear", seq=4, us=50)
    made.events[-1].self_device_time_total = 3.0
    engine = made.add("autograd::engine::evaluate_function: AddmmBackward0", sequence_nr=4, thread=9, fwd_thread=1)
    made.add("aten::mm", engine, us=60, thread=9, self_device_time_total=5.0)
    found = attribute(made.events, on_device=True).seconds  # type: ignore[arg-type]
    assert found == {
        Key("matrix products", "forward", "head"): pytest.approx(3e-6),
        Key("matrix products", "backward", "head"): pytest.approx(5e-6),
    }


@pytest.mark.parametrize(
    "peer",
    [
        pytest.param("literal", marks=pytest.mark.slow),
        "eit_lab:attention=sdpa",
        pytest.param("eit_lab", marks=pytest.mark.slow),  # compiles the kernel
    ],
)
def test_a_real_step_every_operator_has_its_time_and_the_groups_are_the_step(peer: str) -> None:
    setting = Setting(
        model="eit_nano", peer=read_peer(peer), precision="bfloat16", batch=2, img_size=32, steps=1, device="cpu"
    )
    run = measure(setting)
    work = work_of("eit_nano", img_size=32, batch=2, precision="bfloat16")
    missing = [(one.shape, one.phase) for one in work if measured_s(run, one.as_dict()) is None]
    assert missing == []
    seconds = {group: sum(cell["seconds"] for cell in run["groups"].get(group, {}).values()) for group in run["groups"]}
    assert set(seconds) == set(GROUPS)
    assert sum(seconds.values()) == pytest.approx(run["seconds"])
    assert len(run["wall"]) == 2
    names = {event["name"] for event in run["events"] if event["group"] == "attention"}
    assert ("aten::bmm" in names) is (peer == "literal")
    if peer == "literal":
        assert run["groups"]["attention"]["backward"]["copies"] > 0


def test_the_scopes_go_and_leave_the_step_as_it_was() -> None:
    setting = Setting(
        model="eit_nano", peer=read_peer("eit_lab"), precision="float32", batch=2, img_size=32, steps=1, device="cpu"
    )
    model, _ = build_step(setting)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = model(images)
        with scopes(model):
            assert torch.equal(model(images), plain)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


# ----------------------------------------------------------------------------------------------------------- the command


@contextmanager
def no_bar() -> Iterator[Any]:
    yield lambda step, done, total: None


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "measure", lambda device, precisions: MADE)


@pytest.mark.slow
def test_the_command_leaves_a_record_that_the_next_one_is_drawn_beside(
    quick: None, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = a_record() | {"title": "one", "model": "eit_nano", "batch": 2, "img_size": 32}
    Path("first.json").write_text(json.dumps(first))
    words = ["model=eit_nano", "img_size=32", "batch=2", "steps=1", "precision=float32", "peers=literal", "device=cpu"]
    assert command.run([*words, "before=first.json", "out=then"], progress=no_bar, alone=False) == 0
    assert {path.name for path in (here / "then").iterdir()} == {
        f"profile-cpu.{end}" for end in ("json", "md", "png", "svg")
    }
    record = json.loads(Path("then/profile-cpu.json").read_text())
    head, rows = times_table(record, "float32")
    assert head == ["float32, ms of a step", "literal", "one: eit_lab"]  # the literal step of before is not drawn again
    assert rows[0][2] == "1,250 (62.5%)"
    assert rows[-2] == ("whole step", rows[-2][1], "2,000")
    svg = Path("then/profile-cpu.svg").read_text()
    assert "one: eit_lab" in svg
    assert "mathdefault" not in svg
    assert "whole step" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="batch must be 2, as in the record of before, got 4"):
        command.run([*words, "before=first.json", "batch=4"], progress=no_bar, alone=False)


@pytest.mark.slow
def test_each_peer_has_a_process_of_its_own(command, tmp_path: Path) -> None:
    done = command("bench", "profile", "model=eit_nano", "img_size=32", "batch=2", "steps=1", "device=cpu", "out=out")
    assert done.status == 0, done.err
    record = json.loads((tmp_path / "out" / "profile-cpu.json").read_text())
    ran = [(run["peer"], run["precision"]) for run in record["runs"]]
    assert ran == [(peer, one) for one in ("float32", "bfloat16") for peer in ("literal", "eit_lab")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["modle=eit_nano"], "bench profile takes model, batch"),
        (["model=eit_nan"], "nearest: eit_nano"),
        (
            ["model=lsra_lite_nano"],
            "model must have depthwise convolutions and the stem eit or patchify, got lightweight",
        ),
        (["peers=literl"], "peers must be of eit_lab, literal, got 'literl'; nearest: literal"),
        (["peers=eit_lab:attention=sdp"], "peers: attention must be one of"),
        (["peers=literal:attention=sdpa"], "literal takes memory as :key=value, got 'attention="),
        (["precision=float16"], "precision must be of float32, bfloat16, got 'float16'"),
        (["batch=0"], "batch must be a whole number of 1 or more, got '0'"),
        (["device=gpu"], "device must be one of auto, cpu, cuda, got 'gpu'"),
        (["before=none.json"], "before must be records of `bench profile`, got none.json"),
    ],
)
def test_a_wrong_word_is_one_line(words: list[str], said: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", *words]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def a_record() -> dict[str, Any]:
    work = [
        {"group": "matrix products", "phase": "forward", "shape": "linear 8 x 2 -> 2", "flops": 200e9, "num_bytes": 1e9,
         "exponentials": 0, "places": ["blocks.0.mlp.fc1"], "bound_s": 1.0, "set_by": "products", "softmax_s": 0.0},
        {"group": "attention", "phase": "forward", "shape": "attention 4 x 2, 9 tokens", "flops": 20e9, "num_bytes": 25e9,
         "exponentials": 1e9, "places": ["blocks.0"], "bound_s": 0.5, "set_by": "bytes", "softmax_s": 0.25},
    ]  # fmt: skip

    def run(peer: str, products: float, attention: float) -> dict[str, Any]:
        cells = {"matrix products": products, "attention": attention}
        return {
            "peer": peer, "precision": "float32", "seconds": products + attention, "wall": [products + attention],
            "profiled_wall": [9.0], "idle": 0.0, "events": [],
            "groups": {key: {"forward": {"seconds": one, "copies": one / 4}} for key, one in cells.items()},
            "places": {
                "matrix products": {"forward": {"blocks.0.mlp.fc1": products}}, "attention": {"forward": {"blocks.0": attention}},
            },
        }  # fmt: skip

    return {
        "kind": "profile", "work": {"float32": work}, "before": [], "peaks": MADE.as_dict(), "title": "", "command": "bench",
        "runs": [run("literal", 2.0, 2.0), run("eit_lab", 1.25, 0.75)], "model": "m", "batch": 8, "img_size": 8, "steps": 1,
        "date": "2026-01-01", "device": "cpu, 2 threads", "machine": "M", "python": "3", "torch": "2", "commit": "0123456789",
        "changed": False, "load": 0.0,
    }  # fmt: skip


def test_the_tables_say_what_share_of_its_bound_each_operator_reaches() -> None:
    record = a_record()
    _, rows = roofline_table(record, "float32")
    assert rows == [
        ("matrix products, forward", "200.00", "1,000", "1,000", "products", "50%", "80%"),
        ("attention, forward", "20.00", "25,000", "500", "bytes", "25%", "67%"),
        ("whole step", "220.00", "26,000", "1,500", "products", "38%", "75%"),
    ]
    _, rows = times_table(record, "float32")
    assert rows[0] == ("matrix products, forward", "2,000 (50.0%)", "1,250 (62.5%)")
    assert rows[-1] == ("of which copies inside other rows", "1,000 (25.0%)", "500 (25.0%)")
    _, rows = attention_table(record, "float32")
    assert rows == [("4 x 2, 9 tokens", "20.00", "1,000.0", "500", "250", "2,000", "750")]


# --------------------------------------------------------------------------------------------------------------- the page


def test_every_table_of_the_page_is_what_its_records_draw() -> None:
    text = PAGE.read_text()
    assert set(sections(text)) == {"sizes", "step", "model", "startup", "profile", "candidates", "gpu"}
    assert draw(text, RECORDS, beside=PAGE.parent) == text, "python -m eit_lab.bench page"


def test_a_page_says_what_was_not_measured_and_draws_what_was(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("profile", "candidates", "gpu")
    Path("page.md").write_text("".join(f"<!-- drawn: {name} -->\nold\n<!-- end -->\nby hand\n" for name in names))
    Path("records").mkdir()
    words = ["page", "page=page.md", "records=records"]
    assert main(words) == 0
    text = Path("page.md").read_text()
    assert "old" not in text
    assert text.count("by hand") == 3
    assert "*Where the time goes: not measured yet.* `python -m eit_lab.bench profile" in text
    assert "Not run on a GPU yet" in text
    assert main([*words, "check=true"]) == 0
    entry = {
        "candidate": "padding", "device": "cpu", "measured": "a step, float32", "ratio": 0.8, "kept": False, "why": "slower",
        "command": "bench step", "date": "2026-01-01",
    }  # fmt: skip
    Path("records/candidates.json").write_text(json.dumps([entry]))
    Path("records/profile-cpu.json").write_text(json.dumps(a_record()))
    assert main([*words, "check=true"]) == 1
    assert "is not what records says" in capsys.readouterr().err
    assert main(words) == 0
    text = Path("page.md").read_text()
    assert "| padding | **0.80x** a step, float32, cpu | no (negative): slower | `bench step`, 2026-01-01 |" in text
    assert "| matrix products, forward | 200.00 | 1,000 | 1,000 | products | 50% | 80% |" in text
    shutil.copy("records/profile-cpu.json", "records/profile-gpu.json")
    assert main(words) == 0
    assert "Records of GPUs: `profile-gpu.json`" in Path("page.md").read_text()


def test_a_section_that_there_is_not_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="got 'profil'; nearest: profile"):
        draw("<!-- drawn: profil -->\n<!-- end -->", tmp_path, beside=tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ratio": "fast"}, "entry 0 has a ratio that is no number or null: 'fast'"),
        ({"ratio": True}, "entry 0 has a ratio that is no number or null: True"),
        ({"kept": "yes"}, "entry 0 has a kept that is no true or false: 'yes'"),
        ({"date": "1.1.26"}, "entry 0 must have a date as YYYY-MM-DD, got '1.1.26'"),
        ({"why": "a|b"}, "entry 0 must have neither | nor line breaks"),
        ({"more": 1}, "entry 0 must have candidate, device, measured"),
    ],
)
def test_a_candidate_that_is_not_as_the_schema_says_is_one_line(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    entry = dict.fromkeys(ENTRY, "2026-01-01") | {"ratio": None, "kept": True}
    path = tmp_path / "candidates.json"
    path.write_text(json.dumps([entry]))
    assert read_candidates(path) == [entry]
    path.write_text(json.dumps([entry | change]))
    with pytest.raises(ConfigError) as raised:
        read_candidates(path)
    assert said in str(raised.value)
