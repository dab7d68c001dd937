"""Encoded image bytes to RGB pixels: every kind of picture comes out upright, 8 bit, three channels, on white."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageChops, UnidentifiedImageError

from caco.compiled_code import has_numba
from caco.errors import CacoError

try:
    import simplejpeg
except ModuleNotFoundError:  # in the extra `fast`; Pillow gives the same pixels
    if not TYPE_CHECKING:
        simplejpeg = None

Pixels = NDArray[np.uint8]
Shrink = Callable[[int, int], int]
"""From an image's upright height and width to the factor (1, 2, 4 or 8) by which it may be decoded smaller."""

# Pillow asks each of these in turn and no other: some of its readers start outside programs (EPS: Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
ENDINGS = frozenset(["jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm", "pgm"])
LEAST_SIDE = 8  # pixels
MOST_PIXELS = 2 * 1024**3 // 12  # at most 2 GiB when Pillow, the white ground and the result hold 4 bytes a pixel each

# Pillow warns of odd metadata, once per file. `catch_warnings` around each call would swap the process's filters under
# other threads; one filter, set once and behind all others, cannot, and whoever sets a filter of their own still wins.
warnings.filterwarnings("ignore", module=r"PIL\.", append=True)
logging.getLogger("PIL").addHandler(logging.NullHandler())  # else its errors go to stderr where no log is configured


class BrokenImage(CacoError):
    """One image that cannot be used; `key` says which, `reason` says why."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


class Decoded(NamedTuple):
    """An image's pixels, and what they were decoded from."""

    pixels: Pixels
    """uint8 [H, W, 3], RGB, upright."""
    height: int
    """Of the whole picture, upright, in pixels."""
    width: int
    factor: int
    """By how much `pixels` is smaller than that: 1, 2, 4 or 8."""


