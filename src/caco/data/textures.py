"""Built-in pictures that need no download: ten families of textures, drawn by a generator.

A family is a shape (stripes, checks, dots, ...). Everything else is drawn at random for each picture: both colours,
which of them is the ink, direction, scale, place, thickness, grain. So colour, brightness and position say nothing of
the family, and pixels alone are of little use: an encoder has to see the shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from caco.data.decode import Pixels
from caco.errors import UsageError, did_you_mean

Floats = NDArray[np.floating[Any]]
SPLITS = ("train", "test")
SIZE, SEED = 32, 0
_CHUNK = 1000  # pictures drawn at a time: small enough to stay in the processor's cache, large enough for numpy
_COLOURS = 6  # drawn for each picture, which gets the darkest and the brightest of them: no shape drowns


class TextureSource:
    """An `ImageSource` of drawn textures; all pictures are in memory, `images: uint8 [N, SIZE, SIZE, 3]`."""

    def __init__(self, name: str, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        self.name = name
        self.images = images
        self.labels = labels
        self.classes = tuple(FAMILIES)

    def __len__(self) -> int:
        return len(self.images)

    def key(self, index: int) -> str:
        """Return "family/number", e.g. "dots/000012"."""
        return f"{self.classes[self.labels[index]]}/{index:06d}"

    def load(self, index: int) -> Pixels:
        """Return picture `index`, uint8 [SIZE, SIZE, 3], RGB; not to be written to."""
        picture: Pixels = self.images[index]
        return picture


def texture_source(count: int, split: str = "train") -> TextureSource:
    """Return `count` pictures of SIZE × SIZE pixels; picture i is of family i modulo 10.

    A picture depends on (split, index) alone, not on count; "train" and "test" share none.
    Raises UsageError for an unknown split.
    """
    if split not in SPLITS:
        near = did_you_mean(split, SPLITS)
        raise UsageError(f"textures: no split is called {split!r}; there are train and test.{near}")
    labels = np.arange(count, dtype=np.int64) % len(FAMILIES)
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    # Two streams, filled picture by picture: a longer source begins with the pictures of a shorter one.
    shapes, grain = (np.random.default_rng([SEED, SPLITS.index(split), stream]) for stream in range(2))
    for first in range(0, count, _CHUNK):
        part = slice(first, min(first + _CHUNK, count))
        number = part.stop - part.start
        draws = shapes.random((number, _Draw.WIDTH), dtype=np.float32)
        noise = grain.standard_normal((number, SIZE, SIZE, 1), dtype=np.float32)
        images[part] = _paint(_ink(labels[part], draws), draws, noise)
    return TextureSource(f"textures ({split})", images, labels)


class _Draw:
    """Columns of the table of random numbers in 0-1: one row a picture."""

    ANGLE, PERIOD, ACROSS, ALONG, THICKNESS, EXTRA, POLARITY, GRAIN = range(8)
    COLOURS = slice(8, 8 + 3 * _COLOURS)
    WAVES = slice(COLOURS.stop, COLOURS.stop + 3 * 16)
    WIDTH = WAVES.stop


def _between(draw: Floats, least: float, most: float) -> Floats:
    """Return draws spread over least-most, shaped to broadcast against pixels [N, S, S]."""
    return (least + (most - least) * draw)[:, None, None]


class _Sheet:
    """The pixels of pictures of one family: rotated coordinates, in pixels, about each picture's own origin."""

    def __init__(self, draws: Floats) -> None:
        self.draws = draws
        centred = np.arange(SIZE, dtype=np.float32) - (SIZE - 1) / 2
        angle = _between(draws[:, _Draw.ANGLE], 0, 2 * np.pi)
        cosine, sine = np.cos(angle), np.sin(angle)
        self.across = cosine * centred + sine * centred[:, None]
        self.along = cosine * centred[:, None] - sine * centred

    def draw(self, column: int, least: float, most: float) -> Floats:
        """Return one random number a picture, uniform in least-most, [N, 1, 1]."""
        return _between(self.draws[:, column], least, most)

    def period(self, least: float, most: float) -> Floats:
        """Return a length in pixels, [N, 1, 1], from its bounds as shares of the picture's side."""
        return self.draw(_Draw.PERIOD, least * SIZE, most * SIZE)

    def lattice(self, period: Floats) -> tuple[Floats, Floats]:
        """Return both coordinates in periods, from a random origin."""
        return (
            self.across / period + self.draw(_Draw.ACROSS, 0, 1),
            self.along / period + self.draw(_Draw.ALONG, 0, 1),
        )

    def polar(self, spread: float) -> tuple[Floats, Floats]:
        """Return distance in pixels and angle in turns about a centre at most `spread` sides from the middle."""
        reach = spread * SIZE
        x = self.across + self.draw(_Draw.ACROSS, -reach, reach)
        y = self.along + self.draw(_Draw.ALONG, -reach, reach)
        return np.hypot(x, y), np.arctan2(y, x) / np.float32(2 * np.pi)


