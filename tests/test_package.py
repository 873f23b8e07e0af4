"""The package as others get it: the console script, its completion, the wheel in a place of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def complete(line: str) -> list[str]:
    script = Path(sys.executable).parent / "eit-lab"
    done = subprocess.run(
        [script, "-sc", "query=bash"],
        env={**os.environ, "COMP_LINE": line, "COMP_POINT": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
def test_tab_completes_commands_groups_options_and_keys() -> None:
    assert complete("eit-lab tr") == ["train"]
    assert "model=eit_base" in complete("eit-lab train model=eit_")
    assert "model/stem=conv3" in complete("eit-lab train model/stem=conv")
    assert "model.ib.strength=" in complete("eit-lab train data=digits model.ib.st")
    installed = subprocess.run(
        [Path(sys.executable).parent / "eit-lab", "-sc", "install=bash"], capture_output=True, text=True, check=True
    ).stdout
    assert installed.rstrip().endswith("eit-lab")
    assert subprocess.run(["bash", "-n"], input=installed, text=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        ([], 0, "evaluate"),
        (["--version"], 0, "eit_lab 0."),
        (["trian"], 2, "nearest: train"),
        (["train", "model=eit_bse"], 2, "nearest: eit_base"),
    ],
)
def test_the_console_script_has_the_same_commands(
    args: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from eit_lab.cli import main

    assert main(args) == status
    out, err = capsys.readouterr()
    assert words in out + err


def build_wheel(folder: Path) -> Path:
    # The wheel's own build tools are installed already: no network.
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_the_wheel_carries_its_config_and_runs_from_any_folder(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel], check=True
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "eit_lab.train", "data=digits", "--cfg", "job"],
        cwd=elsewhere, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "kind: digits" in done.stdout
    where = "import eit_lab.compose as c; print(c.conf_dir())"
    found = subprocess.run(
        [sys.executable, "-c", where],
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == str(site / "eit_lab" / "conf")
    assert sorted(p.relative_to(site / "eit_lab/conf") for p in (site / "eit_lab/conf").rglob("*.yaml")) == sorted(
        p.relative_to(ROOT / "conf") for p in (ROOT / "conf").rglob("*.yaml")
    )


@pytest.mark.slow
def test_the_wheel_trains_in_an_empty_environment(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["PIP_CONSTRAINT"] = str(ROOT / "constraints.txt")
    subprocess.run([python, "-m", "pip", "install", "-q", wheel], check=True, env=environment)
    done = subprocess.run(
        [python, "-m", "eit_lab.train", "model=eit_nano", "data=digits", "recipe=small", "recipe.epochs=1"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "test top-1" in done.stdout
    script = subprocess.run(
        [tmp_path / "env" / "bin" / "eit-lab", "--version"], capture_output=True, text=True, check=True
    )
    assert script.stdout.startswith("eit_lab 0.")


def test_no_package_host_and_no_machines_path_in_any_tracked_file() -> None:
    tracked = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=False
    ).stdout.split("\0")
    banned = re.compile(
        "|".join(("py" + r"pi\.org", "python" + "hosted", "file:" + "///", "/ho" + "me/", "index-" + "url"))
    )
    for name in filter(None, tracked):
        path = ROOT / name
        if path.suffix in (".py", ".toml", ".txt", ".yaml", ".md", "") and path.is_file():
            assert not banned.search(path.read_text(errors="replace")), name
