"""The page on which one picks an image and sees its spectra, its rollout and its attention by head and layer.

One HTML file that opens from a disk and asks nothing of the network. What is drawn in a browser (viewer.js) is what ``images.npz``
of an analysis has: numbers travel as they are, in base64, a block for each image, and are unpacked when that image is picked.
Rollout is Abnar & Zuidema's (arXiv:2005.00928). Amplitudes are log |FFT2|, as Park & Kim draw them (arXiv:2202.06709); where
they read along the half diagonal we take the mean over rings, so that one image alone gives a curve.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from eit_lab.config import ConfigError
from eit_lab.runs import write_text
from eit_lab.version import __version__

PAGE = "images.html"
Pictures = Mapping[str, NDArray[Any]]

# Kinds as numpy writes them (i: integers of either sign; b: one byte without) and the names of the axes; an axis is as long
# in one array as in every other.
_ARRAYS = {
    "images": ("b", "image height width channel"),
    "index": ("i", "image"),
    "label": ("i", "image"),
    "predicted": ("i", "image"),
    "class_names": ("U", "class"),
    "input_spectrum": ("f", "image frequency_row frequency_column"),
    "points": ("U", "point"),
    "token_spectrum": ("f", "image point row column"),
    "rollout": ("f", "image row column"),
    "queries": ("i", "query"),
    "layers": ("i", "layer"),
    "head_width": ("i", "layer"),
    "attention": ("b", "image layer head query token"),
    "attention_max": ("f", "image layer head query"),
    "cls_mass": ("f", "image layer head query"),
    "grid": ("i", "side"),
    "pitch": ("f", "side"),
    "model": ("U", ""),
    "arm": ("U", ""),
    "data": ("U", ""),
}
_NEEDED = ("images", "index", "label", "predicted", "grid", "pitch", "model", "arm")
_ATTENTION = ("attention", "attention_max", "cls_mass", "queries", "layers", "head_width")
_KINDS = {"b": "bytes", "i": "integers", "f": "numbers", "U": "text"}


def read_pictures(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an ``images.npz``. Raises ConfigError, in one line, for a file that is none or is damaged."""
    rule = f"images must be a file that analyze wrote, got {str(path)!r}"
    try:
        with path.open("rb") as raw:  # np.load leaves a damaged file open that it opened itself
            file = np.load(raw, allow_pickle=False)
            pictures = {name: file[name] for name in _ARRAYS if name in file} if isinstance(file, NpzFile) else {}
    except FileNotFoundError:
        raise ConfigError(f"{rule}: there is none") from None
    # What a zip file with a few wrong bytes raises; RuntimeError: one that seems to be encrypted.
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
        raise ConfigError(f"{rule}: it is damaged") from None
    if wrong := _fault(pictures):
        raise ConfigError(f"{rule}: {wrong}")
    return pictures


def write_viewer(pictures: Pictures, path: Path) -> None:
    """Write the page of some images (the arrays of ``images.npz``; parts may be missing or empty). Raises OSError with the file's name."""
    wrong = _fault(pictures)
    assert wrong is None, wrong
    write_text(path, to_html(pictures))


