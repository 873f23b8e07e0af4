"""The page on which one picks an image: its text without a browser, then the page as people use it in one."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import chromium
from chromium import Chromium, Look
from eit_lab.config import ConfigError
from eit_lab.report.inside.viewer import colour_table, read_pictures, to_html, write_viewer

Pictures = dict[str, np.ndarray]


def spectrum(x: np.ndarray) -> np.ndarray:
    """(..., h, w, c) -> (..., h, w): mean over channels of log(1e-6 + |FFT2|), frequency 0 in the middle."""
    amplitude = np.log(1e-6 + abs(np.fft.fft2(x, axes=(-3, -2))))
    return np.fft.fftshift(amplitude, axes=(-3, -2)).mean(axis=-1).astype(np.float16)


def made_pictures(
    *,
    images: int = 3,
    size: tuple[int, int] = (32, 32),
    grid: tuple[int, int] = (8, 8),
    channels: int = 3,
    layers: int = 2,
    heads: int = 3,
    names: tuple[str, ...] = ("disc left", "disc right", "ring"),
    photos: np.ndarray | None = None,
    seed: int = 0,
) -> Pictures:
    """What an analysis writes, of a made model whose heads look at a blob around the query: wider with the head, then the layer."""
    rng = np.random.default_rng(seed)
    K, (H, W), (h, w), L = images, size, grid, layers
    pitch = np.array([np.ceil(H / h), np.ceil(W / w)])
    y, x = (np.arange(H) + 0.5)[:, None] / H, (np.arange(W) + 0.5)[None, :] / W
    if photos is None:
        discs = [np.hypot(y - 0.5, x - 0.25 - 0.5 * (k % 2)) < 0.18 + 0.02 * k for k in range(K)]
        tints = rng.uniform(0.3, 1, (K, 1, 1, channels))
        photos = (np.stack(discs)[..., None] * tints * 200 + 20 + rng.integers(0, 30, (K, H, W, channels))).astype("u1")
    label = np.arange(K) % max(1, len(names))
    predicted = np.where(np.arange(K) % 3 == 1, (label + 1) % max(2, len(names)), label)

    spots = [(0, 0), (h // 2, w // 2), (h - 1, w // 4), (h // 4, w - 1)]
    queries = np.array([0, *(1 + i * w + j for i, j in spots)])
    rows, cols = np.mgrid[:h, :w]
    attention = np.zeros((K, L, heads, len(queries), h * w))
    for k, layer, head, q in np.ndindex(attention.shape[:4]):
        i, j = (h / 2, w * (0.25 + 0.5 * (k % 2))) if q == 0 else spots[q - 1]
        wide = 0.6 + 1.2 * head + 0.4 * layer
        attention[k, layer, head, q] = np.exp(-((rows - i) ** 2 + (cols - j) ** 2) / 2 / wide**2).ravel()
    attention /= attention.sum(axis=-1, keepdims=True)
    cls_mass = rng.uniform(0.02, 0.9, attention.shape[:4])
    attention *= 1 - cls_mass[..., None]
    peak = attention.max(axis=-1)

    points = ["stem", *(f"blocks.{layer}.{part}" for layer in range(max(1, L)) for part in ("mixer", "mlp"))]
    depth = np.arange(len(points))[None, :, None, None]
    radius = np.hypot(2 * (rows - h // 2) / h, 2 * (cols - w // 2) / w)[None, None]
    token_spectrum = (
        3 + 0.12 * depth - (2.2 + 0.12 * depth) * radius + 0.15 * rng.standard_normal((K, len(points), h, w))
    )
    return {
        "images": photos,
        "index": 100 + 7 * np.arange(K),
        "label": label,
        "predicted": predicted,
        "class_names": np.array(names, dtype=str),
        "input_spectrum": spectrum(photos / 255.0 - 0.5),
        "token_spectrum": token_spectrum.astype(np.float16),
        "points": np.array(points),
        "rollout": (attention[:, :, :, 0].mean(axis=(1, 2)) if L else np.zeros((K, 0))).reshape(K, *((h, w) if L else (0, 0))).astype(np.float16),
        "queries": queries,
        "attention": np.round(255 * attention / peak[..., None]).astype("u1"),
        "attention_max": peak.astype(np.float16),
        "cls_mass": cls_mass.astype(np.float16),
        "layers": np.arange(L),
        "head_width": 2 + 3 * np.arange(L),
        "grid": np.array(grid),
        "pitch": pitch,
        "model": np.array("eit_nano"),
        "arm": np.array("eit, decreasing"),
        "data": np.array("made, test"),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------ without a browser


def blocks(page: str) -> dict[str, bytes]:
    found = re.findall(r'<script type="text/plain" id="([\w-]+)">([^<]*)</script>', page)
    return {name: base64.b64decode(text, validate=True) for name, text in found}


def test_the_page_has_each_number_as_it_was_written_and_no_address() -> None:
    made = made_pictures(images=5)
    page = to_html(made)
    found = blocks(page)
    for place in range(5):
        for name in ("input_spectrum", "token_spectrum", "rollout", "attention_max", "cls_mass"):
            assert found.pop(f"{name}-{place}") == made[name][place].astype("<f2").tobytes()
        assert found.pop(f"attention-{place}") == made["attention"][place].tobytes()
    table = np.frombuffer(found.pop("colours"), np.uint8).reshape(256, 3)
    assert found == {}
    assert len(np.unique(table, axis=0)) == 254  # a colour says its value, to a step of 1/255
    thumbnails = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    for text, image in zip(thumbnails, made["images"], strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))), image)
    assert page.count("✗") == 2 + 1  # of five images, and the line that says what the mark means
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []


def test_only_the_pages_own_script_and_style_may_run() -> None:
    page = to_html(made_pictures())
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert (rules["default-src"], rules["img-src"], rules["base-uri"]) == ("'none'", "data:", "'none'")
    assert set(rules) == {"default-src", "img-src", "base-uri", "form-action", "script-src", "style-src"}
    for name, element in (("script-src", "script"), ("style-src", "style")):
        (text,) = re.findall(rf"<{element}>(.*?)</{element}>", page, flags=re.DOTALL)
        assert rules[name] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert ' style="' not in page


HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src='http://127.0.0.1:1/x' onerror=alert(1)>",
    '"><svg onload=alert(1)>',
)


def test_names_are_text_wherever_they_stand() -> None:
    made = made_pictures(names=HOSTILE) | {"arm": np.array(HOSTILE[0]), "data": np.array(HOSTILE[1])}
    made["points"] = np.array([HOSTILE[2], *made["points"][1:]])
    page, plain = to_html(made), to_html(made_pictures())
    for piece in ("<script", "</script", "<img", "<svg", "<!--"):
        assert page.count(piece) == plain.count(piece)
    (facts,) = re.findall(r'<script type="application/json" id="facts">(.*?)</script>', page)
    told = json.loads(facts)
    assert [image["label"] for image in told["images"]] == list(HOSTILE)
    assert (told["arm"], told["data"], told["points"][0]) == HOSTILE


def test_pictures_come_back_as_they_were_saved(tmp_path: Path) -> None:
    made = made_pictures(grid=(4, 8), size=(48, 96))
    np.savez_compressed(tmp_path / "images.npz", **made)
    back = read_pictures(tmp_path / "images.npz")
    assert set(back) == set(made)
    for name, array in made.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)
    write_viewer(back, tmp_path / "images.html")
    assert (tmp_path / "images.html").read_text() == to_html(made)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": None}, "it has no images"),
        ({"grid": np.array([8, 7])}, "token_spectrum must have 7 along column, as grid says, not 8"),
        ({"predicted": np.arange(4)}, "predicted must have 3 along image, as images has, not 4"),
        ({"attention": np.zeros((3, 2, 3, 5, 64), np.float32)}, "attention must be bytes, not float32"),
        ({"attention": np.zeros((3, 2, 3, 5, 65), np.uint8)}, "attention must have 64 along token, as grid says, not 65"),
        ({"cls_mass": np.zeros((3, 2, 5), np.float16)}, "cls_mass must have the axes (image, layer, head, query), not shape (3, 2, 5)"),
        ({"queries": np.array([0, 1, 2, 3, 65])}, "queries must be from 0 to 64"),
        ({"images": np.zeros((3, 32, 32, 2), np.uint8)}, "images must have 1 or 3 channels, not 2"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_one_line(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "images.npz"
    np.savez(path, **{name: array for name, array in (made_pictures() | change).items() if array is not None})
    with pytest.raises(ConfigError) as error:
        read_pictures(path)
    assert str(error.value) == f"images must be a file that analyze wrote, got {str(path)!r}: {said}"


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    np.savez_compressed(path, **made_pictures(images=1))
    whole = path.read_bytes()
    with pytest.raises(
        ConfigError, match=r"^images must be a file that analyze wrote, got '.*none\.npz': there is none$"
    ):
        read_pictures(tmp_path / "none.npz")
    pickled = io.BytesIO()
    np.savez(pickled, **made_pictures(images=1) | {"index": np.array([object()])})
    alone = io.BytesIO()
    np.save(alone, np.zeros(3))
    rng = np.random.default_rng(0)
    flipped = [bytearray(whole) for _ in range(40)]
    for copy in flipped:
        for at in rng.integers(len(whole), size=8):
            copy[at] ^= 1 << int(rng.integers(8))
    messages = []
    for damaged in (b"", b"not a file", whole[: len(whole) // 2], pickled.getvalue(), alone.getvalue(), *flipped):
        path.write_bytes(damaged)
        try:
            read_pictures(path)
        except ConfigError as error:
            messages.append(str(error))
    assert not any("\n" in message for message in messages)
    assert [message.rsplit(": ", 1)[1] for message in messages[:5]] == ["it is damaged"] * 4 + ["it has no images"]
    assert len(messages) > 30  # some wrong bits are in what zip does not check


# --------------------------------------------------------------------------------------------------------- in a browser

in_a_browser = pytest.mark.skipif(chromium.WHERE is None, reason=chromium.MISSING)

# What stands on the page, and every pixel of the canvases; contrast: WCAG 2, relative luminance.
READ = """
const pixels = canvas => ({
  low: +canvas.dataset.low, high: +canvas.dataset.high, width: canvas.width, height: canvas.height,
  rgba: [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data],
});
const all = selector => [...document.querySelectorAll(selector)].map(pixels);
const text = selector => document.querySelector(selector)?.textContent ?? null;
const read = () => ({
  title: text('#title'), said: text('#map-said'), address: location.hash,
  image: document.querySelector('#picked img').src,
  input: all('#input canvas'), rollout: all('#rollout canvas'), tokens: all('.tile canvas'), maps: all('#maps canvas'), map: all('#map canvas'),
  curves: [...document.querySelectorAll('#profile [data-point]')].sort((a, b) => a.dataset.point - b.dataset.point).map(p => JSON.parse(p.dataset.values)),
  labels: [...document.querySelectorAll('#maps button')].map(b => b.getAttribute('aria-label')),
  marked: [...document.querySelectorAll('#map [data-query]')].map(g => +g.dataset.query),
  chosen: [...document.querySelectorAll('.framed .chosen')].map(e => e.dataset.query),
  checked: [...document.querySelectorAll('input:checked, select')].map(e => `${e.name || e.id}=${e.value}`),
});
const turn = () => new Promise(done => setTimeout(done, 30));
"""
FACTS = """
const facts = () => {
const light = text => text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4).reduce((s, v, i) => s + v * [0.2126, 0.7152, 0.0722][i], 0);
const paper = light(getComputedStyle(document.querySelector('section')).backgroundColor);
const contrast = (e, of = 'color') => {
  const ink = light(getComputedStyle(e)[of]);
  return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
};
const box = e => { const r = e.getBoundingClientRect(); return [r.left + scrollX, r.top + scrollY, r.right + scrollX, r.bottom + scrollY]; };
const words = [...document.querySelectorAll('p, legend, figcaption, .name, .peak, .mass, small, th, .bar span')].filter(e => e.offsetHeight && e.textContent.trim());
return {
  overflow: document.documentElement.scrollWidth - innerWidth,
  outside: [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, .thumbs, .stage') && e.offsetParent && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 90)),
  faint: words.map(e => [contrast(e), e.outerHTML.slice(0, 90)]).sort((a, b) => a[0] - b[0])[0],
  ticks: [...document.querySelectorAll('#profile text')].map(e => contrast(e, 'fill')),
  canvases: [...document.querySelectorAll('canvas')].filter(e => e.offsetHeight).map(e => [e.parentNode.id || e.parentNode.className, box(e)]),
  unnamed: [...document.querySelectorAll('button, input, select')].filter(e => !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.[0]?.textContent.trim())).length,
  spilled: [...document.querySelectorAll('#maps button span')].filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent),
  hidden: (() => { const [strip, thumb] = ['.thumbs', '.thumb:has(:checked)'].map(s => document.querySelector(s).getBoundingClientRect()); return thumb.left < strip.left - 1 || thumb.right > strip.right + 1; })(),
  scripts: document.querySelectorAll('script:not([type]), [onload], [onerror]').length,
};
};
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as found:
        yield found


