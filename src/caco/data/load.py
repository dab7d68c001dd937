"""One image for training: the next good one in place of a broken one, and no larger than its views need."""

from __future__ import annotations

from typing import NamedTuple

from caco.data.broken import BrokenImages
from caco.data.decode import BrokenImage, Pixels, Shrink
from caco.data.source import ImageSource
from caco.errors import CacoError


class Loaded(NamedTuple):
    """A decoded image, and what it was decoded from."""

    pixels: Pixels
    height: int
    """Of the image as it is stored, in pixels."""
    width: int
    factor: int
    """By how much `pixels` is smaller: 1, 2, 4 or 8."""


def load_or_next(source: ImageSource, index: int, broken: BrokenImages, shrink: Shrink | None = None) -> Pixels:
    """Return an image, or in place of a broken one the next good one: the same choice in every run.

    Raises CacoError when too many are broken (`BrokenImages.add`) or none is left.
    """
    for offset in range(len(source)):
        place = (index + offset) % len(source)
        try:
            pixels = source.load(place, shrink)
        except BrokenImage as error:
            broken.add(error.key, error.reason)
            continue
        if len(broken):
            broken.forget(source.key(place))
        return pixels
    raise CacoError(f"{source.name} has no image that can be read")


def load_shrunk(source: ImageSource, index: int, broken: BrokenImages, shrink: Shrink) -> Loaded:
    """The same, decoded smaller by the factor that `shrink` says for its size, if the source and its format can."""
    asked: tuple[int, int] | None = None
    factor = 1

    def remember(height: int, width: int) -> int:
        nonlocal asked, factor
        asked, factor = (height, width), shrink(height, width)
        return factor

    pixels = load_or_next(source, index, broken, remember)
    if asked is None or asked == pixels.shape[:2]:  # the source never asks, or the format knows but one size
        asked, factor = (pixels.shape[0], pixels.shape[1]), 1
    return Loaded(pixels, asked[0], asked[1], factor)
