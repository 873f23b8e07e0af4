"""Dashboards: panels that read what runs log, a save to a server, and the same runs in a local web view that follows them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import chromium
from conftest import TINY, only_run, record_of
from eit_lab.dashboard import workspace
from eit_lab.dashboard.__main__ import main
from eit_lab.dashboard.panels import ANALYSIS, build_sections, logged_names
from made_runs import made_record, write_run, write_sweep
from wandb_server import WandbServer

HOSTILE = """<img src=x onerror="window.owned=1">'";{{7*7}}`$(id)` ![a](/leak) [b](javascript:owned())</script>"""


def wandb_env(server: WandbServer, folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return {
        **kept,
        "WANDB_BASE_URL": server.url,
        "WANDB_API_KEY": "0" * 40,
        "WANDB_CONFIG_DIR": str(folder / "config"),
        "WANDB_CACHE_DIR": str(folder / "cache"),
        "HOME": str(folder),
        "NETRC": str(folder / "netrc"),
    }


# -------------------------------------------------------------------------------------------------------------- panels


@pytest.mark.slow
def test_every_name_on_the_panels_is_one_that_a_real_run_logs(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eit_lab.config import Config
    from eit_lab.train import main as train
    from eit_lab.training import energy
    from test_energy import two_packages

    two_packages(here / "powercap")
    monkeypatch.setattr(energy, "POWERCAP", here / "powercap")
    monkeypatch.setattr(Config, "reference", "mini")  # as on ImageNet
    monkeypatch.setattr("eit_lab.training.curve.draw", lambda *_, **__: None)  # a picture takes a second
    words = [word for word in TINY if not word.startswith("logger=")]
    words += ["logger=wandb", "logger.mode=online", "recipe.ema_decay=0.9", "run.arm=an arm", "run.sweep=a-sweep"]
    words += ["trainer.peak_tflops=1.0", "trainer.log_every_n_steps=1", "logger.mistakes=2"]
    with WandbServer() as server:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            monkeypatch.delenv(name)
        for name, value in wandb_env(server, here).items():
            monkeypatch.setenv(name, value)
        assert train(words) == 0
        ((_, run),) = server.runs.items()
    assert run.facts["jobType"] == "an arm", "what the panels group by"
    assert run.facts["groupName"] == "a-sweep", "what a sweep's dashboard filters by"
    has = {
        "row": {name for row in run.history for name in row},
        "summary": set(run.summary),
        "config": set(flat(run.config)),
        "image": {name for name, value in run.summary.items() if "image-file" in str(value)},
    }
    wanted = set(logged_names(build_sections()))
    assert len(wanted) > 30
    assert {(kind, name) for kind, name in wanted if name not in has[kind]} == set()
    inside = {f"analysis/{name}" for figures in ANALYSIS.values() for name in figures}
    assert inside <= has["row"] & has["summary"]

    folder = only_run(here / "runs")
    columns = set((folder / "metrics.csv").read_text().splitlines()[0].split(","))
    assert {name for kind, name in wanted if kind == "row"} <= columns
    record = record_of(folder)
    facts = {**record, **record["result"], **{f"cost/{name}": value for name, value in record["cost"].items()}}
    means = {f"analysis/{name}": value for name, value in record["analysis"]["means"].items()}
    assert {name for kind, name in wanted if kind == "summary"} <= set(facts) | set(means)
    assert {name: run.summary[name] for name in means} == pytest.approx(means)
    assert run.summary["analysis/seconds"] == record["analysis"]["seconds"]
    assert run.summary["energy_wh"] == record["energy_wh"] == 0.0
    assert run.summary["energy_source"] == record["energy_source"] == "rapl"
    assert run.summary["hours"] == pytest.approx(record["hours"])


def flat(config: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")


def sections_of(plain: dict[str, Any]) -> list[dict[str, Any]]:
    return plain["spec"]["section"]["panelBankConfig"]["sections"]


def test_workspace_and_report_are_json_with_every_section_and_the_same_to_the_last_byte(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out == "dashboard/workspace.json\ndashboard/report.json\n"
    assert main(["out=again"]) == 0
    for name in ("workspace.json", "report.json"):
        assert (here / "dashboard" / name).read_bytes() == (here / "again" / name).read_bytes()
    plain = json.loads((here / "dashboard" / "workspace.json").read_text())
    names = ["Training", "Ablation", "Frequency", "Heads", "Cost", "Comparison of runs"]
    assert [section["name"] for section in sections_of(plain)] == names
    section = plain["spec"]["section"]
    assert section["settings"]["xAxis"] == "images"
    assert section["runSets"][0]["grouping"] == [{"section": "run", "name": "jobType"}]
    by_title = {panel["config"].get("chartTitle"): panel for one in sections_of(plain) for panel in one["panels"]}
    assert by_title["validation top-1 by arm, mean and std over seeds"]["config"] == {
        "chartTitle": "validation top-1 by arm, mean and std over seeds", "xAxis": "images", "metrics": ["val/acc1"],
        "yLogScale": False, "groupBy": "jobType", "groupAgg": "mean", "groupArea": "stddev", "limit": 200, "aggregate": True,
    }  # fmt: skip
    assert by_title["test/acc1 against MACs"]["config"]["xAxis"] == "summary:cost/macs"
    assert by_title["what test/acc1 goes with"]["config"]["columns"][2] == {
        "accessor": "config:model.value.ib.strength"
    }
    panels_of = [len(section.panels) for section in build_sections()]
    assert [len(section["panels"]) for section in sections_of(plain)] == panels_of
    report = json.loads((here / "dashboard" / "report.json").read_text())["spec"]
    grids = [block["metadata"] for block in report["blocks"] if block["type"] == "panel-grid"]
    assert [len(grid["panelBankSectionConfig"]["panels"]) for grid in grids] == panels_of
    assert all(grid["runSets"][0]["grouping"] == [{"section": "run", "name": "jobType"}] for grid in grids)
    headings = [block["children"][0]["text"] for block in report["blocks"] if block["type"] == "heading"]
    assert headings == names


def test_a_sweeps_dashboard_has_its_runs_its_arms_and_what_it_compares(here: Path) -> None:
    declaration = {"name": "004-strength", "question": "How much?", "factor": ["model.ib"], "metric": "test/acc1_ema"}
    records = [made_record(arm, seed, 0.9) for arm in ('a "quoted" arm', "eit") for seed in (0, 1)]
    for record in records:
        record["config"]["logger"] = {"project": "ours", "entity": "lab"}
    folder = write_sweep(here / "runs", "004-strength", records, declaration=declaration)
    assert main([f"sweep={folder}"]) == 0
    plain = json.loads((here / "dashboard" / "workspace.json").read_text())
    assert (plain["project"], plain["entity"]) == ("ours", "lab")
    assert plain["displayName"] == "eit_lab: 004-strength"
    section = plain["spec"]["section"]
    (group,) = section["runSets"][0]["filters"]["filters"]
    assert (group["key"], group["op"], group["value"]) == ({"section": "run", "name": "group"}, "=", "004-strength")
    colours = {urllib.parse.unquote(key): colour for key, colour in section["customRunColors"].items()}
    assert sorted(colours.values()) == ["#0072B2", "#E69F00"]
    assert any(r'"value":"a \"quoted\" arm"' in key for key in colours)
    text = json.dumps(plain)
    assert "summary:test/acc1_ema" in text
    columns = next(
        panel["config"]["columns"] for one in sections_of(plain) for panel in one["panels"] if "columns" in panel["config"]
    )  # fmt: skip
    assert [column["accessor"] for column in columns] == [
        "config:model.value.ib.rule", "config:model.value.ib.strength", "config:model.value.ib.kernel_size", "config:seed.value",
        "summary:test/acc1_ema",
    ]  # fmt: skip
    assert "How much?" in (here / "dashboard" / "report.json").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sav=true"], "got 'sav=true'; nearest: save"),
        (["vew", "runs"], "got 'vew'; nearest: view"),
        (["save=yes"], "save must be true or false, got 'yes'"),
        (["timeout=soon"], "timeout must be a number of seconds above 0, got 'soon'"),
        (["sweep=nowhere"], "'nowhere' must be the folder of a sweep, and has no sweep.json"),
        (["out=a-file/below"], "out must be a folder that can be written, got 'a-file/below': Not a directory"),
        (["view", "nowhere"], "dashboard view: no folder 'nowhere'"),
        (["view", ".", "port=http"], "port must be a number from 0 to 65535, got 'http'"),
        (["view", ".", "prt=1"], "dashboard view takes port as key=value, got 'prt=1'; nearest: port"),
    ],
)
def test_what_is_wrong_is_one_line(words: list[str], said: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "a-file").touch()
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("eit_lab: ")
    assert err.count("\n") == 1
    assert said in err


def test_a_port_that_is_taken_is_one_line_with_the_next_that_is_free(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with WandbServer() as other:
        port = int(other.url.rpartition(":")[2])
        assert main(["view", ".", f"port={port}"]) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(rf"eit_lab: port must be one that is free on 127\.0\.0\.1, got {port}; nearest: \d+\n", err), (
        err
    )


@pytest.mark.parametrize("found", ["0.4.12", "0.5.0", "1.0", None])
def test_a_library_of_another_version_or_none_is_one_line(
    found: str | None, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def version(name: str) -> str:
        assert name == "wandb-workspaces"
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(workspace.metadata, "version", version)
    assert main([]) == 2
    told = f"of 0.4.13 or later, below 0.5, got {found}" if found else "which is not installed"
    need = "wandb-workspaces," if found is None else "wandb-workspaces"
    assert capsys.readouterr().err == (f"eit_lab: dashboard needs {need} {told}: pip install 'eit_lab[dashboard]'\n")
    assert not (here / "dashboard").exists()
    monkeypatch.setattr("eit_lab.dashboard.view.find_spec", lambda name: None)
    assert main(["view", "."]) == 2
    assert capsys.readouterr().err == (
        "eit_lab: dashboard view needs TensorBoard, which is not installed: pip install 'eit_lab[dashboard]'\n"
    )


def test_the_extra_asks_for_the_versions_that_the_code_takes() -> None:
    extras = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    lowest, above = (".".join(map(str, version)) for version in workspace.VERSIONS)
    for extra in ("dashboard", "dev"):
        assert f"wandb-workspaces>={lowest},<{above}" in extras[extra]


# ---------------------------------------------------------------------------------------------------------------- save


def write_dashboard(folder: Path, *words: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "eit_lab.dashboard", *words],
        cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def without_ids(plain: Any) -> Any:
    """A specification without what is drawn at random, or only known by a server."""
    if isinstance(plain, dict):
        return {
            key: without_ids(value)
            for key, value in plain.items()
            if key not in ("__id__", "id", "project", "customRunColors")
        }
    return [without_ids(item) for item in plain] if isinstance(plain, list) else plain


@pytest.mark.slow
def test_a_save_puts_on_the_server_what_the_files_have(tmp_path: Path) -> None:
    with WandbServer() as server:
        done = write_dashboard(tmp_path, "save=true", env=wandb_env(server, tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert server.unknown == []
    by_type = {view["type"]: view for view in server.views.values()}
    assert sorted(by_type) == ["project-view", "runs"]
    for kind, name in (("project-view", "workspace"), ("runs", "report")):
        view, plain = by_type[kind], json.loads((tmp_path / "dashboard" / f"{name}.json").read_text())
        assert (view["entityName"], view["projectName"]) == ("lab", "eit_lab"), "the default entity of who is logged in"
        assert view["displayName"] == plain["displayName"]
        assert without_ids(view["spec"]) == without_ids(plain["spec"])
    lines = done.stdout.splitlines()
    assert lines[2].startswith(f"workspace {server.url}/lab/eit_lab?nw=")
    assert lines[3].startswith(f"report    {server.url}/lab/eit_lab/reports/")


@pytest.mark.slow
def test_a_server_that_is_not_there_is_one_line_and_the_files_are_written(tmp_path: Path) -> None:
    with WandbServer() as server:
        env = wandb_env(server, tmp_path)
    done = write_dashboard(tmp_path, "save=true", env=env)
    assert done.returncode == 1
    assert done.stderr == (
        f"eit_lab: W&B: not saved: {server.url} cannot be reached: Connection refused; what was to be saved is in dashboard\n"
    )
    assert sections_of(json.loads((tmp_path / "dashboard" / "workspace.json").read_text()))


@pytest.mark.slow
def test_a_second_save_replaces_the_first_and_a_server_that_refuses_is_one_line(tmp_path: Path) -> None:
    with WandbServer() as server:
        env = wandb_env(server, tmp_path)
        assert write_dashboard(tmp_path, "save=true", env=env).returncode == 0
        first = dict(server.views)
        again = write_dashboard(tmp_path, "save=true", env=env)
        assert (again.returncode, again.stderr) == (0, "")
        assert list(server.views) == list(first), "the same two, not two more"
        names = [view["name"] for view in first.values() if view["type"] == "project-view"]
        assert [view["name"] for view in server.views.values() if view["type"] == "project-view"] == names
        other = write_dashboard(tmp_path, "save=true", "project=other", env=env)
        assert other.returncode == 1
        assert "project 'lab/other' not found" in other.stderr
        server.views.clear()
        gone = write_dashboard(tmp_path, "save=true", env=env)
        assert gone.returncode == 1
        assert "dashboard/saved.json names what was to be replaced: delete it to make new ones" in gone.stderr
        assert gone.stderr.count("\n") == 1
        no_key = write_dashboard(
            tmp_path, "save=true", "out=new", env={k: v for k, v in env.items() if k != "WANDB_API_KEY"}
        )
        assert no_key.returncode == 1
        assert "No API key configured" in no_key.stderr
        for mode in ("401", "500", "hang"):
            server.mode = mode  # type: ignore[assignment]
            done = write_dashboard(tmp_path, "save=true", "out=new", "timeout=8", env=env)
            assert done.returncode == 1
            assert done.stderr.startswith("eit_lab: W&B: not saved: ")
            assert done.stderr.count("\n") == 1
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if b"eit_lab.dashboard.saving" in p.read_bytes()]
    assert left == []


# -------------------------------------------------------------------------------------------------------------- replay


@pytest.fixture
def replayed() -> Any:
    """Read event files back with TensorBoard's own reader: run -> {tag: [(step, value)]}, and what else there is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
        from tensorboard.compat.proto.event_pb2 import Event

    def read(target: Path) -> dict[str, dict[str, list[tuple[int, Any]]]]:
        runs: dict[str, dict[str, list[tuple[int, Any]]]] = {}
        for path in sorted(target.rglob("events.out.tfevents.*")):
            tags = runs.setdefault(str(path.parent.relative_to(target)), {})
            for raw in RawEventFileLoader(str(path)).Load():
                event = Event.FromString(raw)
                for value in event.summary.value:
                    kind = value.WhichOneof("value")
                    found = value.simple_value if kind == "simple_value" else value
                    tags.setdefault(value.tag, []).append((event.step, found))
        return runs

    return read


def rows(folder: Path, *lines: str) -> None:
    (folder / "metrics.csv").write_text("\n".join(["step,epoch,images,perf/hours,train/loss,val/acc1", *lines]) + "\n")


def replay(folder: Path, target: Path) -> Any:
    from eit_lab.dashboard.replay import Replay

    return Replay([folder], target)


def test_rows_are_replayed_as_they_come_each_once(here: Path, replayed: Any) -> None:
    going = write_run(here / "runs" / "a", made_record("eit", 0, 0.5, status="running"))
    rows(going, "5,0,500,0.1,2.0,", "10,0,1000,0.2,1.5,")
    board = replay(here / "runs", here / "events")
    assert board.follow() == 2
    assert board.follow() == 0
    rows(going, "5,0,500,0.1,2.0,", "10,0,1000,0.2,1.5,0.25")  # the validation of the last step
    assert board.follow() == 1
    rows(going, "5,0,500,0.1,2.0,", "10,0,1000,0.2,1.5,0.25", "15,1,1500,0.3,nan,", "20,1,2000,0.4,1.0,0.5")
    assert board.follow() == 2
    rows(
        going, "5,0,500,0.1,2.0,", "10,0,1000,0.2,1.5,0.25", "15,1,1500,0.35,1.25,"
    )  # killed, and some steps done again
    assert board.follow() == 0
    lines = ["15,1,1500,0.35,1.25,", "20,1,2000,0.45,1.0,0.5", "25,2,2500,0.5,0.75,"]
    rows(going, "5,0,500,0.1,2.0,", "10,0,1000,0.2,1.5,0.25", *lines)
    assert board.follow() == 1
    tags = replayed(here / "events")["eit/seed 0"]
    assert tags["train/loss"] == [(5, 2.0), (10, 1.5), (20, 1.0), (25, 0.75)]
    assert tags["val/acc1"] == [(10, 0.25), (20, 0.5)]
    assert "test/acc1" not in tags
    assert not {"epoch", "images", "step"} & set(tags)

    record = made_record("eit", 0, 0.5, energy_wh=12.5, hours=0.5)
    (going / "record.json").write_text(json.dumps(record))
    assert board.follow() == 1
    assert board.follow() == 0
    tags = replayed(here / "events")["eit/seed 0"]
    assert tags["test/acc1"] == [(25, 0.5)]
    assert tags["cost/macs"] == [(25, 2_500_000)]
    assert tags["cost/energy_wh"] == [(25, 12.5)]
    assert "_hparams_/session_end_info" in tags


def test_the_table_of_runs_has_arm_seed_size_strength_and_what_differs(here: Path, replayed: Any) -> None:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    def data(run: str, tag: str) -> Any:
        ((_, value),) = runs[run][tag]
        return HParamsPluginData.FromString(value.metadata.plugin_data.content)

    write_run(here / "runs" / "a", made_record("eit", 3, 0.5, strength=0.25))
    write_run(here / "runs" / "b", made_record("vit", 4, 0.5, epochs=20))
    replay(here / "runs", here / "events").follow()
    runs = replayed(here / "events")
    session = data("eit/seed 3", "_hparams_/session_start_info").session_start_info
    told = {name: getattr(value, value.WhichOneof("kind")) for name, value in session.hparams.items()}
    size, strength = {"model.size.name": "nano", "model.size.embed_dim": 128.0}, {"model.ib.strength": 0.25}
    assert told.items() >= ({"arm": "eit", "seed": 3.0, "recipe.epochs": 10.0} | size | strength).items()
    assert not [name for name in told if name.startswith(("run.", "data.root"))], "nor where it lay"
    assert session.group_name == "eit", "seeds of an arm are one line, with their mean"
    experiment = data(".", "_hparams_/experiment").experiment
    assert [info.name for info in experiment.hparam_infos] == [
        "arm", "seed", "model.size.name", "model.ib.rule", "model.ib.strength", "recipe.epochs",
    ]  # fmt: skip
    assert [info.type for info in experiment.hparam_infos] == [1, 3, 1, 1, 3, 3], "strings and numbers"
    assert experiment.metric_infos[0].name.tag == "test/acc1"
    assert "custom_scalars__config__" in runs["."]


def test_the_mean_over_finished_seeds_is_a_run_of_its_own_with_its_band(here: Path, replayed: Any) -> None:
    folders = [
        write_run(here / "runs" / str(seed), made_record("eit", seed, accuracy, status=status), curve=False)
        for seed, accuracy, status in (
            (0, 0.5, "finished"),
            (1, 0.75, "finished"),
            (2, 1.0, "running"),
            (3, 0.1, "failed"),
        )
    ]
    rows(folders[0], "10,0,1000,0.2,,0.25", "20,1,2000,0.4,,0.5", "30,2,3000,0.6,,0.5")
    rows(folders[1], "10,0,1000,0.4,,0.75", "20,1,2000,0.8,,1.0")
    rows(folders[2], "10,0,1000,0.4,,1.0")
    write_run(here / "runs" / "other", made_record("eit", 0, 0.1, strength=0.5), curve=False)
    board = replay(here / "runs", here / "events")
    board.follow()
    runs = replayed(here / "events")
    assert set(runs) == {".", "eit/mean of 2 seeds", *(f"eit/seed {n}" for n in range(4)), "eit (2)/seed 0"}
    mean = runs["eit/mean of 2 seeds"]
    assert mean["val/acc1"] == [(10, 0.5), (20, 0.75)], "at the steps that both have"
    std = 0.5 / 2**0.5
    assert [value for _, value in mean["within one std/val/acc1 lower"]] == pytest.approx([0.5 - std, 0.75 - std])
    assert [value for _, value in mean["within one std/val/acc1 upper"]] == pytest.approx([0.5 + std, 0.75 + std])
    (folders[2] / "record.json").write_text(json.dumps(made_record("eit", 2, 1.0)))
    board.follow()
    runs = replayed(here / "events")
    assert "eit/mean of 2 seeds" not in runs
    assert runs["eit/mean of 3 seeds"]["val/acc1"] == [(10, pytest.approx(2 / 3))]


def test_names_from_runs_stay_names_and_texts_stay_text(here: Path, replayed: Any) -> None:
    hostile = [HOSTILE, "../../../above", "..", "/etc", "a\0b\nc", "x" * 300]
    for number, arm in enumerate(hostile):
        record = made_record(arm, number, 0.5, status="failed", error=f"# {HOSTILE}\n\n{HOSTILE}")
        write_run(here / "runs" / str(number), {**record, "identity": str(number)})
    (here / "runs" / "torn").mkdir()
    (here / "runs" / "torn" / "record.json").write_text('{"schema": 1, "iden')
    (here / "runs" / "foreign").mkdir()
    (here / "runs" / "foreign" / "record.json").write_text('{"schema": 77}')
    board = replay(here / "runs", here / "logs" / "events")
    board.follow()
    runs = replayed(here / "logs" / "events")
    assert len(runs) == 1 + len(hostile)
    assert {path.name for path in board.left_out} == {"torn", "foreign"}
    assert {path.name for path in here.iterdir()} == {"runs", "logs"}
    assert [path.name for path in (here / "logs").iterdir()] == ["events"]
    assert all(name.count("/") == 1 and name.partition("/")[0].strip(".") for name in runs if name != ".")
    (text,) = [value.tensor.string_val[0].decode() for name in runs for _, value in runs[name].get("run", [])][:1]
    assert HOSTILE in text
    assert all(line.startswith("    ") for line in text.splitlines()), "a block of code, to Markdown"


# ---------------------------------------------------------------------------------------------------------------- view


class View:
    """The command in a process of its own."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "eit_lab.dashboard", "view", *words, "port=0"],
            cwd=folder, env={**os.environ, "TMPDIR": str(self.scratch)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            # A shell's background job ignores Ctrl-C, and what it starts would, too.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        assert self.process.stdout is not None
        self.said = [self.process.stdout.readline() for _ in range(2)]
        self.page = self.said[1].strip()
        self.url = self.page.partition("?")[0]

    def __enter__(self) -> View:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def wait_for(self, run: str) -> None:
        """Until TensorBoard has read a run, its last scalars too."""
        end = time.monotonic() + 60
        while "test/acc1" not in self.ask("data/plugin/scalars/tags").get(run, {}):
            assert time.monotonic() < end, self.ask("data/runs")
            time.sleep(0.2)

    def ask(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=20) as answer:
            return json.load(answer)


def listening(pid: int) -> set[str]:
    """The addresses (hexadecimal) on which a process listens."""
    sockets = {str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                found.add(words[1].partition(":")[0])
    return found


@pytest.mark.slow
def test_the_view_is_on_loopback_only_and_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a", made_record("eit", 0, 0.5))
    with View(tmp_path) as view:
        assert view.said[0] == "1 runs of runs; Ctrl-C ends it\n"
        assert re.match(r"http://127\.0\.0\.1:\d+/\?smoothing=0&runColorGroup=regex", view.page)
        assert listening(view.process.pid) == {"0100007F"}
        view.wait_for("eit/seed 0")
        children = Path(f"/proc/{view.process.pid}/task/{view.process.pid}/children").read_text()
        assert children == ""
        assert len(list(view.scratch.glob("eit_lab-dashboard-*"))) == 1
        view.process.send_signal(signal.SIGINT)
        out, err = view.process.communicate(timeout=20)
        assert (view.process.returncode, out, err) == (0, "ended\n", "")
        assert list(view.scratch.glob("eit_lab-dashboard-*")) == []


@pytest.mark.slow
@pytest.mark.skipif(chromium.WHERE is None, reason=chromium.MISSING)
def test_in_a_real_browser_curves_are_drawn_new_runs_appear_and_hostile_names_are_only_text(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for number, (arm, seed) in enumerate((arm, seed) for arm in ("vit", HOSTILE) for seed in (0, 1)):
        record = made_record(arm, seed, 0.5 + 0.1 * seed, error=f"{HOSTILE}\n\n# {HOSTILE}", command=[HOSTILE])
        write_run(runs / str(number), {**record, "identity": str(number)})
    with View(tmp_path) as view, chromium.Chromium() as browser:
        view.wait_for("vit/mean of 2 seeds")
        look = browser.look(view.page, width=1400, height=1000, script=LOOK)
        (tmp_path / "curves.png").write_bytes(look.png)
        assert look.facts["owned"] is False
        assert look.facts["bad"] == []
        assert "onerror=" in look.facts["text"], "the name is there, letter by letter"
        for words in ("vit/mean of 2 seeds", "vit/seed 1", "val/acc1", "train/loss"):
            assert words.replace(" ", "") in look.facts["text"]
        assert look.facts["lines"] > 4
        for page in ("text", "hparams", "custom_scalars", "scalars"):
            look = browser.look(f"{view.url}#{page}", width=1400, height=1000, script=LOOK)
            (tmp_path / f"{page}.png").write_bytes(look.png)
            assert look.facts["owned"] is False
            assert look.facts["bad"] == [], page
            assert "onerror=" in look.facts["text"], page
            outside = [url for url in look.requests if not url.startswith((view.url, "data:", "blob:"))]
            assert outside == []
            assert not [url for url in look.requests if "/leak" in url]
        record = made_record("late", 7, 0.5)
        write_run(runs / "late", record)
        view.wait_for("late/seed 7")
        look = browser.look(f"{view.url}#timeseries", width=1400, script=LOOK)
        assert "late/seed7" in look.facts["text"]


# Waits for the page to settle (TensorBoard draws late), walks through shadow roots too, and says what it found; texts
# come without white space, since TensorBoard cuts names into pieces.
LOOK = """
(async () => {
  const walk = (root, found) => {
    for (const node of root.querySelectorAll("*")) { found.push(node); if (node.shadowRoot) walk(node.shadowRoot, found); }
    return found;
  };
  const shown = (nodes) => nodes.filter((n) => n.localName !== "style" && n.localName !== "script");
  const text = (nodes) => shown(nodes).flatMap((n) => [...n.childNodes].filter((c) => c.nodeType === 3)).map((c) => c.data)
    .join("").replace(/\\s+/g, "");
  let nodes = [], before = -1, calm = 0;
  for (let tries = 0; tries < 60 && calm < 6; tries++) {
    await new Promise((done) => setTimeout(done, 500));
    nodes = walk(document, []);
    calm = nodes.length === before && nodes.length > 200 && text(nodes).includes("seed") ? calm + 1 : 0;
    before = nodes.length;
  }
  const bad = nodes.filter((n) => [...n.attributes].some((a) => a.name.startsWith("on-") ? false : /^on[a-z]+$/.test(a.name))
    || (n.localName === "img" && /\\/leak|^x$/.test(n.getAttribute("src") || "")) || /^javascript:/.test(n.getAttribute("href") || ""));
  return {
    owned: window.owned === 1, bad: bad.map((n) => n.outerHTML.slice(0, 200)), text: text(nodes),
    lines: nodes.filter((n) => n.localName === "canvas" || n.localName === "path").length,
  };
})()
"""
