"""Every wrong input is one line, in time; every shipped YAML composes; the axes compose freely."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Done
from eit_lab.compose import compose_model, compose_one, compose_points, conf_dir
from eit_lab.config import Config, ConfigError
from eit_lab.loading import dump, field_help, load

Command = Callable[..., Done]
WRONG = [
    (["model=eit_bse"], "model must be one of", "got 'eit_bse'; nearest: eit_base"),
    (["model/size=bse"], "model/size must be one of", "got 'bse'; nearest: base"),
    (["data=cifar"], "data must be one of", "got 'cifar'; nearest: cifar10"),
    (["modle=eit_base"], "modle is not a key", "nearest: model"),
    (["model.ib.strenght=1"], "model.ib.strenght is not a key, got 1", "nearest: model.ib.strength"),
    (["+trainer.devicess=1"], "trainer.devicess is not a key, got 1", "nearest: trainer.devices"),
    (["model.ib.strength=1.5"], "model.ib.strength must be less than or equal to 1, got 1.5", "nearest: 1"),
    (["model.ib.rule=decresing"], "model.ib.rule must be one of none, constant", "nearest: decreasing"),
    (["model.ib.kernel_size=4"], "model.ib.kernel_size must be odd", "got 4; nearest: 5"),
    (["model.size.embed_dim=401"], "must be a multiple of model.size.num_heads (16), got 401", "nearest: 400"),
    (["model.ib.attn_dims=[1,2]"], "model.ib.attn_dims belongs to model.ib.rule=custom", ""),
    (["model/stem=conv3", "model.stem.depth=9"], "model.stem.depth must be less than or equal to 5, got 9", "nearest: 5"),
    (["model.stem.depth=3"], "model.stem.depth is not a key", "model.stem.kernel_size"),
    (["trainer.max_steps=many"], "trainer.max_steps must be an integer, got 'many'", ""),
    (["trainer.devices=1.5"], "trainer.devices must be an integer or text or a list, got 1.5", ""),
    (["trainer.precision=bf16"], "trainer.precision must be one of", "nearest: bf16"),
    (["recipe.lr=0"], "recipe.lr must be greater than 0, got 0", "nearest: just above 0"),
    (["recipe.lr=${recipe.nothing}"], "recipe.lr: Interpolation key 'recipe.nothing' not found", ""),
    (["seed=-1"], "seed must be greater than or equal to 0, got -1", "nearest: 0"),
    (["seed=true"], "seed must be an integer, got True", ""),
    (["seed=0,1"], "seed=0,1: a list of values is a sweep, and needs -m", ""),
    (["data.mean=[0.5]"], "data.mean must have data.in_chans (3) entries, got [0.5]", ""),
    (["logger.mode=onlin"], "logger.mode must be one of offline, online, got 'onlin'", "nearest: online"),
    (["model=null"], "model must be the name of an option, got null", ""),
    (["data=digits", "model.stem.pool=20"], "model.stem.pool must leave a token: the convolution makes 9 of 8 px, got 20", "nearest: 9"),
    (["data=digits", "data.std=[0.0]"], "data.std[0] must be greater than 0, got 0.0", "nearest: just above 0"),
    (["data=cifar10", "data.num_classes=5"], "data.num_classes must be 10 for cifar10, got 5", ""),
    (["trainer.devices=[]"], "trainer.devices must be", "got []"),
    (["--experimental-rerun", "x"], "--experimental-rerun is not supported", ""),
    (["--cfg", "job", "-m", "seed=0,1"], "--cfg shows the config of one run", ""),
    (["--config-name", "foo"], "--config-name must be train, got 'foo'", ""),
    (["trainer.devices=0"], "trainer.devices must be 1 or more, or -1 for all, got 0", "nearest: 1"),
    (["trainer.strategy=dpp"], "trainer.strategy must be one of auto, ddp", "nearest: ddp"),
    (["trainer.accelerator=gpus"], "trainer.accelerator must be one of", "nearest: gpu"),
    (["trainer.devices=3"], "must divide the global recipe.batch_size (512, in pairs), got 3", "nearest: 2 and 4"),
    (["data=digits", "recipe.batch_size=4096"], "at most the number of training images (1294), got 4096", "nearest: 1294"),
    (["-m", "data=digits", "recipe.batch_size=16,4096"], "at most the number of training images (1294), got 4096", ""),
    (["nonsense"], "'nonsense' is not an override", ""),
    (["--cfgg", "job"], "command line: ", "--cfgg"),
    (["-m", "seed=0,1", "model.ib.strength=0,0.5,1.5"], "model.ib.strength must be less than", "[at seed=0 model.ib.strength=1.5]"),
    (["-m", "model=vit_mini,lsra_mni", "seed=0,1"], "got 'lsra_mni'; nearest: lsra_mini", "[at model=lsra_mni seed=0]"),
    (["-m", "model.ib.strength=interval(0,1)"], "an interval has no list of values", ""),
    (["-m", "data=digits", "seed=0,0"], "the points of a sweep must be different runs", "'seed=0'"),
    (["-m", "data=digits", "seed=0,1", "hydra/launcher=basic"], "hydra/launcher must be one of process", ""),
]  # fmt: skip


@pytest.mark.parametrize(("args", "message", "hint"), WRONG, ids=[" ".join(args) for args, _, _ in WRONG])
def test_a_mistake_is_one_line_and_exit_status_2(
    args: list[str],
    message: str,
    hint: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from eit_lab.train import main

    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("eit_lab: ")
    assert err.count("\n") == 1
    assert message in err
    assert hint in err
    assert not list(tmp_path.rglob("*record.json"))


@pytest.mark.parametrize(
    "args",
    [
        ["model.ib.strength=2"],
        pytest.param(["model=eit_bse"], marks=pytest.mark.slow),
        pytest.param(["-m", "model=vit_mini,eit_mini", "seed=0,1,x"], marks=pytest.mark.slow),
        ["--help"],
        pytest.param(["--cfg", "job"], marks=pytest.mark.slow),
    ],
)
def test_an_answer_comes_before_torch_and_within_a_second(command: Command, args: list[str]) -> None:
    command("train", *args)  # the first start of an interpreter reads its files from disk
    tries: list[Done] = []
    while len(tries) < 8 and not any(done.cpu_seconds < 1.0 for done in tries):  # what else the machine does only adds
        tries.append(command("train", *args))
    done = min(tries, key=lambda done: done.cpu_seconds)
    assert done.cpu_seconds < 1.0
    probe = f"import sys; from eit_lab.train import main; main({args!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False).returncode == 0
    if args[0].startswith("--"):
        assert done.status == 0
        assert done.err == ""
    else:
        assert done.status == 2
        assert done.err.count("\n") == 1


def test_no_root_for_imagenet_says_how_to_give_one(command: Command) -> None:
    done = command("train", "model=eit_base", "trainer.devices=8")
    assert done.status == 2
    assert done.err.count("\n") == 1
    for words in ("data.root=PATH", "EIT_LAB_IMAGENET", "experiment=demo", "data=digits"):
        assert words in done.err


def test_help_of_the_search_keeps_every_option_apart_from_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    from eit_lab.search.__main__ import main
    from eit_lab.search.request import SearchOptions

    assert main(["--help"]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert {field.name for field in dataclasses.fields(SearchOptions)} <= listed


def test_help_names_every_option_and_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    from eit_lab.train import main

    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for key, words, _ in field_help():
        assert f"  {key} " in text
        assert words
    for path in conf_dir().glob("model/**/*.yaml"):
        assert path.stem in text


def test_cfg_job_shows_the_composed_config_with_its_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    from eit_lab.train import main

    assert main(["--cfg", "job", "--resolve", "data=digits", "model.ib.strength=0.5"]) == 0
    text = capsys.readouterr().out
    assert "strength: 0.5" in text
    assert "name: eit_base" in text
    assert "log_every_n_steps: 20" in text


@pytest.mark.parametrize("path", [p.relative_to(conf_dir()) for p in sorted(conf_dir().rglob("*.yaml"))], ids=str)
def test_every_shipped_yaml_composes_and_loads(path: Path) -> None:
    group, option = path.parent.as_posix(), path.stem
    if group == ".":
        assert compose_one([]) == compose_one([], config_name=option)
        return
    override = f"+{group}={option}" if group == "hydra/launcher" else f"{group}={option}"
    config = compose_one([override.removeprefix("+")])
    assert isinstance(config, Config)
    assert load(dump(config)) == config


def test_axes_compose_freely_in_every_spelling() -> None:
    conv3 = compose_one(["model=eit_base", "model/stem=conv3"]).model
    assert (conv3.size.name, conv3.ib.name, conv3.stem.kind) == ("base", "eit", "conv")
    assert compose_one(["model/size=mini", "model/ib=lsra"]).model == compose_one(["model=lsra_mini"]).model
    assert compose_one(["model=vit_b16", "model/ib=eit"]).model.layer_splits()[-1] == (0, 768)
    points, _ = compose_points(["model/size=mini,base", "model/ib=none,lsra,eit"])
    assert [p.config.model.name for p in points] == [
        "vit_mini",
        "lsra_mini",
        "eit_mini",
        "vit_base",
        "lsra_base",
        "eit_base",
    ]
    points, _ = compose_points(["model.ib.strength=0,0.5,1"])
    assert [p.config.model.ib.strength for p in points] == [0, 0.5, 1]


def test_a_point_of_a_sweep_is_the_config_of_its_single_run() -> None:
    overrides = ["model=vit_mini,eit_tiny", "seed=3,7", "data=digits", "model.ib.kernel_size=3,5"]
    points, _ = compose_points(overrides)
    assert len(points) == 8
    for point in points:
        assert compose_one([*point.overrides, "data=digits"]) == point.config


def test_an_experiments_own_axes_give_way_to_the_command_line() -> None:
    points, _ = compose_points(["experiment=demo"])
    assert [p.overrides for p in points][:4] == [
        ("model=vit_nano", "seed=0"), ("model=vit_nano", "seed=1"), ("model=vit_nano", "seed=2"), ("model=lsra_nano", "seed=0"),
    ]  # fmt: skip
    assert len(points) == 9
    assert len(compose_points(["experiment=demo", "seed=5"])[0]) == 3


def test_the_users_own_config_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "model" / "ib").mkdir(parents=True)
    (tmp_path / "model" / "ib" / "mine.yaml").write_text("name: mine\nrule: constant\nstrength: 0.3\n")
    config = compose_one(["model/ib=mine"], config_dirs=[str(tmp_path)])
    assert (config.model.ib.name, config.model.ib.strength, config.model.ib.kernel_size) == ("mine", 0.3, 3)
    with pytest.raises(ConfigError, match="--config-dir must be a folder"):
        compose_one([], config_dirs=[str(tmp_path / "nothing")])


def test_configs_are_frozen_and_checked_however_they_are_made() -> None:
    model = compose_model("eit_base")
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.pos_embed = "learned"  # type: ignore[misc]
    with pytest.raises(ValueError, match="pos_embed"):
        dataclasses.replace(model, pos_embed="sinus")


def test_create_model_leaves_a_hydra_programs_own_state_alone(tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir

    (tmp_path / "theirs.yaml").write_text("answer: 42\n")
    with initialize_config_dir(version_base="1.3", config_dir=str(tmp_path)):
        compose_model("eit_base")
        assert compose("theirs").answer == 42