def opened(page: Path, made: Pictures) -> str:
    write_viewer(made, page)
    return chromium.address(page)


def quiet(look: Look, address: str) -> Any:
    """The facts of a page that asked for nothing and complained of nothing."""
    assert [url for url in look.requests if not url.startswith("data:") and url.split("#")[0] != address] == []
    assert look.console == []
    return look.facts


def values(canvas: dict[str, Any]) -> np.ndarray:
    """What the colours of a canvas say, (height, width); each colour is one of the table's."""
    rgba = np.array(canvas["rgba"], np.uint8).reshape(canvas["height"], canvas["width"], 4)
    assert (rgba[..., 3] == 255).all()
    places = {colour.tobytes(): place for place, colour in enumerate(colour_table())}
    found = np.array([places[colour.tobytes()] for colour in rgba[..., :3].reshape(-1, 3)]).reshape(rgba.shape[:2])
    values: np.ndarray = canvas["low"] + found / 255 * (canvas["high"] - canvas["low"])
    return values


def same(canvas: dict[str, Any], expected: np.ndarray, *, cut: float = -np.inf) -> None:
    """To half a step of the colours, and one more where two are the same. ``cut``: what lies below is drawn as it."""
    step = (canvas["high"] - canvas["low"]) / 255
    np.testing.assert_allclose(values(canvas), np.maximum(expected, cut), atol=1.51 * step)
    assert values(canvas).std() > 0