# Each family returns the signed distance, in pixels, from the edge of its ink: positive inside. [N, S, S]


def _fold(position: Floats) -> Floats:
    """Return the distance to the middle of the period, 0 to 0.5, for a position in periods."""
    distance: Floats = np.abs(position - np.floor(position) - np.float32(0.5))
    return distance


def _alternate(*distances: Floats) -> Floats:
    """Return a two-colouring of the plane cut by sets of lines, from the signed distance to each set."""
    nearest = np.minimum.reduce([np.abs(distance) for distance in distances])
    coloured: Floats = np.copysign(nearest, np.prod([np.sign(distance) for distance in distances], axis=0))
    return coloured


def _stripes(sheet: _Sheet) -> Floats:
    period = sheet.period(0.098, 0.195)
    position, _ = sheet.lattice(period)
    return (sheet.draw(_Draw.THICKNESS, 0.2, 0.3) - _fold(position)) * period


def _checks(sheet: _Sheet) -> Floats:
    period = sheet.period(0.182, 0.325)
    x, y = sheet.lattice(period)
    return _alternate(0.25 - _fold(x), 0.25 - _fold(y)) * period


def _triangles(sheet: _Sheet) -> Floats:
    period = sheet.period(0.293, 0.488)
    x, y = sheet.lattice(period)
    slanted = np.float32(np.sqrt(3) / 2) * y
    lines = (x, slanted - 0.5 * x, -slanted - 0.5 * x)  # three directions 120° apart; they sum to 0, so they meet
    return _alternate(*(0.25 - _fold(line + np.float32(0.25)) for line in lines)) * period


def _dots(sheet: _Sheet) -> Floats:
    period = sheet.period(0.13, 0.234)
    x, y = sheet.lattice(period)
    return (sheet.draw(_Draw.THICKNESS, 0.33, 0.42) - np.hypot(_fold(x), _fold(y))) * period


def _rings(sheet: _Sheet) -> Floats:
    period = sheet.period(0.098, 0.195)
    distance, _ = sheet.polar(0.35)
    return (sheet.draw(_Draw.THICKNESS, 0.2, 0.3) - _fold(distance / period + sheet.draw(_Draw.EXTRA, 0, 1))) * period


def _rays(sheet: _Sheet) -> Floats:
    count = np.floor(sheet.draw(_Draw.PERIOD, 7, 13))
    distance, turns = sheet.polar(0.35)
    return (0.25 - _fold(turns * count)) * distance * (2 * np.pi / count)


def _bricks(sheet: _Sheet) -> Floats:
    height = sheet.period(0.104, 0.169)
    x, y = sheet.lattice(height)
    length = 2.2
    odd_row = np.floor(y) % 2
    joint = 0.5 - _fold(x / length + odd_row / 2)
    mortar = np.minimum(0.5 - _fold(y), joint * length)
    joints: Floats = (sheet.draw(_Draw.THICKNESS, 0.13, 0.2) - mortar) * height
    return joints