def to_html(pictures: Pictures) -> str:
    """The page's text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("eit_lab.report.inside", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
    )  # fmt: skip
    here = resources.files("eit_lab.report.inside")
    style, script = (here.joinpath(name).read_text() for name in ("viewer.css", "viewer.js"))
    facts = _facts(pictures)
    return environment.get_template("viewer.html.j2").render(
        facts=facts,
        said=_said(facts),
        # "<" as an escape: no name of a class can end the element that the facts lie in.
        json=Markup(json.dumps(facts).replace("<", "\\u003c")),
        blocks=_blocks(pictures, facts),
        colours=base64.b64encode(colour_table().tobytes()).decode(),
        thumbnails=[_png(image) for image in pictures["images"]],
        style=Markup(style),
        script=Markup(script),
        style_hash=_sha256(style),
        script_hash=_sha256(script),
        made=f"Drawn by eit_lab {__version__} from the arrays that its analysis wrote.",
    )


def _has(pictures: Pictures, *names: str) -> bool:
    return all(name in pictures and pictures[name].size > 0 for name in names)


def _fault(pictures: Pictures) -> str | None:
    """What keeps the arrays from being drawn, in words."""
    for name in _NEEDED:
        if not _has(pictures, name):
            return f"it has no {name}"
    lengths: dict[str, tuple[int, str]] = {"side": (2, "")}
    for name, (kind, axes) in _ARRAYS.items():
        array = pictures.get(name)
        if array is None or not array.size:
            continue
        if not _is(array.dtype, kind):
            return f"{name} must be {_KINDS[kind]}, not {array.dtype}"
        if len(axes.split()) != array.ndim:
            return f"{name} must have the axes ({axes.replace(' ', ', ')}), not shape {array.shape}"
        for axis, length in zip(axes.split(), array.shape, strict=True):
            known, by = lengths.setdefault(axis, (length, name))
            if known != length:
                return f"{name} must have {known} along {axis}{f', as {by} has' if by else ''}, not {length}"
    height, width = (int(side) for side in pictures["grid"])
    sizes = {"row": height, "column": width, "token": height * width} if height * width else {}
    for axis, known in sizes.items():
        length, by = lengths.get(axis, (known, ""))
        if length != known:
            return f"{by} must have {known} along {axis}, as grid says, not {length}"
    if lengths["channel"][0] not in (1, 3):
        return f"images must have 1 or 3 channels, not {lengths['channel'][0]}"
    if (
        _has(pictures, *_ATTENTION)
        and not 0 <= pictures["queries"].min() <= pictures["queries"].max() <= height * width
    ):
        return f"queries must be from 0 to {height * width}"
    return None


def _is(dtype: np.dtype[Any], kind: str) -> bool:
    return dtype == np.uint8 if kind == "b" else dtype.kind in {"i": "iu"}.get(kind, kind)


def _facts(pictures: Pictures) -> dict[str, Any]:
    """All that the page knows of its images but the arrays themselves."""
    names = [str(name) for name in pictures["class_names"]] if _has(pictures, "class_names") else []
    attention = _has(pictures, *_ATTENTION)
    spectra = _has(pictures, "token_spectrum", "points")
    pitch = [float(p) for p in pictures["pitch"]]
    size, grid = list(pictures["images"].shape[1:3]), pictures["grid"].tolist()
    on_image = all(grid)
    if not on_image:  # a model without one grid of tokens
        grid = list(pictures["token_spectrum"].shape[2:]) if spectra else [1, 1]
    if not all(np.isfinite(p) and p > 0 for p in pitch):  # nor one pitch: what there is covers the image
        pitch = [side / tokens for side, tokens in zip(size, grid, strict=True)]

    def name(number: int) -> str:
        return names[number] if 0 <= number < len(names) else f"class {number}"

    return {
        "model": str(pictures["model"]),
        "arm": str(pictures["arm"]),
        "data": str(pictures["data"]) if _has(pictures, "data") else "",
        "size": size,
        "grid": grid,
        "on_image": on_image,
        "pitch": pitch,
        "images": [
            {"index": int(index), "label": name(int(label)), "predicted": name(int(said)), "right": bool(label == said)}
            for index, label, said in zip(pictures["index"], pictures["label"], pictures["predicted"], strict=True)
        ],
        "frequencies": list(pictures["input_spectrum"].shape[1:]) if _has(pictures, "input_spectrum") else None,
        "points": [str(point) for point in pictures["points"]] if spectra else [],
        "rollout": _has(pictures, "rollout"),
        "layers": pictures["layers"].tolist() if attention else [],
        "head_width": pictures["head_width"].tolist() if attention else [],
        "heads": pictures["attention"].shape[2] if attention else 0,
        "queries": pictures["queries"].tolist() if attention else [],
    }


def _said(facts: Mapping[str, Any]) -> str:
    """The same in a line for people."""
    (height, width), (rows, columns), (down, along) = facts["size"], facts["grid"], facts["pitch"]
    total, right = len(facts["images"]), sum(image["right"] for image in facts["images"])
    layers = len(facts["layers"])
    return "; ".join(
        [
            *([facts["data"]] if facts["data"] else []),
            f"{total} image{'' if total == 1 else 's'} of {height} × {width} px, {right} classified rightly",
            f"{rows} × {columns} tokens {down:.4g} × {along:.4g} px apart" if facts["on_image"] else "no grid of tokens that all layers share",
            f"{layers} layer{'' if layers == 1 else 's'} with attention, {facts['heads']} head{'' if facts['heads'] == 1 else 's'} each"
            if layers
            else "no layer with attention",
        ]
    )  # fmt: skip


def _blocks(pictures: Pictures, facts: Mapping[str, Any]) -> dict[str, str]:
    """Each image's arrays in base64 by the id of their element: float16 little endian, and bytes for attention."""
    names = [
        *(["input_spectrum"] if facts["frequencies"] else []),
        *(["token_spectrum"] if facts["points"] else []),
        *(["rollout"] if facts["rollout"] else []),
        *(["attention", "attention_max", "cls_mass"] if facts["layers"] else []),
    ]
    return {
        f"{name}-{place}": base64.b64encode(
            array.astype("u1" if name == "attention" else "<f2", order="C").tobytes()
        ).decode()
        for name in names
        for place, array in enumerate(pictures[name])
    }


def _png(image: NDArray[np.uint8]) -> str:
    """An image (H, W, C) as the address of a PNG."""
    from PIL import Image

    with io.BytesIO() as file:
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def colour_table() -> NDArray[np.uint8]:
    """Viridis, (256, 3): even in lightness, so that it reads without colour too."""
    from matplotlib import colormaps

    table: NDArray[np.uint8] = colormaps["viridis"](np.arange(256), bytes=True)[:, :3]
    return table


def _sha256(text: str) -> str:
    """As a content security policy names the one script, or style, that may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