def rings(x: np.ndarray) -> list[list[float]]:
    h, w = x.shape
    radius = np.fft.fftshift(2 * np.hypot(np.fft.fftfreq(h)[:, None], np.fft.fftfreq(w)[None]))
    ring = np.floor(radius * max(h, w) / 2 + 0.5)
    return [[radius[ring == r].mean(), x[ring == r].mean()] for r in np.unique(ring)]


def check(seen: dict[str, Any], made: Pictures, *, image: int, query: int, layer: int, head: int) -> None:
    """All canvases of a page that shows this image, query and map are the arrays."""
    h, w = made["grid"]
    same(seen["input"][0], made["input_spectrum"][image].astype(float))
    same(seen["rollout"][0], made["rollout"][image].astype(float))
    tokens = made["token_spectrum"][image].astype(float)
    assert len(seen["tokens"]) == len(made["points"])
    for canvas, curve, expected in zip(seen["tokens"], seen["curves"], tokens, strict=True):
        assert canvas["high"] == pytest.approx(tokens.max())
        assert np.mean(tokens < canvas["low"]) < 0.01
        same(canvas, expected, cut=canvas["low"])
        np.testing.assert_allclose(curve, rings(expected), atol=1e-5)
    attention = (
        made["attention"][image, :, :, query] / 255 * made["attention_max"][image, :, :, query, None].astype(float)
    )
    num_layers, num_heads = attention.shape[:2]
    assert len(seen["maps"]) == num_layers * num_heads
    for place, canvas in enumerate(seen["maps"]):
        same(canvas, attention[place // num_heads, place % num_heads].reshape(h, w))
        assert canvas["high"] == pytest.approx(
            float(made["attention_max"][image, place // num_heads, place % num_heads, query])
        )
    same(seen["map"][0], attention[layer, head].reshape(h, w))
    assert f"Layer {made['layers'][layer]}, head {head}, query" in seen["said"]
    assert seen["chosen"] == [str(query)] * 2
    mass = made["cls_mass"][image, layer, head, query]
    assert float(seen["said"].rsplit(" ", 1)[1]) == pytest.approx(float(mass), rel=5e-3)
    assert {f"image={image}", f"query={query}"} <= set(seen["checked"])


@in_a_browser
def test_what_is_drawn_is_the_data_for_each_image_query_and_head_picked(browser: Chromium, tmp_path: Path) -> None:
    made = made_pictures()
    made["layers"] = np.array([0, 3])  # only these of the model's layers have attention
    made["queries"][4] = 8
    address = opened(tmp_path / "images.html", made)
    # A click right of the middle of the token that query 2 is at, on the image and on the map.
    h, w = made["grid"]
    i, j = divmod(int(made["queries"][2]) - 1, w)
    script = (
        "(async () => {" + READ + "const seen = [read()];"
        "document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true})); await turn(); seen.push(read());"
        "document.querySelectorAll('.thumb input')[0].click(); await turn(); seen.push(read());"
        f"const at = document.querySelector('#picked').getBoundingClientRect(); const [x, y] = [{(j + 0.7) / w}, {(i + 0.6) / h}];"
        "document.querySelector('#picked').dispatchEvent(new MouseEvent('click', {clientX: at.left + x * at.width, clientY: at.top + y * at.height}));"
        "await turn(); seen.push(read());"
        'document.querySelector(\'[data-layer="0"][data-head="1"]\').click(); await turn(); seen.push(read());'
        "document.querySelector('#maps').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true})); await turn(); seen.push(read());"
        "const query = document.querySelector('#query'); query.value = '0'; query.dispatchEvent(new Event('change', {bubbles: true})); await turn(); seen.push(read());"
        "location.hash = '#image=2&query=8&layer=3&head=0&nothing=1'; await turn(); seen.push(read());"
        "location.hash = '#image=9&query=x&layer=1&head=-1'; await turn(); seen.push(read());"
        "const scale = document.querySelector('#scale'); const set = value => { scale.value = value; scale.dispatchEvent(new Event('change', {bubbles: true})); };"
        "set('all'); seen.push(read()); set('least'); seen.push(read());"
        "return seen; })()"
    )
    seen = quiet(browser.look(f"{address}#image=1", width=1400, script=script), address)
    states = [(1, 0, 1, 0), (2, 0, 1, 0), (0, 0, 1, 0), (0, 2, 1, 0), (0, 2, 0, 1), (0, 2, 0, 2), (0, 0, 0, 2), (2, 4, 1, 0), (2, 4, 1, 0)]  # fmt: skip
    for facts, (image, query, layer, head) in zip(seen[:9], states, strict=True):
        check(facts, made, image=image, query=query, layer=layer, head=head)
        name = made["class_names"][made["label"][image]]
        assert facts["title"].startswith(f"Image {made['index'][image]}: {name}, ")
        assert facts["marked"] == [1, 2, 3, 4]
    assert seen[0]["title"].endswith("taken for ring")
    assert seen[5]["address"] == f"#image=0&query={made['queries'][2]}&layer=0&head=2"
    assert len({facts["image"] for facts in seen}) == 3
    assert len({str(facts["maps"]) for facts in seen}) == 7
    together, stretched, peaks = seen[9], seen[10], made["attention_max"][2, :, :, 4].astype(float)
    for canvas, peak in zip(together["maps"], peaks.ravel(), strict=True):
        assert canvas["high"] == pytest.approx(peaks.max())
        assert values(canvas).max() == pytest.approx(peak, abs=0.51 * peaks.max() / 255)
    attention = made["attention"][2, :, :, 4] / 255 * peaks[..., None]
    for canvas, expected in zip([*stretched["maps"], stretched["map"][0]], [*attention.reshape(6, 8, 8), attention[1, 0].reshape(8, 8)], strict=True):  # fmt: skip
        assert (canvas["low"], canvas["high"]) == pytest.approx((expected.min(), expected.max()))
        same(canvas, expected)


@in_a_browser
@pytest.mark.parametrize(
    ("width", "dark"),
    [
        pytest.param(360, True, id="narrow, dark"),
        pytest.param(360, False, id="narrow, light", marks=pytest.mark.slow),
        pytest.param(1600, False, id="wide, light"),
        pytest.param(1600, True, id="wide, dark", marks=pytest.mark.slow),
        pytest.param(760, False, id="between", marks=pytest.mark.slow),
    ],
)
def test_the_page_is_whole_legible_and_dark_in_the_dark(
    browser: Chromium, tmp_path: Path, width: int, dark: bool
) -> None:
    address = opened(tmp_path / "images.html", made_pictures(images=6, layers=4, heads=12))
    look = browser.look(
        f"{address}#image=5", width=width, dark=dark, script="(() => {" + FACTS + "return facts(); })()"
    )
    facts = quiet(look, address)
    image = np.asarray(Image.open(io.BytesIO(look.png)).convert("RGB")).astype(int)
    assert image.shape[1] == width
    assert (facts["overflow"], facts["outside"], facts["unnamed"], facts["spilled"], facts["hidden"]) == (
        0,
        [],
        0,
        [],
        False,
    )
    luminance = image[::2, ::2] @ np.array([0.2126, 0.7152, 0.0722])
    assert np.median(luminance) < 40 if dark else np.median(luminance) > 240
    assert facts["faint"][0] > 4.5, facts["faint"]
    assert len(facts["ticks"]) > 8
    assert min(facts["ticks"]) > 4.5
    assert len(facts["canvases"]) == 2 + 9 + 1 + 48 + 5
    for what, box in facts["canvases"]:
        left, top, right, bottom = (round(edge) for edge in box)
        if right > width - 10:  # in what scrolls
            continue
        drawn = image[top:bottom, left:right]
        assert drawn.size, what
        assert len(np.unique(drawn @ np.array([65536, 256, 1]))) > 3, what


@in_a_browser
@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "no attention",
        "no rollout",
        "no grid",
        "nothing but images",
        "wide, grey",
        "padded",
        "hostile",
        "not finite",
        "one of each",
    ],
)
def test_models_without_some_part_and_images_of_any_shape(browser: Chromium, tmp_path: Path, kind: str) -> None:
    made = {
        "no attention": lambda: made_pictures(layers=0),
        "no rollout": lambda: {n: a for n, a in made_pictures().items() if n != "rollout"},
        "nothing but images": lambda: {
            n: made_pictures()[n] for n in ("images", "index", "label", "predicted", "grid", "pitch", "model", "arm")
        },
        "no grid": lambda: made_pictures(layers=0) | {"grid": np.zeros(2, int), "pitch": np.zeros(2)},
        "wide, grey": lambda: made_pictures(size=(16, 48), grid=(2, 6), channels=1),
        "padded": lambda: made_pictures(size=(30, 30), grid=(4, 4)),
        "hostile": lambda: made_pictures(names=(*HOSTILE, "long" * 60)) | {"arm": np.array("long" * 60), "model": np.array(HOSTILE[1])},
        "not finite": lambda: made_pictures() | {"attention_max": np.full((3, 2, 3, 5), np.nan, np.float16), "token_spectrum": np.full((3, 5, 8, 8), np.nan, np.float16)},
        "one of each": lambda: made_pictures(images=1, layers=1, heads=1, grid=(1, 1), names=()),
    }[kind]()  # fmt: skip
    address = opened(tmp_path / "images.html", made)
    script = "(() => {" + READ + FACTS + "return {seen: read(), ...facts()}; })()"
    place = len(made["images"]) - 1
    found = quiet(browser.look(f"{address}#image={place}", width=360, script=script), address)
    seen = found["seen"]
    assert (found["overflow"], found["outside"], found["scripts"]) == (0, [], 1)
    assert seen["title"].startswith(f"Image {made['index'][place]}: ")
    assert seen["image"].startswith("data:image/png;base64,")
    if kind in ("no attention", "nothing but images"):
        assert (seen["maps"], seen["rollout"], seen["said"]) == ([], [], None)
    elif kind == "no grid":
        assert (len(seen["tokens"]), seen["maps"]) == (3, [])
        same(seen["tokens"][0], made["token_spectrum"][place, 0].astype(float), cut=seen["tokens"][0]["low"])
    elif kind == "no rollout":
        assert (len(seen["maps"]), seen["rollout"]) == (6, [])
    elif kind in ("wide, grey", "padded", "hostile"):
        check(seen, made, image=place, query=0, layer=1, head=0)
    elif kind == "not finite":
        assert "largest value –" in seen["said"]
        assert not any(any(canvas["rgba"]) for canvas in seen["maps"] + seen["tokens"])
    else:
        assert seen["title"] == "Image 100: class 0, classified rightly"
        assert (len(seen["maps"]), len(seen["tokens"])) == (1, 3)
