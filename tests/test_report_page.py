"""The page as people see it: in a real browser, on a narrow and a wide window, light and dark, and on paper."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageColor

import chromium
from chromium import Chromium, Look
from eit_lab.report.__main__ import main
from eit_lab.report.figure import COLOURS
from eit_lab.report.page import DARK_COLOURS
from made_inside import made_inside
from made_runs import made_record, write_runs, write_sweep

pytestmark = pytest.mark.skipif(chromium.WHERE is None, reason=chromium.MISSING)

NARROW, WIDE = 390, 1400
ARMS = {dark: [ImageColor.getrgb(c) for c in of] for dark, of in ((False, COLOURS), (True, DARK_COLOURS))}

# What can be asked of the page itself. Contrast: WCAG 2, relative luminance.
FACTS = """(() => {
  const paper = getComputedStyle(document.querySelector('section')).backgroundColor;
  const light = text => text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4).reduce((s, v, i) => s + v * [0.2126, 0.7152, 0.0722][i], 0);
  const contrast = text => {
    const [low, high] = [light(text), light(paper)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const box = e => { const r = e.getBoundingClientRect(); return [r.left + scrollX, r.top + scrollY, r.right, r.bottom + scrollY]; };
  const figures = [...document.querySelectorAll('figure svg')].map(svg => ({
    label: svg.getAttribute('aria-label'), box: box(svg),
    texts: [...svg.querySelectorAll('text')].map(t => ({
      text: t.textContent, box: box(t), contrast: contrast(getComputedStyle(t).fill),
      px: parseFloat(getComputedStyle(t).fontSize) * svg.clientWidth / svg.viewBox.baseVal.width,
    })),
  }));
  const outside = [...document.querySelectorAll('body *')]
    .filter(e => !e.closest('.scroll') && !e.closest('svg') && e.getBoundingClientRect().right > innerWidth + 0.5)
    .map(e => e.outerHTML.slice(0, 80));
  return {
    overflow: document.documentElement.scrollWidth - innerWidth, outside, figures,
    words: contrast(getComputedStyle(document.body).color), faint: contrast(getComputedStyle(document.querySelector('.note')).color),
    columns: new Set(figures.map(f => Math.round(f.box[0]))).size,
    hidden: [...document.querySelectorAll('nav, summary')].filter(e => e.offsetHeight > 0).length,
    folded: [...document.querySelectorAll('details table')].filter(e => e.checkVisibility({contentVisibilityAuto: true})).length,
  };
})()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report with every kind of section: two sizes on ImageNet, several devices' worth of arms, some gaps."""
    rng = np.random.default_rng(5)
    records = []
    for width, size, top, params in ((128, "mini", 0.70, 3.5e6), (256, "base", 0.806, 16e6)):
        for arm, rule, more in (("vit", "none", 1.25), ("lsra", "constant", 0.93), ("eit", "decreasing", 1.0)):
            for seed in range(3):
                accuracy = top - 0.01 * (arm == "vit") + 0.002 * rng.standard_normal()
                record = made_record(
                    f"{arm}_{size}", seed, accuracy, rule=rule, data="imagenet", params=int(more * params), macs=int(600 * more * params),
                    img_per_s=1e10 / more / params, analysis=made_inside(arm, seed, layers=4, heads=4, grid=(6, 6), pitch=12.0, without=("filters",)),
                )  # fmt: skip
                record["config"]["model"]["size"] = {"name": size, "embed_dim": width}
                records.append(record)
    records[4] = {**records[4], "status": "failed", "error": "RunError: a disk is full", "result": None}
    folder = write_sweep(tmp_path_factory.mktemp("runs"), "four-arms", records, declaration=None)
    out = tmp_path_factory.mktemp("report")
    assert main([str(folder), f"out={out}"]) == 0
    return chromium.address(out / "report.html")


def pixels(look: Look) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(look.png)).convert("RGB")).astype(int)


def quiet(look: Look) -> dict[str, Any]:
    """The facts of a page that asked for nothing and complained of nothing."""
    assert look.requests == []
    assert look.console == []
    facts: dict[str, Any] = look.facts
    return facts


