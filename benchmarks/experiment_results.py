"""The results in the READMEs of experiments that have run: tables and figures of the report, drawn from records.jsonl.

    python benchmarks/experiment_results.py           # writes experiments/NNN-slug/README.md and figures/, the
                                                      # list of answers, and the front page's figure
    python benchmarks/experiment_results.py --check   # says which README would change, and which number of an
                                                      # answer is not in its results; exit status 1

Every number between the two marks comes from ``python -m eit_lab.report experiments/NNN-slug``, which anyone can run; this only
cuts the verdict, the arms, the differences, what was found inside and the cost out of its page.
"""

from __future__ import annotations

import contextlib
import csv
import io
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import evidence_figure
from eit_lab.report.__main__ import main as report
from eit_lab.report.figure import colour, line, marker, panel, save_figure, style

ROOT = Path(__file__).parents[1] / "experiments"
_BEGIN, _END = "<!-- drawn from records.jsonl by benchmarks/experiment_results.py -->", "<!-- end of results -->"
_SECTIONS = ("Verdict", "Test top-1", "Differences", "Along the factor", "Inside the network", "Cost")
_ANSWERS, _ANSWERS_END = (
    "<!-- drawn from the experiments' answers by benchmarks/experiment_results.py -->",
    "<!-- end of answers -->",
)
_SEARCH, _SEARCH_END = "<!-- drawn from search/*.csv -->", "<!-- end of the search -->"
# Figures that a README shows; the report has them all.
_FIGURES = (
    "accuracy", "factor", "inside_hfd_share", "inside_head_diversity", "inside_filters_input",
    "inside_scatter_hfd_share", "inside_scatter_head_diversity",
)  # fmt: skip


def main(argv: list[str]) -> int:
    """Write, or with --check compare, the results of every experiment that has records or a search."""
    check, changed = "--check" in argv, []
    folders = sorted(path.parent for path in ROOT.glob("*/experiment.yaml"))
    unbacked: list[str] = []
    for folder in folders:
        readme = folder / "README.md"
        wanted = readme.read_text()
        with tempfile.TemporaryDirectory() as scratch:
            if (folder / "records.jsonl").is_file():
                with contextlib.redirect_stdout(io.StringIO()):
                    if status := report([str(folder), f"out={scratch}"]):
                        return status
                text = _results((Path(scratch) / "report.md").read_text())
                wanted = _between(wanted, _BEGIN, text, _END)
                unbacked += _unbacked(f"experiments/{folder.name}/README.md", answer(wanted), text)
                if not check:
                    _copy_figures(Path(scratch) / "figures", folder / "figures", text)
        if (folder / "search").is_dir():
            wanted = _between(wanted, _SEARCH, _search(folder / "search"), _SEARCH_END)
            if not check:
                _draw_search(folder / "search")
        if wanted != readme.read_text():
            changed.append(readme)
            if not check:
                readme.write_text(wanted)
    index = ROOT / "README.md"
    wanted = _between(index.read_text(), _ANSWERS, _answers(folders), _ANSWERS_END)
    if wanted != index.read_text():
        changed.append(index)
        if not check:
            index.write_text(wanted)
    if not check and (status := evidence_figure.main()):
        return status
    front = (ROOT.parent / "README.md").read_text()
    for names, said in re.findall(r"<!-- every number is in (.+?) -->(.*?)<!-- end -->", front, re.DOTALL):
        pages = [(ROOT.parent / name).read_text() for name in names.split(" and ")]
        unbacked += _unbacked("README.md", said, "\n".join(page.partition(_BEGIN)[2] for page in pages))
    for path in changed:
        print(path.relative_to(ROOT.parent))
    for said in unbacked:
        print(said)
    return 1 if unbacked or (changed and check) else 0


def _between(text: str, begin: str, new: str, end: str) -> str:
    before, found, rest = text.partition(begin)
    assert found, f"there is no {begin}"
    return f"{before}{begin}\n\n{new}\n{end}{rest.partition(end)[2]}"


def _answers(folders: Sequence[Path]) -> str:
    """The title and the answer of every experiment that has run, a line each."""
    lines = []
    for folder in folders:
        if not (folder / "records.jsonl").is_file():
            continue
        text = (folder / "README.md").read_text()
        title = re.match(r"# \d+: (.+)\n", text)
        assert title, f"{folder.name}/README.md has no title"
        said = re.sub(r"\]\(\.\./", "](", answer(text))
        lines.append(f"- [{folder.name.partition('-')[0]}]({folder.name}) **{title[1]}.** {said}")
    return "\n".join(lines) + "\n" if lines else "None has run yet.\n"


