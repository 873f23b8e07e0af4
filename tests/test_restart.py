"""JPEGs with restart markers: a crop decodes alone, and its pixels are those of the whole image."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from eit_lab.data.decode import DecodeError, Decoder, decode_pil
from eit_lab.data.packed import DamagedRecordError, pack_record, unpack_record
from eit_lab.data.restart import (
    NotAJpegError,
    cut,
    find_segments,
    interval_for,
    jpegtran,
    read_header,
    rewrite,
)

needs_jpegtran = pytest.mark.skipif(jpegtran() is None, reason="jpegtran is not installed (libjpeg-turbo-progs)")
SUBSAMPLINGS = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}


@pytest.fixture(scope="module")
def photographs() -> list[NDArray[np.uint8]]:
    from sklearn.datasets import load_sample_images

    return list(load_sample_images().images)


def piece(photo: NDArray[np.uint8], rng: np.random.Generator, *, least: int = 1) -> Image.Image:
    h, w = (int(rng.integers(least, side)) for side in photo.shape[:2])
    y, x = int(rng.integers(0, photo.shape[0] - h + 1)), int(rng.integers(0, photo.shape[1] - w + 1))
    return Image.fromarray(photo[y : y + h, x : x + w])


def jpeg(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 92, **options})
    return file.getvalue()


def assert_crops_are_exact(marked: bytes, whole: NDArray[np.uint8], rng: np.random.Generator) -> None:
    segments = find_segments(marked)
    assert segments is not None
    height, width = whole.shape[:2]
    decoder = Decoder()
    for _ in range(6):
        h, w = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
        y, x = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
        crop = decoder.crop(marked, segments, box=(y, x, h, w))
        assert np.array_equal(crop, whole[y : y + h, x : x + w]), (whole.shape, (y, x, h, w))


@needs_jpegtran
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_crop_of_a_rewritten_jpeg_has_the_originals_pixels(
    subsampling: str, mode: str, photographs: list[NDArray[np.uint8]]
) -> None:
    rng = np.random.default_rng(list(SUBSAMPLINGS).index(subsampling))
    program = jpegtran()
    assert program is not None
    for number in range(8):
        image = piece(photographs[number % 2], rng).convert(mode)
        original = jpeg(image, subsampling=SUBSAMPLINGS[subsampling], quality=int(rng.integers(60, 98)))
        marked = rewrite(original, program=program)
        assert marked is not None
        assert_crops_are_exact(marked, decode_pil(original), rng)


def test_a_crop_of_any_jpeg_with_fitting_restart_markers_has_the_originals_pixels(
    photographs: list[NDArray[np.uint8]],
) -> None:
    rng = np.random.default_rng(5)
    for blocks, size in ((1, (333, 250)), (3, (333, 250)), (4, (500, 375)), (32, (500, 375))):
        image = Image.fromarray(photographs[0]).resize(size)
        marked = jpeg(image, subsampling=2, restart_marker_blocks=blocks)
        assert_crops_are_exact(marked, decode_pil(marked), rng)
    # A segment that goes on in the next row of MCUs cannot be cut out.
    assert find_segments(jpeg(image, subsampling=2, restart_marker_blocks=5)) is None
    assert find_segments(jpeg(image)) is None


def test_a_cutout_is_a_jpeg_that_any_decoder_reads_without_a_word(photographs: list[NDArray[np.uint8]]) -> None:
    marked = jpeg(Image.fromarray(photographs[1]), subsampling=2, restart_marker_blocks=4)
    segments = find_segments(marked)
    assert segments is not None
    part = cut(marked, segments, x=200, y=100, w=120, h=90)
    assert (part.left, part.top) == (192, 96)
    assert (part.width, part.height) == (192, 96)
    assert len(part.data) < 0.2 * len(marked)
    header = read_header(part.data)
    assert (header.width, header.height) == (192, 96)
    assert np.array_equal(decode_pil(part.data), Decoder().decode(part.data))


@needs_jpegtran
def test_what_cannot_be_rewritten_is_left_as_it_is(photographs: list[NDArray[np.uint8]]) -> None:
    program = jpegtran()
    assert program is not None
    image = Image.fromarray(photographs[0]).resize((160, 120))
    assert rewrite(jpeg(image), program=program) is not None
    assert rewrite(jpeg(image.convert("CMYK")), program=program) is None
    assert rewrite(jpeg(image, progressive=True), program=program) is None
    assert rewrite(jpeg(image)[:3000], program=program) is None
    png = io.BytesIO()
    image.save(png, "PNG")
    with pytest.raises(NotAJpegError, match="does not begin with FF D8 FF"):
        rewrite(png.getvalue(), program=program)


@pytest.mark.parametrize(("width", "mcus"), [(500, 2), (375, 2), (333, 3), (400, 1), (496, 1), (64, 2), (20, 2)])
def test_segments_are_about_32_px_wide_and_divide_a_row(width: int, mcus: int) -> None:
    header = read_header(jpeg(Image.new("RGB", (width, 40)), subsampling=2))
    assert interval_for(header) == mcus


@pytest.mark.parametrize(
    "kind", ["baseline", "progressive", "grey", "grey 4:2:0", "CMYK", "PNG", "4:4:4", "no EXIF end"]
)
def test_every_kind_of_file_decodes_as_pil_does(kind: str, photographs: list[NDArray[np.uint8]]) -> None:
    image = Image.fromarray(photographs[0]).resize((203, 151))
    match kind:
        case "PNG":
            file = io.BytesIO()
            image.save(file, "PNG")
            data = file.getvalue()
        case "CMYK":
            data = jpeg(image.convert("CMYK"))
        case "grey" | "grey 4:2:0":
            data = jpeg(image.convert("L"), subsampling=2 if kind.endswith("0") else 0)
        case "no EXIF end":
            data = jpeg(image, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
        case _:
            data = jpeg(image, progressive=kind == "progressive", subsampling=0 if kind == "4:4:4" else 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PIL's, of the EXIF
        with Image.open(io.BytesIO(data)) as opened:
            expected = np.asarray(opened.convert("RGB"))
    assert np.array_equal(Decoder().decode(data), expected)


def test_damaged_bytes_are_an_error_and_not_a_picture(photographs: list[NDArray[np.uint8]]) -> None:
    data = jpeg(Image.fromarray(photographs[0]).resize((320, 240)))
    scan = read_header(data).scan_at
    damaged = bytearray(data)
    damaged[scan + 5000 : scan + 5040] = b"\xff\xd8" * 20
    for bad in (
        data[: len(data) // 2],
        data[: scan - 4],
        bytes(damaged),
        data[:2],
        b"",
        b"not an image",
        b"\xff\xd8\xff",
    ):
        with pytest.raises(DecodeError):
            Decoder().decode(bad)


def test_a_file_cut_anywhere_is_an_error(photographs: list[NDArray[np.uint8]]) -> None:
    image = Image.fromarray(photographs[0]).resize((48, 32))
    for data in (jpeg(image), jpeg(image.convert("L")), jpeg(image, progressive=True), jpeg(image.convert("CMYK"))):
        for length in range(len(data) - 2):
            with pytest.raises(DecodeError):
                Decoder().decode(data[:length])


def test_damage_in_cmyk_is_found_too(photographs: list[NDArray[np.uint8]]) -> None:
    data = bytearray(jpeg(Image.fromarray(photographs[0]).resize((320, 240)).convert("CMYK")))
    place = read_header(bytes(data)).scan_at + 3000
    data[place : place + 4000] = bytes(4000)
    with pytest.raises(DecodeError):
        Decoder().decode(bytes(data))


def test_every_flipped_bit_of_a_record_is_found(photographs: list[NDArray[np.uint8]]) -> None:
    import xxhash

    marked = jpeg(Image.fromarray(photographs[0]).resize((64, 48)), restart_marker_blocks=4)
    record = pack_record(marked, find_segments(marked))
    checksum = xxhash.xxh3_64_intdigest(record)
    whole = unpack_record(record, width=64, height=48, checksum=checksum)
    assert bytes(whole.data) == marked
    assert whole.segments is not None
    assert whole.segments.offsets.tolist() == find_segments(marked).offsets.tolist()  # type: ignore[union-attr]
    rng = np.random.default_rng(0)
    for place in [*range(40), *rng.integers(0, len(record), 200).tolist()]:
        damaged = bytearray(record)
        damaged[place] ^= 1 << int(rng.integers(8))
        with pytest.raises(DamagedRecordError, match="checksum differs"):
            unpack_record(bytes(damaged), width=64, height=48, checksum=checksum)
