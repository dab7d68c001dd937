"""The built-in pictures: the same everywhere, balanced, never shared between splits, told apart by shape alone."""

import numpy as np
import pytest

from caco.data.textures import FAMILIES, texture_source
from caco.errors import UsageError


def _nearest_class(features: np.ndarray, labels: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Return the label of each query's nearest neighbour."""
    distances = ((queries[:, None] - features[None]) ** 2).sum(axis=2)
    return labels[distances.argmin(axis=1)]


def test_is_an_image_source() -> None:
    source = texture_source(25)
    picture = source.load(24)
    assert len(source) == 25
    assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
    assert source.labels.dtype == np.int64 and source.labels.shape == (25,)
    assert source.classes == tuple(FAMILIES) and len(source.classes) == 10
    assert source.key(13) == f"{source.classes[3]}/000013"
    assert len({source.key(index) for index in range(25)}) == 25


def test_every_family_is_equally_common() -> None:
    counts = np.bincount(texture_source(200, "test").labels, minlength=10)
    assert (counts == 20).all()


def test_same_arguments_give_same_pictures() -> None:
    first, again = texture_source(50), texture_source(50)
    assert (first.images == again.images).all()


def test_a_picture_does_not_depend_on_how_many_are_drawn() -> None:
    few, many = texture_source(37), texture_source(2345)
    assert (few.images == many.images[:37]).all()


def test_splits_share_no_picture() -> None:
    train, test = texture_source(1500, "train"), texture_source(500, "test")
    pictures = np.concatenate([train.images, test.images]).reshape(2000, -1)
    assert len(np.unique(pictures, axis=0)) == 2000


def test_every_picture_has_two_visible_colours() -> None:
    grey = texture_source(500).images.astype(np.float64) @ [0.299, 0.587, 0.114]
    ink = np.percentile(grey, 95, axis=(1, 2)) - np.percentile(grey, 5, axis=(1, 2))
    assert np.percentile(ink, 2) > 12 and np.median(ink) > 60


def test_colour_and_brightness_do_not_give_the_family_away() -> None:
    train, test = texture_source(1000, "train"), texture_source(1000, "test")
    guesses = _nearest_class(train.images.mean(axis=(1, 2)), train.labels, test.images.mean(axis=(1, 2)))
    accuracy = (guesses == test.labels).mean()
    assert accuracy < 0.2  # chance is 0.1


def test_shape_gives_the_family_away() -> None:
    """A hand-made measure of shape that knows nothing of colour, place or direction must do far better than chance."""

    def rotation_free_spectrum(images: np.ndarray) -> np.ndarray:
        grey = images.astype(np.float64).mean(axis=3)
        grey -= grey.mean(axis=(1, 2), keepdims=True)
        grey /= grey.std(axis=(1, 2), keepdims=True)
        spectrum = np.abs(np.fft.fft2(grey * np.hanning(32) * np.hanning(32)[:, None]))
        return np.sort(spectrum.reshape(len(images), -1), axis=1)[:, :-200:-2]

    train, test = texture_source(1000, "train"), texture_source(300, "test")
    guesses = _nearest_class(rotation_free_spectrum(train.images), train.labels, rotation_free_spectrum(test.images))
    assert (guesses == test.labels).mean() > 0.3


def test_an_unknown_split_is_told() -> None:
    with pytest.raises(UsageError, match="no split is called 'tset'"):
        texture_source(10, "tset")