def answer(readme: str) -> str:
    """The paragraph that answers the question of an experiment."""
    found = re.search(r"^\*\*Answer\.\*\* (.+?)(?=\n\n|\Z)", readme, re.MULTILINE | re.DOTALL)
    assert found, "there is no **Answer.**"
    return " ".join(found[1].split())


def _unbacked(name: str, said: str, results: str) -> list[str]:
    """The numbers with a fraction of an answer that the results do not have, a line each."""
    there = set(re.findall(r"[+-]?\d+\.\d+", results.replace("\\", "")))
    there |= {number.lstrip("+-") for number in there}
    return [
        f"{name} says {number}, which is not in the results"
        for number in re.findall(r"[+-]?\d+\.\d+", re.sub(r"\]\([^)]*\)", "]", said).replace("\u2212", "-"))
        if number not in there
    ]


def _read_search(folder: Path) -> tuple[str, str, dict[str, dict[float, float]], int]:
    """(objective, searched key, arm -> value of the key -> objective in percent, seeds a trial) of all tables of trials in a folder."""
    rows = [
        row
        for path in sorted(folder.glob("*.csv"))
        for row in csv.DictReader(path.read_text().splitlines())
        if row["state"] == "finished"
    ]
    objective, key = list(rows[0])[3:5]
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        found.setdefault(row["arm"], {})[float(row[key])] = 100 * float(row[objective])
    (seeds,) = {len(row["runs"].split()) for row in rows}
    return objective, key, found, seeds


def _search(folder: Path) -> str:
    """A row an arm, a column a value of the searched key; the best of a row in bold; and a link to the figure of it."""
    objective, key, found, seeds = _read_search(folder)
    values = sorted({value for of in found.values() for value in of})
    lines = [
        f"| {objective} (%) at `{key}` | {' | '.join(f'{v:g}' for v in values)} |",
        f"|---|{'---:|' * len(values)}",
    ]
    for arm, of in found.items():
        best = max(of.values())
        cells = ["-" if v not in of else f"**{of[v]:.2f}**" if of[v] == best else f"{of[v]:.2f}" for v in values]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    point = "one seed a point" if seeds == 1 else f"a point is the mean of {seeds} seeds"
    caption = f"Held-out top-1 (%) of each arm by its learning rate: {point}, best of {len(values)} marked by a ring."
    return "\n".join([*lines, "", f"![{caption}](search/learning_rate.png)", "", f"*{caption}*", ""])


def _draw_search(folder: Path) -> None:
    _, _, found, _ = _read_search(folder)
    with style():
        figure, axes = panel(width=6.2, height=3.4)
        for place, (arm, of) in enumerate(found.items()):
            x = sorted(of)
            look = {"color": colour(place), "linestyle": line(place), "marker": marker(place)}
            axes.plot(x, [of[v] for v in x], markersize=5, markeredgewidth=0, label=arm, **look)
            best = max(of, key=lambda v, of=of: of[v])
            axes.plot(
                [best], [of[best]], marker="o", markersize=10, markerfacecolor="none", markeredgecolor=colour(place)
            )
        values = sorted({value for of in found.values() for value in of})
        axes.set_xscale("log")
        axes.set_xticks(values, [f"{v:g}" for v in values])
        axes.minorticks_off()
        axes.set_xlabel("peak learning rate")
        axes.set_ylabel("held-out top-1 (%)")
        axes.grid(axis="y")
        figure.legend(loc="outside right upper")
        save_figure(figure, folder / "learning_rate")


def _results(page: str) -> str:
    """The sections of a README out of the report's Markdown, one level of headings further down."""
    parts = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    found = []
    for name in _SECTIONS:
        text = parts.get(name, "").strip()
        if text:
            found.append(f"### {name}\n\n{_shown(text)}\n")
    return "\n".join(found)


def _shown(text: str) -> str:
    """Without the figures that a README leaves out; the others as PNG, since a caption can be long and a page is read in a browser."""
    kept = []
    for block in text.replace("\n### ", "\n#### ").split("\n\n"):
        figure = re.fullmatch(r"!\[(.*)\]\(figures/(\w+)\.svg\)", block, re.DOTALL)
        if figure is None:
            kept.append(block)
        elif figure[2].startswith(_FIGURES):
            kept.append(f"![{figure[1]}](figures/{figure[2]}.png)\n\n*{figure[1]}*")
    return "\n\n".join(kept)


def _copy_figures(source: Path, target: Path, text: str) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for name in dict.fromkeys(re.findall(r"\(figures/(\w+)\.png\)", text)):
        for suffix in (".png", ".svg"):
            shutil.copyfile(source / f"{name}{suffix}", target / f"{name}{suffix}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
