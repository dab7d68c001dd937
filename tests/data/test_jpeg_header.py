"""JPEG headers read by compiled code: what they say is what Pillow says, and anything odd is left to Pillow."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from file_sets import jpeg, smooth
from PIL import Image

from caco.data import decode
from caco.data.decode import BrokenImage, decode_rgb, plain_jpeg

pytest.importorskip("numba", reason="in the extra fast")
from caco.data.jpeg_header import plain_size

ODD = (0, 0, 0)


def size_of(data: bytes) -> tuple[int, int, int]:
    return plain_size(np.frombuffer(data, np.uint8))


def exif(orientation: int | None, order: str = "<") -> bytes:
    """Return EXIF data with two other entries."""
    tags = Image.Exif()
    tags.endian = order
    tags[0x0110], tags[0x0131] = "a camera", "a program"
    if orientation is not None:
        tags[0x0112] = orientation
    return tags.tobytes()


PICTURE = smooth(0, 40, 60)
PLAIN = {
    "colours at full size": jpeg(PICTURE, subsampling=0),
    "at half": jpeg(PICTURE, subsampling=2),
    "grey": jpeg(PICTURE.convert("L")),
    "progressive": jpeg(PICTURE, progressive=True),
    "upright": jpeg(PICTURE, exif=exif(1)),
    "upright, the other way round": jpeg(PICTURE, exif=exif(1, ">")),
    "exif that does not say": jpeg(PICTURE, exif=exif(None)),
    "a comment": jpeg(PICTURE, comment="a comment"),
    "a profile": jpeg(PICTURE, icc_profile=b"profile" * 30),
    "restarts": jpeg(PICTURE, restart_marker_blocks=2),
    "rows end": jpeg(PICTURE) + b"\0" * 8,
}
HEADER_ENDS = PLAIN["a comment"].index(b"\xff\xda")


def mpo() -> bytes:
    file = io.BytesIO()
    PICTURE.save(file, "MPO", save_all=True, append_images=[smooth(1, 40, 60)])
    return file.getvalue()


def png() -> bytes:
    file = io.BytesIO()
    PICTURE.save(file, "PNG")
    return file.getvalue()


OTHERS = {
    **{f"orientation {number}": jpeg(PICTURE, exif=exif(number)) for number in (2, 3, 6, 8)},
    "turned, the other way round": jpeg(PICTURE, exif=exif(6, ">")),
    "inks": jpeg(PICTURE.convert("CMYK")),
    "red, green and blue as they are": jpeg(PICTURE, keep_rgb=True),
    "xmp, which may tell how it lies": jpeg(PICTURE, xmp=b'<x:xmpmeta tiff:Orientation="6"/>'),
    "several pictures": mpo(),
    "no end": jpeg(PICTURE)[:-2],
    "truncated": jpeg(PICTURE)[:-300],
    "header only": PLAIN["a comment"][:HEADER_ENDS],
    "header only, and an end": PLAIN["a comment"][:HEADER_ENDS] + b"\0" * 20 + b"\xff\xd9",
    "png": png(),
    "few bytes": b"\xff\xd8\xff\xd9",
    "nothing": b"",
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_files_have_the_size_that_pillow_says(name, monkeypatch):
    """And by both is known for which a GPU has an engine."""
    suits_engine = name not in ("grey", "progressive")
    assert size_of(PLAIN[name]) == (40, 60, suits_engine)
    monkeypatch.setattr(decode, "_header_reader", lambda: None)
    assert plain_jpeg(PLAIN[name], "a picture")[1:] == (40, 60, suits_engine)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_odd_is_left_to_pillow(name):
    assert size_of(OTHERS[name]) == ODD


def test_whoever_reads_the_header_the_pixels_are_the_same(monkeypatch):
    """And what is said of broken files."""

    def by_any(data: bytes) -> object:
        try:
            return decode_rgb(data, "a picture", lambda height, width: 2)
        except BrokenImage as error:
            return error.reason

    every = {**PLAIN, **OTHERS, "tiny": jpeg(smooth(0, 5, 60))}
    ours = {name: by_any(data) for name, data in every.items()}
    found = {name for name, data in every.items() if data and _is_plain(data)}
    monkeypatch.setattr(decode, "_header_reader", lambda: None)
    assert found <= {name for name, data in every.items() if data and _is_plain(data)}
    for name, data in every.items():
        theirs = by_any(data)
        if isinstance(theirs, str):
            assert ours[name] == theirs, name
        else:
            assert np.array_equal(ours[name].pixels, theirs.pixels) and ours[name][1:] == theirs[1:], name


def _is_plain(data: bytes) -> bool:
    try:
        return plain_jpeg(data, "a picture") is not None
    except BrokenImage:
        return False


def damaged(count: int) -> list[bytes]:
    """Return files of which some bytes of the header are others, or which end early."""
    random, files = np.random.default_rng(0), []
    sources = [*PLAIN.values(), *OTHERS.values()]
    for number in range(count):
        data = bytearray(sources[number % len(sources)])
        for place in random.integers(0, min(len(data), 700), random.integers(1, 4)) if data else ():
            data[place] = random.choice([0, 1, 2, 8, 255, random.integers(256)])
        files.append(
            bytes(data[: random.integers(len(data) + 1)] if number % 5 == 0 else data) + b"\xff\xd9" * (number % 2)
        )
    return files


WITHOUT_COMPILER = """
import sys
sys.path.insert(0, sys.argv[1])
from test_jpeg_header import damaged, size_of
print([tuple(map(int, size_of(data))) for data in damaged(1500)])
"""


def test_damage_is_read_as_pillow_reads_it_or_left_and_nothing_beyond_the_data_is_read():
    """Run by Python itself, it would raise IndexError."""
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    command = [sys.executable, "-c", WITHOUT_COMPILER, os.path.dirname(__file__)]
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    files = damaged(1500)
    sizes = [size_of(data) for data in files]
    assert str(sizes) == done.stdout.strip()
    assert 200 < sum(size != ODD for size in sizes) < 1400
    for data, size in zip(files, sizes, strict=True):
        if size == ODD:
            continue
        try:
            image = Image.open(io.BytesIO(data))
        except Exception:  # whatever: decoders will say so
            continue
        assert (image.height, image.width) == size[:2]
        if image.format == "JPEG":
            assert size[2] == 0 or (image.mode == "RGB" and not image.info.get("progressive"))
            assert image.mode in ("RGB", "L") and decode._orientation(image) == 1