def overlap(a: list[float], b: list[float]) -> float:
    """The share of the smaller box that the other covers."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))
    return max(width, 0) * max(height, 0) / smaller if smaller else 0.0


@pytest.mark.parametrize(
    ("width", "dark"),
    [
        pytest.param(NARROW, False, id="narrow, light", marks=pytest.mark.slow),
        pytest.param(NARROW, True, id="narrow, dark"),
        pytest.param(WIDE, False, id="wide, light"),
        pytest.param(WIDE, True, id="wide, dark", marks=pytest.mark.slow),
    ],
)
def test_the_page_is_whole_legible_and_really_dark_in_the_dark(
    browser: Chromium, page: str, width: int, dark: bool
) -> None:
    look = browser.look(page, width=width, dark=dark, script=FACTS)
    facts, image = quiet(look), pixels(look)
    assert image.shape[1] == width
    assert facts["overflow"] == 0
    assert facts["outside"] == []
    luminance = image[::2, ::2] @ np.array([0.2126, 0.7152, 0.0722])
    assert np.median(luminance) < 40 if dark else np.median(luminance) > 240
    assert (
        0.01 < np.mean(abs(luminance - np.median(luminance)) > 60) < 0.5
    )  # it has words, and they are not all there is
    assert min(facts["words"], facts["faint"]) > 4.5
    assert len(facts["figures"]) == 14
    assert facts["columns"] > 1 if width == WIDE else facts["columns"] == 1
    for figure in facts["figures"]:
        left, top, right, bottom = (round(edge) for edge in figure["box"])
        drawn = image[top:bottom, left:right]
        marks = [np.sum(abs(drawn - colour).max(axis=2) < 8) for colour in ARMS[dark]]
        assert max(marks) > 15, figure["label"]
        assert len(np.unique(drawn @ np.array([65536, 256, 1]))) > 60
        texts = [text for text in figure["texts"] if text["text"].strip()]
        assert len(texts) > 8
        published = "published" in figure["label"]
        for text in texts:
            assert text["contrast"] > (3 if published else 4.5), text
            assert text["px"] > (4.5 if published and width == NARROW else 7), text
            assert text["box"][0] > left - 1, text
            assert text["box"][2] < right + 1, text
        pairs = [(a, b) for n, a in enumerate(texts) for b in texts[:n]]
        hidden = [(a["text"], b["text"]) for a, b in pairs if overlap(a["box"], b["box"]) > 0.3]
        assert not hidden or published, (figure["label"], hidden)


@pytest.mark.slow
def test_on_paper_it_is_light_and_what_was_folded_is_open(browser: Chromium, page: str) -> None:
    look = browser.look(page, width=794, dark=True, print_=True, script=FACTS)
    facts, image = quiet(look), pixels(look)
    assert np.median(image) == 255
    assert facts["hidden"] == 0
    assert facts["folded"] == 2
    on_screen = browser.look(page, width=794, script=FACTS).facts
    assert (on_screen["hidden"], on_screen["folded"]) == (3, 0)


@pytest.mark.slow
def test_hostile_names_do_nothing_in_a_browser(browser: Chromium, tmp_path: Path) -> None:
    names = (
        "vit<script>alert(1)</script>",
        "<img src='http://127.0.0.1:1/x' onerror=alert(1)>",
        "long" * 60,
        '"><svg onload=alert(1)>',
    )
    records = [
        made_record(name, s, 0.9 + 0.01 * s, strength=0.1 * n, rule="increasing")
        for n, name in enumerate(names)
        for s in range(2)
    ]
    write_runs(tmp_path / "runs", records)
    assert main([str(tmp_path / "runs"), f"out={tmp_path / 'out'}"]) == 0
    script = FACTS.replace(
        "overflow:", "scripts: document.querySelectorAll('script, img, [onload], [onerror]').length, overflow:"
    )
    facts = quiet(browser.look(chromium.address(tmp_path / "out" / "report.html"), width=NARROW, script=script))
    assert (facts["scripts"], facts["overflow"], facts["outside"]) == (0, 0, [])


def test_the_browser_of_these_tests_sees_requests_and_errors(browser: Chromium, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        "<p class=note>x<section></section><script>console.error('seen')</script><img src='http://127.0.0.1:1/x.png'>"
    )
    look = browser.look(chromium.address(page), width=NARROW)
    assert look.requests == ["http://127.0.0.1:1/x.png"]
    assert any("seen" in line for line in look.console)
