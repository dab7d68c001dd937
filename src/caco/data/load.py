"""One image for training: the next good one in place of a broken one, and no larger than its views need."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from caco.data.broken import BrokenImages
from caco.data.decode import BrokenImage, Decoded, Shrink
from caco.data.encoded import EncodedSource
from caco.data.source import ImageSource
from caco.errors import CacoError

Image = TypeVar("Image")


def load_or_next(source: ImageSource, index: int, broken: BrokenImages, load: Callable[[int], Image]) -> Image:
    """Return load(index), or in place of a broken image the next good one: the same choice in every run.

    Raises CacoError when too many are broken (`BrokenImages.add`) or none is left.
    """
    for offset in range(len(source)):
        candidate = (index + offset) % len(source)
        try:
            image = load(candidate)
        except BrokenImage as error:
            broken.add(error.key, error.reason)
            continue
        if len(broken):
            broken.forget(source.key(candidate))
        return image
    raise CacoError(f"{source.name} has no image that can be read")


def load_decoded(source: ImageSource, index: int, shrink: Shrink) -> Decoded:
    """Return an image, decoded smaller where its source holds it encoded and its format can. Raises BrokenImage."""
    if isinstance(source, EncodedSource):
        return source.load_shrunk(index, shrink)
    pixels = source.load(index)
    return Decoded(pixels, pixels.shape[0], pixels.shape[1], factor=1)
