"""A report as one HTML page that asks nothing of the network, as Markdown, and as LaTeX tables.

The figures are in the page as SVG. Their colours are exchanged for the page's own, so that they follow it into the dark.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from eit_lab.report.build import Report, csv_files, write_figures
from eit_lab.report.figure import COLOURS, GRID, INK, MUTED, PAPER
from eit_lab.report.tables import latex, latex_table, markdown, markdown_table
from eit_lab.runs import write_text
from eit_lab.version import __version__

PAGE = "report.html"
# The same hues on dark paper: blue and vermilion lighter, so that thin lines keep a contrast of 3 to 1 and more.
DARK_COLOURS = ("#3b9bdc", "#e69f00", "#1fb88a", "#cc79a7", "#e8702a", "#8ccdf2", "#b3a2f0")
_TOGETHER = re.compile(
    r"(?<=\b[pnρ]) (?=[=<])|(?<=[=<]) (?=[\d+\N{MINUS SIGN}])|(?<=\d) (?=points\b|seeds?\b)|(?<=95%) (?=CI)|(?<=\bCI) "
)
_MINUS = re.compile(r"(?<![^\s(\[=,:])-(?=\d)")


def write_report(report: Report, out: Path) -> list[Path]:
    """Write every form of a report into a folder; returns the files that people open. Raises OSError with a file's name."""
    out.mkdir(parents=True, exist_ok=True)
    svgs = write_figures(report, out / "figures")
    for name, text in csv_files(report).items():
        write_text(out / name, text)
    write_text(out / "report.md", to_markdown(report))
    write_text(out / "report.tex", to_latex(report))
    write_text(out / PAGE, to_html(report, svgs))
    return [out / PAGE, out / "report.md", out / "report.tex"]


def facts(report: Report) -> str:
    """How much there is, in a line."""
    ablation = report.ablation
    runs = [run for arm in ablation.arms for run in arm.runs.values()]
    parts = [
        _many(len(ablation.arms), "arm"),
        f"{_many(len(runs), 'run')} that count{'s' if len(runs) == 1 else ''}",
        f"{len(ablation.left_out)} that {'does' if len(ablation.left_out) == 1 else 'do'} not",
        f"compared in {report.metric.key}",
    ]
    ended = [str(run.record["ended"]) for run in runs if run.record.get("ended")]
    if ended:
        parts.append(f"last run ended {max(ended)[:10]}")
    return "; ".join(parts) + "."


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


# -------------------------------------------------------------------------------------------------------------------- html


def to_html(report: Report, svgs: Mapping[str, str]) -> str:
    """The page; ``svgs`` holds the text of each figure by its stem."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("eit_lab.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
    )  # fmt: skip
    environment.filters["minus"] = _typeset
    captions = {drawing.stem: drawing.caption for drawing in report.drawings}
    return environment.get_template("page.html.j2").render(
        report=report,
        facts=facts(report),
        made=f"Computed from the runs' records by eit_lab {__version__}.",
        svgs={stem: Markup(inline_svg(text, stem=stem, label=captions[stem])) for stem, text in svgs.items()},
        colours=COLOURS,
        dark_colours=DARK_COLOURS,
    )


def _typeset(text: str) -> str:
    """A true minus, and no line break inside ``p = 0.03`` or between a number and what it counts."""
    return _TOGETHER.sub("\N{NO-BREAK SPACE}", _MINUS.sub("\N{MINUS SIGN}", text).replace(" - ", " \N{MINUS SIGN} "))


def inline_svg(text: str, *, stem: str, label: str) -> str:
    """A figure's SVG file as part of the page: its own names of parts, the page's colours and font, a label for who cannot see."""
    from markupsafe import escape

    body = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{stem}-\1"', body)
    body = re.sub(r'href="#([^"]+)"', rf'href="#{stem}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{stem}-\1)", body)
    names = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper", **{c: f"c{n}" for n, c in enumerate(COLOURS)}}
    pattern = re.compile("|".join(map(re.escape, names)), re.IGNORECASE)
    by_colour = {colour.lower(): name for colour, name in names.items()}
    # Only inside style="...": a name may hold what looks like a colour.
    body = re.sub(
        r'style="[^"]*"',
        lambda style: pattern.sub(lambda c: f"var(--{by_colour[c.group().lower()]})", style.group()),
        body,
    )
    body = body.replace("'DejaVu Sans'", "var(--font)")
    head = re.match(r"<svg[^>]*>", body)
    assert head is not None, "cut to begin there"
    (box,) = re.findall(r'viewBox="[^"]*"', head.group())
    return f'<svg {box} role="img" aria-label="{escape(label)}">{body[head.end() :]}'


# ------------------------------------------------------------------------------------------------------ markdown and latex


def to_markdown(report: Report) -> str:
    """The same in Markdown, its figures beside it."""
    parts = [f"# {markdown(report.title)}"]
    parts += [markdown(report.question)] if report.question else []
    parts += [markdown(facts(report)), "## Verdict", "\n".join(f"- {markdown(said)}" for said in report.sentences)]
    for section in report.sections:
        parts.append(f"## {section.title}")
        parts += [markdown(text) for text in section.text]
        for title, said in section.lists:
            parts += [f"### {title}", "\n".join(f"- {markdown(one)}" for one in said)]
        for drawing in section.drawings:
            parts.append(f"![{markdown(drawing.caption)}](figures/{drawing.stem}.svg)")
        for table in section.tables:
            parts.append(markdown_table(table).rstrip())
            parts += [f"{markdown(table.note)}."] if table.note else []
    return "\n\n".join(parts) + "\n"


def to_latex(report: Report) -> str:
    """The verdict, the findings and the tables, to be taken into a paper; the list of single runs is left to the other forms."""
    head = "% \\input{report} in a document with \\usepackage{booktabs}; figures are in figures/.\n"
    parts = [head, _latex_list(report.sentences)]
    for section in report.sections:
        for title, said in section.lists:
            parts.append(f"\\paragraph{{{latex(f'{section.title}: {title}')}}}\n{_latex_list(said)}")
        parts += [latex_table(table) for table in section.tables if table.stem != "runs"]
    return "\n".join(parts)


def _latex_list(sentences: Sequence[str]) -> str:
    return "\\begin{itemize}\n" + "".join(f"  \\item {latex(said)}\n" for said in sentences) + "\\end{itemize}\n"