def decode_rgb(data: bytes, key: str, shrink: Shrink | None = None) -> Decoded:
    """Return an encoded image as RGB, upright, its pixels writable.

    JPEG, PNG, WebP, BMP, TIFF, GIF and PPM; of several frames or pages, the first. Transparency is laid on white;
    more than 8 bits are scaled down (`_scaled`); colour profiles are not applied. A factor of 2, 4 or 8 decodes a JPEG
    at that fraction of its size (rounded up), at less cost: a pixel is then 2, 4 or 8 pixels wide and high, counted from
    the top left of the picture as it is stored. Other formats are decoded whole. Thread-safe.
    Raises BrokenImage: empty, truncated, not an image, more than MOST_PIXELS, a side below LEAST_SIDE pixels.
    """
    if simplejpeg is not None and _header_reader() is not None and (plain := plain_jpeg(data, key)):
        factor = 1 if shrink is None else _checked(shrink(plain.height, plain.width))
        pixels = _by_simplejpeg(data, plain.height, plain.width, factor)
        if pixels is not None:  # else Pillow says what is wrong
            return Decoded(pixels, plain.height, plain.width, factor)
    image = _open(data, key)
    try:
        height, width = _upright_size(image)
        if min(height, width) < LEAST_SIDE:
            raise BrokenImage(key, f"too small: {height} x {width} pixels, a side is below {LEAST_SIDE}")
        factor = 1 if shrink is None else _checked(shrink(height, width))
        is_usual = simplejpeg is not None and image.format == "JPEG" and image.mode in ("RGB", "L")
        pixels = _by_simplejpeg(data, image.height, image.width, factor) if is_usual else None
        if pixels is None:
            with explained(key):
                if factor > 1 and image.draft(None, (image.width // factor, image.height // factor)) is None:
                    factor = 1  # the format knows but one size
                pixels = _stored_pixels(image)
        # Looked up after loading: Pillow turns a TIFF upright by itself, and a PNG may keep EXIF at its end.
        return Decoded(_upright(pixels, _orientation(image)), height, width, factor)
    finally:
        image.close()


class PlainJpeg(NamedTuple):
    """A JPEG file that can be decoded by others than Pillow, too: whole, upright, grey or in usual colours."""

    data: bytes
    height: int
    width: int
    suits_engine: bool
    """Whether it is of the kind that GPUs have an engine for: in colours, and coded from top to bottom (baseline)."""


def upright_size(data: bytes, key: str) -> tuple[int, int]:
    """Return an encoded image's height and width as it will be when upright, nothing decoded. Raises BrokenImage."""
    with _open(data, key) as image:
        return _upright_size(image)


def plain_jpeg(data: bytes, key: str) -> PlainJpeg | None:
    """Return an encoded image that is a plain JPEG by its header and its end; None for all others.

    By compiled code where there is numba, which also finds fewer plain, but none that is not; by Pillow else, which may raise
    BrokenImage.
    """
    if (plain_size := _header_reader()) is not None:
        height, width, suits_engine = plain_size(np.frombuffer(data, np.uint8))
        is_plain = min(height, width) >= LEAST_SIDE and height * width <= MOST_PIXELS
        return PlainJpeg(data, height, width, bool(suits_engine)) if is_plain else None
    with _open(data, key) as image:
        is_plain = (
            image.format == "JPEG"
            and image.mode in ("RGB", "L")
            and image.info.get("adobe_transform") != 0  # RGB as it is
            and data.rfind(b"\xff\xd9", len(data) - 16) >= 0
            and min(image.size) >= LEAST_SIDE
            and _orientation(image) == 1
        )
        suits_engine = image.mode == "RGB" and not image.info.get("progressive")
        return PlainJpeg(data, image.height, image.width, suits_engine) if is_plain else None


@lru_cache
def _header_reader() -> Callable[[NDArray[np.uint8]], tuple[int, int, int]] | None:
    """Return what reads a header without Python's lock, None where there is no numba."""
    if not has_numba():
        return None
    from caco.data.jpeg_header import plain_size

    return plain_size  # type: ignore[no-any-return]


def upright_pixels(image: Image.Image) -> Pixels:
    """Return the pixels of an opened image as `decode_rgb` does, writable. Raises what Pillow does."""
    pixels = _stored_pixels(image)
    return _upright(pixels, _orientation(image))


def _stored_pixels(image: Image.Image) -> Pixels:
    image.load()
    return np.array(_rgb(image))


def _checked(factor: int) -> int:
    if factor not in (1, 2, 4, 8):
        raise ValueError(f"shrink must be 1, 2, 4 or 8, not {factor}")
    return factor


def _by_simplejpeg(data: bytes, height: int, width: int, factor: int) -> Pixels | None:
    """Return the pixels of a grey or coloured JPEG as stored, or None for what Pillow should judge.

    Both use libjpeg-turbo with the same settings, so the pixels are the same (`tests/data/test_decode.py`). simplejpeg is
    strict: at anything odd in the data, if only a missing end, it gives up, and Pillow decides whether it is a picture.
    """
    height, width = -(-height // factor), -(-width // factor)
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, min_height=height, min_width=width)
    except ValueError:
        return None
    # It takes the smallest scale that is large enough; of a tiny picture that need not be the scale asked for.
    return pixels if pixels.shape == (height, width, 3) else None


@contextmanager
def explained(key: str) -> Iterator[None]:
    """Turn whatever Pillow raises inside `with` into a BrokenImage with a reason in plain words."""
    try:
        yield
    except (BrokenImage, MemoryError):
        raise
    except Image.DecompressionBombError as problem:
        raise BrokenImage(key, f"too large: more than {MOST_PIXELS:,} pixels") from problem
    # Damaged files make Pillow raise nearly anything (KeyError, struct.error, SyntaxError, ...): one bad file among
    # millions must not end a run of days. Only Pillow's own calls stand inside this `with`.
    except Exception as problem:
        said = str(problem) or type(problem).__name__
        kind_of_damage = "truncated" if isinstance(problem, EOFError) or "truncated" in said.lower() else "damaged"
        raise BrokenImage(key, f"{kind_of_damage}: {said}") from problem


def _open(data: bytes, key: str) -> Image.Image:
    """Return the image with its header read and nothing decoded."""
    if not data:
        raise BrokenImage(key, "empty: 0 bytes")
    with explained(key):
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError as problem:
            raise BrokenImage(key, f"not an image of a known kind: begins with {data[:12]!r}") from problem
    if image.width * image.height > MOST_PIXELS:
        raise BrokenImage(key, f"too large: {image.height} x {image.width} pixels, more than {MOST_PIXELS:,}")
    return image


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) to 8; damaged EXIF counts as upright."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # as many kinds as in `explained`; the pixels are fine all the same
        return 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Return stored pixels [H, W, 3] turned and mirrored as an EXIF orientation says."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Return (height, width) as the image will be when upright."""
    lying = image.format != "TIFF" and _orientation(image) >= 5  # a TIFF's size is told upright by Pillow
    return (image.width, image.height) if lying else (image.height, image.width)


def _rgb(image: Image.Image) -> Image.Image | Pixels:
    """Return a loaded image of any mode as RGB."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return np.repeat(_scaled(np.asarray(image), image)[:, :, None], 3, axis=2)
    if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        # Adobe stores ink upside down and Pillow supposes that of every JPEG; one without Adobe's marker is as it is.
        image = ImageChops.invert(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _scaled(values: NDArray[np.generic], source: Image.Image) -> Pixels:
    """Return grey values of more than 8 bits as uint8 [H, W].

    Unsigned 16 bit (12 bit in such a TIFF) is scaled by its full range. The range of floats, 32-bit and signed numbers
    is a matter of habit: 0-1, 0-255 and 0-65535 are taken as such, the least that holds the values; anything else is
    stretched from its least to its greatest value. Not-a-number becomes 0.
    """
    if source.mode.startswith("I;16"):
        bits = source.tag_v2.get(258, (16,))[0] if source.format == "TIFF" else 16  # type: ignore[attr-defined]
        return _to_bytes(values, 0, 2**bits - 1)
    if source.format in ("PNG", "PPM"):  # Pillow 10 opens 16-bit PNG as I; PPM in I is always stretched to 16 bits
        return _to_bytes(values, 0, 65535)
    numbers = np.where(np.isfinite(values), values, 0).astype(np.float64)
    least, greatest = float(numbers.min()), float(numbers.max())
    if least < 0 or greatest > 65535:
        return _to_bytes(numbers, least, greatest)
    habits = (1, 255, 65535) if source.mode == "F" else (255, 65535)
    return _to_bytes(numbers, 0, next(top for top in habits if greatest <= top))


def _to_bytes(values: NDArray[np.generic], least: float, greatest: float) -> Pixels:
    """Return values with least-greatest mapped to 0-255, rounded; all black if both are equal."""
    scale = 255 / (greatest - least) if greatest > least else 0.0
    scaled: Pixels = np.clip((values.astype(np.float64) - least) * scale + 0.5, 0, 255).astype(np.uint8)
    return scaled
