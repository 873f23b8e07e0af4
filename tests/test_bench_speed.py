"""The benchmarks of the model, its training step and the start-up: the literal peer, who takes part, goals, tables, records."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F

from eit_lab import create_model
from eit_lab.bench import main
from eit_lab.benchmark.speed import by_hand, measuring, worker
from eit_lab.benchmark.speed import command as speed_command
from eit_lab.benchmark.speed.command import slug
from eit_lab.benchmark.speed.contender import Contender, Request
from eit_lab.benchmark.speed.crew import LostError, Worker
from eit_lab.benchmark.speed.goals import GOALS, judge
from eit_lab.benchmark.speed.literal import Literal
from eit_lab.benchmark.speed.options import read_options
from eit_lab.benchmark.speed.peers import default_peers, read_peer
from eit_lab.benchmark.speed.startup import _imports
from eit_lab.benchmark.speed.startup_tables import goal_row
from eit_lab.benchmark.speed.tables import page_section, tables
from eit_lab.models.backbone import Backbone

# ------------------------------------------------------------------------------------------------------- the literal peer


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("name", "contiguous"), [("eit_nano", True), ("eit_nano", False), ("vit_nano", True)])
def test_the_literal_model_is_the_backbone_in_outputs_and_gradients(name: str, contiguous: bool) -> None:
    torch.manual_seed(0)
    model = create_model(name, num_classes=10, img_size=32)
    assert isinstance(model, Backbone)
    with torch.no_grad():
        for parameter in model.parameters():  # away from the small weights that hide attention
            parameter.add_(0.1 * torch.randn_like(parameter))
    literal = Literal(model, contiguous=contiguous)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 3, 9, 1])
    ours, theirs = model(images), literal(images)
    assert apart(theirs, ours) < 1e-5
    for logits in (ours, theirs):
        F.cross_entropy(logits, labels).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    found = {name: parameter.grad for name, parameter in literal.named_parameters()}
    assert found.keys() == expected.keys()
    assert all(apart(found[name], gradient) < 1e-4 for name, gradient in expected.items())
    assert all(literal.state_dict()[name] is not value for name, value in model.state_dict().items())
    with torch.no_grad():  # the weights are its own
        literal.norm.bias.add_(1.0)
    assert apart(model(images), ours) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"pos_embed": "sincos"}, "no position embedding"), ({"drop_path_rate": 0.1}, "no stochastic")],
)
def test_what_the_literal_model_does_not_compute_it_refuses(changes: dict[str, Any], said: str) -> None:
    from dataclasses import replace

    from eit_lab.compose import compose_model
    from eit_lab.models.build import build_model

    model = build_model(replace(compose_model("eit_nano"), **changes), num_classes=10, img_size=32)
    assert isinstance(model, Backbone)
    with pytest.raises(ValueError, match=said):
        Literal(model)


@pytest.mark.slow
def test_the_model_by_hand_has_the_published_number_of_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    by_hand.main(["250", "5", "10", "1000", "16", "4", "3"])
    by_hand.main(["250", "5", "10", "10", "8", "2", "2", "2", "32"])  # with a step
    small = sum(p.numel() for p in create_model("eit_mini", num_classes=10, img_size=32).parameters())
    assert capsys.readouterr().out.split() == ["3512750", str(small)]


# ------------------------------------------------------------------------------------------------------------- contenders


def request(peer: str, **changes: Any) -> Request:
    told = {"verb": "step", "peer": peer, "model": "eit_nano", "device": "cpu", "batch": 2, "img_size": 32}
    return Request(**{**told, **changes})


@pytest.mark.slow
def test_timms_vit_has_our_width_depth_heads_and_tokens() -> None:
    ours, theirs = (Contender(request(peer, verb="model")) for peer in ("eit_lab", "timm_vit"))
    assert isinstance(ours.model, Backbone)
    vit: Any = theirs.model
    size = ours.model.config.size
    assert (vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads) == (
        size.embed_dim,
        size.depth,
        size.num_heads,
    )
    assert vit.patch_embed.num_patches == ours.model.grid[0] * ours.model.grid[1] == 64
    assert theirs.img_size == 32
    assert not vit.training
    tokens, width = (
        65,
        size.embed_dim,
    )  # by hand: qkv, both products, projection and MLP of each block, patches, classes
    block = tokens * width * width * (3 + 1 + 8) + 2 * tokens * tokens * width
    assert theirs.macs == size.depth * block + 64 * width * 3 * 4 * 4 + width * 1000


@pytest.mark.slow
def test_a_training_step_learns_and_the_literal_one_starts_at_the_same_loss() -> None:
    ours, literal = (Contender(request(peer)) for peer in ("eit_lab", "literal"))
    first = ours.warm_up("float32")["first_loss"]
    assert first == pytest.approx(6.9, abs=0.3)  # log 1000
    assert literal.warm_up("float32")["first_loss"] == pytest.approx(first, rel=1e-5)
    assert ours.turn("float32", steps=3) > 0
    assert ours.warm_up("float32")["first_loss"] < first


@pytest.mark.slow
def test_settings_of_a_peer_reach_its_model() -> None:
    kept = Contender(request("eit_lab:checkpoint=true:attention=written_out:compile=false"))
    assert kept.warm_up("float32")["first_loss"] == pytest.approx(
        Contender(request("eit_lab")).warm_up("float32")["first_loss"], rel=1e-5
    )
    assert kept.facts()["compiled"] == "not compiled: as asked"
    assert "on CPU" in Contender(request("eit_lab")).facts()["compiled"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("eit_lap", "peers must be of eit_lab, literal, timm_vit, vit_b_16, convit, got 'eit_lap'; nearest: eit_lab"),
        ("literal:compile=auto", "peers: literal takes memory as :key=value, got 'compile=auto'"),
        ("eit_lab:attention=flush", "got 'flush'; nearest: flash"),
        ("eit_lab:memory=keep", "peers: memory must be one of kept, plain, got 'keep'; nearest: kept"),
    ],
)
def test_a_peer_that_there_is_not_is_one_line(text: str, said: str) -> None:
    with pytest.raises(ValueError, match="peers") as caught:
        read_peer(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_who_keeps_memory_and_who_compiles_follows_from_the_name() -> None:
    names = ("eit_lab", "eit_lab:memory=plain", "literal", "literal:memory=kept", "timm_vit:compile=max-autotune")
    assert [read_peer(name).keeps_memory for name in names] == [True, False, False, True, False]
    assert [read_peer(name).compile for name in names] == ["auto", "auto", "false", "false", "max-autotune"]
    sizes = ("eit_mini", "eit_base")
    beside = {
        (verb, device, size): {peer.name for peer in default_peers(size, verb=verb, device=device, models=sizes)}
        for verb in ("step", "model")
        for device in ("cpu", "cuda")
        for size in sizes
    }
    for (_, _, size), found in beside.items():
        assert {"eit_lab", "literal", "timm_vit"} <= found
        assert ({"vit_b_16", "convit"} <= found) == (size == "eit_base")
    for goal in GOALS:  # whom a goal is against takes part beside each of its sizes that is measured
        for size in set(goal.models) & set(sizes):
            assert goal.against is None or goal.against in beside[goal.verb, goal.device, size]


# ---------------------------------------------------------------------------------------------------------------- workers


@pytest.mark.slow
def test_a_worker_that_cannot_go_on_says_why_in_one_line() -> None:
    crew = [Worker() for _ in range(3)]
    try:
        with pytest.raises(LostError, match=r"^a worker is built before it is asked for more$"):
            crew[0].ask({"do": "turn"}, within_s=60)
        crew[1]._process.send_signal(signal.SIGKILL)
        with pytest.raises(LostError, match="signal 9"):
            crew[1].ask({"do": "turn"}, within_s=60)
        with pytest.raises(LostError, match=r"^took more than 0 s$"):
            crew[2].receive(within_s=0.0)
        assert crew[2]._process.poll() is not None
    finally:
        for one in crew:
            one.close()


class InProcess:
    """A worker without a process; one that is to fail does so at its second turn."""

    idle_cpu_s, idle_s = 0.0, 1.0
    asked: ClassVar[list[tuple[str, str]]] = []

    def send(self, request: dict[str, Any]) -> None:
        if request["do"] == "build":
            self.name = request["contender"]["peer"]
            self.contender, self.answer = worker.build({**request, "keep": False})
            return
        InProcess.asked.append((request["do"], f"{self.name} {request['precision']}"))
        if self.name == "timm_vit" and InProcess.asked.count(InProcess.asked[-1]) > 1:
            self.answer = worker.describe(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
        else:
            self.answer = worker.serve(self.contender, request)

    def receive(self, *, within_s: float) -> dict[str, Any]:
        if "error" in self.answer:
            raise LostError("out of memory" if self.answer["out_of_memory"] else self.answer["error"])
        return self.answer

    def ask(self, request: dict[str, Any], *, within_s: float) -> dict[str, Any]:
        self.send(request)
        return self.receive(within_s=within_s)

    def close(self) -> None:
        pass


@contextmanager
def silent() -> Iterator[Any]:
    yield lambda step, done, total: None


@pytest.mark.slow
def test_rounds_turn_around_a_lost_worker_is_a_row_and_the_record_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measuring, "Worker", InProcess)
    monkeypatch.setattr("eit_lab.benchmark.speed.contender._TURN_S", {"cpu": 0.01})
    monkeypatch.setattr("eit_lab.benchmark.speed.contender._PRODUCT_SIDE", {"cpu": 64})
    InProcess.asked = []
    words = [
        "models=eit_nano",
        "batch=2",
        "img_size=32",
        "rounds=2",
        "peers=eit_lab,literal,timm_vit",
        f"out={tmp_path}",
    ]
    assert speed_command.run([*words, "precision=bfloat16,float32", "device=cpu"], verb="step", progress=silent) == 0
    turns = [what for do, what in InProcess.asked if do == "turn"]
    first = [
        f"{name} {p}" for name in ("matrix_product", "eit_lab", "literal", "timm_vit") for p in ("bfloat16", "float32")
    ]
    assert turns[:8] == first
    assert turns[8] == "timm_vit float32"  # and what failed there is not asked again
    assert turns[9:] == first[5::-1]
    record = json.loads((tmp_path / "step-cpu.json").read_text())
    rows = {(row["peer"], row["precision"]): row for row in record["rows"]}
    for peer in ("eit_lab", "literal"):
        for precision in ("float32", "bfloat16"):
            row = rows[peer, precision]
            assert len(row["seconds"]) == 2
            assert min(row["seconds"]) > 0
            assert row["macs"] == 25_115_982
    assert rows["timm_vit", "float32"]["seconds"] == rows["timm_vit", "bfloat16"]["seconds"] == []
    assert rows["timm_vit", "float32"]["lost"] == "out of memory"
    assert [row["precision"] for row in record["products"]] == ["bfloat16", "float32"]
    assert {"date", "commit", "machine", "threads", "packages", "load", "command"} <= record.keys()
    text = (tmp_path / "step-cpu.md").read_text()
    assert text == tables(record)
    assert "| eit_nano | timm ViT | float32 | out of memory |" in text
    assert text in capsys.readouterr().out


def test_a_spent_budget_leaves_sizes_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_worker() -> None:
        raise AssertionError("no process is started")

    monkeypatch.setattr(measuring, "Worker", no_worker)
    options = read_options(["models=eit_nano", "budget=1", "peers=eit_lab", "device=cpu"], verb="step")
    times = iter((0.0, 2.0))
    monkeypatch.setattr("eit_lab.benchmark.speed.measuring.time.monotonic", lambda: next(times))
    found = measuring.measure(options, lambda step, done, total: None)
    assert {row["lost"] for row in found["rows"]} == {"left out: the budget of 1 s was spent"}


# ------------------------------------------------------------------------------------------------------- goals and tables


def made_row(peer: str, precision: str, seconds: list[float], **changes: Any) -> dict[str, Any]:
    told = read_peer(peer)
    return {
        "model": "eit_base", "peer": peer, "precision": precision, "seconds": seconds, "macs": 10**9, "params": 1, "img_size": 224,
        "made": "Module", "kept": False, "compiled": None, "steps": 1, "first_s": 1.0, "first_loss": 6.9, "memory_bytes": 10**9,
        "lost": None, "label": told.label, "what": told.what, "ours": told.kind == "eit_lab", **changes,
    }  # fmt: skip


def made_record(rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """Batch 8 of 1 GMAC: a step is 48 GFLOP; the product runs at 96 GFLOP/s in float32 and 480 in bfloat16."""
    products = [
        {"model": "eit_base", "precision": p, "seconds": [seconds, seconds], "macs": 1000**3}
        for p, seconds in (("float32", 2 / 96), ("bfloat16", 2 / 480))
    ]
    return {
        "kind": "step", "device_kind": "cpu", "device": "cpu", "machine": "AMD", "instructions": ["avx2"], "threads": 2, "rows": rows,
        "products": products, "peak_flops": {"bfloat16": None}, "precision": ["float32", "bfloat16"], "batch": 8, "img_size": 224,
        "rounds": 2, "models": ["eit_base"], "idle_cpu_share": 0.0, "load": [0.0, 1.0], "command": "x", "date": "2026-01-01",
        "commit": "abc", "changed": False, "python": "3.11", "eit_lab": "0.1.0", "packages": {"torch": "2.14.1"}, **changes,
    }  # fmt: skip


def step_record(**changes: Any) -> dict[str, Any]:
    rows = [
        made_row("eit_lab", "float32", [1.0, 2.0], memory_bytes=6 * 10**8),
        made_row("eit_lab", "bfloat16", [0.5, 0.5], memory_bytes=7 * 10**8),
        made_row("literal", "float32", [2.0, 4.4]),
        made_row("literal", "bfloat16", [0.8, 0.8]),
        made_row("convit", "float32", [], lost="out of memory"),
    ]
    return made_record(rows, **changes)


def test_each_goal_is_judged_by_ratios_within_a_round_beside_its_roof() -> None:
    found = {(one.goal.kind, one.goal.precision, one.goal.against_precision): one for one in judge(step_record())}
    plain = found["time", "float32", "float32"]
    assert plain.measured == pytest.approx((2.1, 2.0, 2.2))
    assert plain.met
    assert plain.roof == pytest.approx(3.2 / 0.5)  # its 48 GFLOP at 96 GFLOP/s
    half = found["time", "bfloat16", "bfloat16"]
    assert half.measured == pytest.approx((1.6, 1.6, 1.6))
    assert half.met is False
    assert half.roof == pytest.approx(0.8 / 0.1)
    across = found["time", "bfloat16", "float32"]
    assert across.measured == pytest.approx((6.4, 4.0, 8.8))
    assert across.met
    assert found["memory", "float32", "float32"].met
    assert found["memory", "bfloat16", "bfloat16"].met is False
    assert len(found) == 5
    slow = step_record()
    for product in slow["products"]:
        product["seconds"] = [1.0, 1.0]  # 2 GFLOP/s: the floor is 24 s
    assert {one.beyond for one in judge(slow) if one.goal.kind == "time"} == {True}
    assert not any(one.beyond for one in judge(step_record()))


def test_goals_hold_for_the_batch_and_sizes_they_were_set_for() -> None:
    assert judge(step_record(img_size=32)) == []
    assert judge(step_record(batch=16)) == []
    other = step_record()
    for row in other["rows"]:
        row["model"] = "eit_tiny"
    assert judge(other) == []
    assert "No goal is set" in tables(step_record(img_size=32))


def test_what_was_not_measured_is_no_goal_met() -> None:
    record = step_record()
    record["rows"][2]["seconds"], record["rows"][2]["lost"] = [], "ended by the system"
    verdict = next(one for one in judge(record) if one.goal.against_precision == "float32")
    assert (verdict.measured, verdict.met, verdict.why) == (None, None, "literal: ended by the system")
    del record["rows"][2]
    assert "literal: was not measured" in tables(record)


def test_on_a_gpu_rates_and_the_share_of_the_peak_are_goals_too() -> None:
    rows = [
        made_row("eit_lab", "bfloat16", [0.1, 0.1], model="eit_large"),
        made_row("literal", "bfloat16", [0.32, 0.30], model="eit_large"),
        made_row("timm_vit:compile=max-autotune", "bfloat16", [0.1, 0.1], model="eit_large", macs=2 * 10**9),
    ]
    product = {"model": "eit_large", "precision": "bfloat16", "seconds": [0.001], "macs": 10**9}  # 2 TFLOP/s
    record = made_record(
        rows, device_kind="cuda", device="NVIDIA H100 80GB HBM3", peak_flops={"bfloat16": 4e12}, batch=256, products=[product],
        precision=["bfloat16"],
    )  # fmt: skip
    found = {one.goal.kind: one for one in judge(record)}
    assert found["time"].measured == pytest.approx((3.1, 3.0, 3.2))
    assert found["time"].met
    assert found["rate"].measured == pytest.approx((0.5, 0.5, 0.5))
    assert found["rate"].met is False
    assert found["rate"].roof == pytest.approx(2e12 / (6 * 2e9 * 256 / 0.1))
    assert found["rate"].beyond  # here a large product is slower than what it is held against
    assert found["peak"].measured[0] == pytest.approx(6e9 * 256 / 0.1 / 4e12)
    assert found["peak"].met
    text = tables(record)
    assert "of the peak" in text
    assert "share of the device's dense peak | >= 25% | 384.0%" in text
    assert slug(record["device"]) == "h100-80gb-hbm3"


def test_the_tables_have_every_figure_and_the_page_draws_the_same() -> None:
    text = tables(step_record())
    assert (
        "| eit_base | eit_lab | float32 | 1.50 s (1.00 to 2.00) | 5.3 | 32 GFLOP/s | 33.3% | 0.60 | 2.10 (2.00 to 2.20) | 6.40 |"
        in text
    )
    assert (
        "| eit_base | literal | bfloat16 | 800 ms (800 to 800) | 10.0 | 60 GFLOP/s | 12.5% | 1.00 | 1 | 8.00 |" in text
    )
    assert "| eit_base | timm ConViT | float32 | out of memory |" in text
    assert "| eit_base | bfloat16: times as fast as literal | >= 1.7 | 1.60 | 8.00 | MISSED |" in text
    assert (
        "| eit_base | bfloat16: times as fast as literal in float32 | >= 4 | 6.40 (4.00 to 8.80) | 32.00 | met |"
        in text
    )
    assert (
        "a 1000 x 1000 matrix product (torch's or ours, the faster) in bfloat16, in the same rounds beside eit_base: 480 GFLOP/s"
        in text
    )
    assert page_section(step_record()) == text.replace("# Training step on cpu", "### Training step on cpu")


def test_the_start_is_judged_against_imports_and_a_model_by_hand() -> None:
    starts = {
        "eit_lab": {"seconds": [6.0, 5.2], "cpu_seconds": [5.0, 5.0]},
        "by_hand": {"seconds": [4.0, 4.0], "cpu_seconds": [4.0, 4.0]},
        "by_hand_with_step": {"seconds": [5.0, 5.0], "cpu_seconds": [4.5, 4.5]},
    }
    imports = {"eit_lab": {"torch": 2.0, "hydra": 0.4, "all": 2.5}, "by_hand": {"torch": 2.1, "rich": 0.01, "all": 2.2}}
    record = made_record(
        [], kind="startup", starts=starts, imports=imports, model="eit_mini", params=3, train=["python"]
    )
    goal = goal_row(record)
    assert (goal.measured, goal.verdict) == ("1.40 (1.30 to 1.50)", "MISSED")
    text = page_section(record)
    assert (
        "| eit_lab.train, until its first step has ended | 5.60 (5.20 to 6.00) | 5.00 | 1.40 (1.30 to 1.50) | 1.12 (1.04 to 1.20) |"
        in text
    )
    assert "| hydra | 0.40 |  |" in text
    assert "rich" not in text  # less than 20 ms
    report = (
        "import time: self [us] | cumulative | imported package\nimport time:      1500 |      90000 |   torch._C\n"
    )
    assert _imports(f"{report}import time:       500 |        500 | torch\nother words\n") == {
        "torch": 0.002,
        "others": 0.0,
        "all": 0.002,
    }


# ---------------------------------------------------------------------------------------------------------------- command


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["step", "model=eit_base"], "bench step takes models, precision, batch"),
        (["model", "models=eit_huge"], "create_model: model must be one of"),
        (["step", "models=vit_s16"], "models must have EIT's stem and depthwise convolutions"),
        (["step", "models=eit_nano,eit_nano"], "models must name each once, got eit_nano,eit_nano"),
        (["step", "precision=float16"], "precision must be of float32, bfloat16, got 'float16'; nearest: bfloat16"),
        (["model", "device=gpu"], "device must be one of auto, cpu, cuda, got 'gpu'"),
        (["step", "batch=0"], "batch must be a whole number of 1 or more, got '0'; nearest: 1"),
        (["step", "models=eit_nano", "peers=litteral"], "got 'litteral'; nearest: literal"),
        (["startup", "rounds=x"], "rounds must be a whole number of 1 or more, got 'x'"),
        (["startup", "models=eit_mini"], "bench startup takes model, rounds, out as key=value"),
    ],
)
def test_a_wrong_word_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.slow
def test_the_commands_measure_in_processes_of_their_own_and_keep_records(command, tmp_path: Path) -> None:
    for verb, peers in (("step", "eit_lab,literal,literal:memory=kept,convit"), ("model", "eit_lab,vit_b_16")):
        done = command(
            "bench", verb, "models=eit_nano", "batch=2", "img_size=32", "rounds=1", f"peers={peers}", "out=out"
        )
        assert done.status == 0, done.err
        record = json.loads((tmp_path / "out" / f"{verb}-cpu.json").read_text())
        rows = {(row["peer"], row["precision"]): row for row in record["rows"]}
        assert len(rows) == 2 * len(peers.split(","))
        assert all(len(row["seconds"]) == 1 and row["memory_bytes"] for row in rows.values())
        kept = {peer: rows[peer, "float32"]["kept"] for peer in peers.split(",")}
        assert kept == {peer: peer in ("eit_lab", "literal:memory=kept") for peer in kept}
        assert record["idle_cpu_share"] < 0.05
    done = command("bench", "startup", "model=eit_nano", "rounds=1", "out=out")
    assert done.status == 0, done.err
    record = json.loads((tmp_path / "out" / "startup-cpu.json").read_text())
    assert record["starts"]["eit_lab"]["seconds"][0] > 1
    assert record["imports"]["eit_lab"]["all"] > record["imports"]["eit_lab"]["torch"] > 0
    assert record["params"] == sum(
        p.numel() for p in create_model("eit_nano", num_classes=10, img_size=32).parameters()
    )
