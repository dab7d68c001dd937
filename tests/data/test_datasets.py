"""Datasets and arrays of Python give the pixels that files would, and odd ones are told."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from caco.data.arrays import ArraySource
from caco.data.datasets import own_source
from caco.data.decode import BrokenImage, decode_rgb
from caco.errors import UsageError

GOOD = np.full((16, 20, 3), 7, np.uint8)


class Items:
    """A map-style Dataset of what a function gives."""

    def __init__(self, item: Callable[[int], Any], **attributes: Any) -> None:
        self.item = item
        vars(self).update(attributes)

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        return self.item(index)


def deep_grey() -> Image.Image:
    return Image.fromarray(np.linspace(0, 65535, 16 * 16).reshape(16, 16).astype(np.uint16))


def half_transparent() -> Image.Image:
    alpha = np.linspace(0, 255, 256).reshape(16, 16).astype(np.uint8)
    return Image.merge("RGBA", [*Image.new("RGB", (16, 16), (200, 0, 90)).split(), Image.fromarray(alpha)])


@pytest.mark.parametrize("picture", [deep_grey, half_transparent, lambda: half_transparent().quantize(16)])
def test_pil_images_of_any_mode_are_those_of_files(picture: Callable[[], Image.Image]) -> None:
    file = io.BytesIO()
    picture().save(file, "PNG")
    loaded = own_source(Items(lambda index: (picture(), 0))).load(0)
    np.testing.assert_array_equal(loaded, decode_rgb(file.getvalue(), "file").pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pil_images_are_upright_and_none_is_turned_twice(orientation: int) -> None:
    """As opened, converted, or turned upright already by the Dataset: the pixels of the file."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=95, exif=exif)
    expected = decode_rgb(file.getvalue(), "file").pixels
    assert (expected.shape[0] == 20) == (orientation >= 5)
    for finished in (lambda image: image, lambda image: image.convert("RGB"), ImageOps.exif_transpose):
        loaded = own_source(Items(lambda index, finished=finished: (finished(Image.open(file)), 0))).load(0)
        np.testing.assert_array_equal(loaded, expected)


def damaged_png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[60] ^= 255
    return bytes(data)


@pytest.mark.parametrize(
    "item",
    [
        lambda: Image.open(io.BytesIO(damaged_png())),  # decoded by us
        lambda: Image.open(io.BytesIO(damaged_png())).convert("RGB"),  # decoded by the Dataset: SyntaxError
        lambda: Image.open(io.BytesIO(b"text")),
        lambda: open("nowhere.png", "rb"),  # noqa: SIM115
        lambda: GOOD[:0],
        lambda: GOOD[:, :0, 0],
    ],
)
@pytest.mark.parametrize("place", [0, 3])
def test_a_broken_image_is_no_reason_to_refuse_the_others(item: Callable[[], Any], place: int) -> None:
    source = own_source(Items(lambda index: item() if index == place else GOOD))
    with pytest.raises(BrokenImage, match=f"^image {place}: "):
        source.load(place)
    np.testing.assert_array_equal(source.load(1), GOOD)


def test_errors_of_the_dataset_itself_are_its_own() -> None:
    with pytest.raises(ZeroDivisionError):
        own_source(Items(lambda index: index // 0))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (Items(lambda index: np.zeros(5, np.uint8)), r"gives a uint8 \[5\]; caco needs"),
        (Items(lambda index: np.zeros((8, 8, 3), np.float32)), r"gives a float32 \[8, 8, 3\]; caco needs"),
        (Items(lambda index: {"image": GOOD}), "gives a dict; caco needs PIL images or arrays .* or tuples that begin"),
        (Items(lambda index: GOOD, targets=[1, 2, 3, 4]), "has 4 labels for 5 images"),
        ({"train": [GOOD], "test": [GOOD]}, "data is a dictionary of 'train', 'test'; name one part of it"),
        ({}, "data is a dictionary of nothing"),
    ],
)
def test_what_is_no_picture_is_told(data: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        own_source(data)


@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (4, 0, 8, 3), (4, 8, 0)])
def test_arrays_without_pixels(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="array holds no images"):
        ArraySource(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("targets", [[[1], [1, 2], 3, 4, 5], [["a.xml"]] * 5, ["a.xml"] * 5, [[1, 2]] * 5])
def test_targets_that_are_no_classes_are_no_labels(targets: Any) -> None:
    """Boxes, files of boxes, several classes: there is nothing to judge by, but all to train on."""
    source = own_source(Items(lambda index: GOOD, targets=targets))
    assert (source.labels, source.classes) == (None, ())
    assert len(source) == 5