def _zigzag(sheet: _Sheet) -> Floats:
    period = sheet.period(0.104, 0.182)
    x, y = sheet.lattice(period)
    slope = sheet.draw(_Draw.EXTRA, 0.8, 1.4)
    stretch = sheet.draw(_Draw.THICKNESS, 1.4, 2.0)
    bent = y + slope * stretch * _fold(x / stretch)
    steepness: Floats = np.sqrt(1 + slope**2)
    return (0.25 - _fold(bent)) * period / steepness


def _crosses(sheet: _Sheet) -> Floats:
    period = sheet.period(0.182, 0.293)
    x, y = (_fold(position) for position in sheet.lattice(period))
    width = sheet.draw(_Draw.THICKNESS, 0.11, 0.15)
    length = sheet.draw(_Draw.EXTRA, 0.36, 0.42)
    upright = np.minimum(width - x, length - y)
    lying = np.minimum(length - x, width - y)
    cross: Floats = np.maximum(upright, lying)
    return cross * period


def _blotches(sheet: _Sheet) -> Floats:
    """Smooth noise: waves of one length in random directions, cut at zero."""
    period = sheet.period(0.143, 0.293)
    field = np.zeros_like(sheet.across)
    waves = sheet.draws[:, _Draw.WAVES].reshape(len(field), 3, -1)
    for number in range(waves.shape[2]):
        angle, phase, stretch = (_between(waves[:, kind, number], 0, 1) for kind in range(3))
        angle, phase, stretch = 2 * np.pi * angle, 2 * np.pi * phase, (0.6 + 0.8 * stretch) * 2 * np.pi / period
        field += np.cos((np.cos(angle) * sheet.across + np.sin(angle) * sheet.along) * stretch + phase)
    steepness = np.sqrt(waves.shape[2]) * np.pi / period
    distance: Floats = field / steepness
    return distance


FAMILIES: dict[str, Callable[[_Sheet], Floats]] = {
    "stripes": _stripes,
    "checks": _checks,
    "triangles": _triangles,
    "dots": _dots,
    "rings": _rings,
    "rays": _rays,
    "bricks": _bricks,
    "zigzag": _zigzag,
    "crosses": _crosses,
    "blotches": _blotches,
}


def _ink(labels: NDArray[np.int64], draws: Floats) -> Floats:
    """Return the share of ink in each pixel, 0-1, [N, S, S]; edges are one pixel soft."""
    ink = np.empty((len(labels), SIZE, SIZE), np.float32)
    for label, family in enumerate(FAMILIES.values()):
        chosen = labels == label
        ink[chosen] = np.clip(family(_Sheet(draws[chosen])) + 0.5, 0, 1)
    return ink


def _paint(ink: Floats, draws: Floats, noise: Floats) -> NDArray[np.uint8]:
    """Return uint8 [N, S, S, 3]: two random colours that differ in brightness, in random roles, and grain."""
    colours = draws[:, _Draw.COLOURS].reshape(len(draws), _COLOURS, 3)
    brightness = colours @ np.array([0.299, 0.587, 0.114], np.float32)
    rows = np.arange(len(draws))
    darkest, brightest = colours[rows, brightness.argmin(axis=1)], colours[rows, brightness.argmax(axis=1)]
    swap = draws[:, _Draw.POLARITY, None] < 0.5
    paper, pen = np.where(swap, brightest, darkest), np.where(swap, darkest, brightest)
    picture = paper[:, None, None] + (pen - paper)[:, None, None] * ink[..., None]
    picture += noise * _between(draws[:, _Draw.GRAIN], 0.01, 0.05)[..., None]
    pixels: NDArray[np.uint8] = np.clip(picture * 255 + 0.5, 0, 255).astype(np.uint8)
    return pixels
