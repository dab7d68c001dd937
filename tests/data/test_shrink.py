"""Large photos decoded no larger than their views need: which factor, and how little it changes."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from renderers import RENDERERS, render_by

from caco.config import Views
from caco.data.arrays import ArraySource
from caco.data.augment import Renderer, draw_parameters, render_views
from caco.data.broken import BrokenImages
from caco.data.decode import BrokenImage, decode_rgb
from caco.data.load import load_decoded, load_or_next
from caco.data.loader import TrainingViews
from caco.data.parameters import NEVER_SHRUNK, largest_shrink
from caco.data.resident import decode_whole_set
from caco.data.source import open_source
from caco.views import IMAGENET_MEAN, IMAGENET_STD

PLAIN = (0.0,) * 3, (1.0,) * 3
CPU = torch.device("cpu")
CROP_ONLY = {"jitter_probability": 0, "gray_probability": 0, "blur_probability": 0, "solarize_probability": 0}


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours, edges and some grain."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((width, height), 3)
    pixels = np.asarray(coarse).astype(float)
    y, x = np.mgrid[:height, :width]
    pixels[(y // 90 + x // 70) % 3 == 0] *= 0.6
    return np.clip(pixels + random.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90, **options)
    return file.getvalue()


@pytest.mark.parametrize("views", [Views(size=32), Views(size=128), Views(size=224, small=6, small_size=96)])
def test_factor_is_the_largest_at_which_every_crop_fills_its_view(views: Views) -> None:
    augmentations = views.augmentations()
    sizes = np.random.default_rng(0).integers(max(400, 9 * views.size // 2), max(1200, 18 * views.size), (60, 2))
    chosen = set()
    for index, (height, width) in enumerate(sizes.tolist()):
        if height * width <= NEVER_SHRUNK:
            continue
        key = {"seed": 3, "epoch": 2}
        factor = largest_shrink(augmentations, height, width, index=index, **key)
        drawn = [
            draw_parameters(augmentation, height, width, indices=[index], view=view, **key)
            for view, augmentation in enumerate(augmentations)
        ]
        room = min(
            min(crop.height[0], crop.width[0]) / augmentation.size
            for crop, augmentation in zip(drawn, augmentations, strict=True)
        )
        assert factor == max([allowed for allowed in (2, 4, 8) if allowed <= room], default=1)
        chosen.add(factor)
    assert len(chosen) >= 2


def test_small_pictures_are_left_alone() -> None:
    augmentations, side = Views(size=16).augmentations(), int(NEVER_SHRUNK**0.5)
    key = {"seed": 0, "epoch": 0, "index": 0}
    assert largest_shrink(augmentations, side, side, **key) == 1
    assert largest_shrink(augmentations, side, 4 * side, **key) > 1


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_crops_keep_their_place_to_a_fraction_of_a_pixel(factor: int, renderer: Renderer) -> None:
    """Of a ramp, which averaging by pixels and by triangles leaves a ramp, the views are the same but for their edge."""
    y, x = np.mgrid[:403, :597]
    ramp = np.stack([0.4181 * x, 0.6067 * y, 0.1931 * x + 0.3119 * y], axis=2)  # no slope that rounds to one side
    padded = np.pad(ramp, ((0, -403 % factor), (0, -597 % factor), (0, 0)), mode="edge")
    means = padded.reshape(padded.shape[0] // factor, factor, -1, factor, 3).mean(axis=(1, 3))
    augmentation = replace(Views(size=40).augmentations()[0], **CROP_ONLY)
    parameters = draw_parameters(augmentation, 403, 597, seed=0, epoch=0, indices=np.arange(20), view=0)
    assert (parameters.shrunk(np.full(20, factor)).top % 1 > 0).any()
    images = [np.rint(pixels).astype(np.uint8) for pixels in (ramp, means)]
    whole = render_by(renderer, [images[0]] * 20, parameters, augmentation, *PLAIN)
    small = render_by(renderer, [images[1]] * 20, parameters.shrunk(np.full(20, factor)), augmentation, *PLAIN)
    # Both were rounded to bytes: by half a step at most, which the finer one averages away. A crop that is displaced by
    # half a pixel of the smaller image would be off by 0.3 · factor / 2 steps.
    inner = (whole - small)[:, :, 3:-3, 3:-3] * 255
    assert inner.abs().mean() < 0.2
    assert inner.mean(dim=(0, 2, 3)).abs().max() < 0.03


def test_renderers_agree_on_fractions_of_a_pixel() -> None:
    augmentation = Views(size=24).augmentations()[0]
    images = [photo(61, 47, seed) for seed in range(30)]
    parameters = draw_parameters(augmentation, 485, 371, seed=0, epoch=0, indices=np.arange(30), view=0)
    shrunk = parameters.shrunk(np.full(30, 8))
    slow, fast = (render_by(renderer, images, shrunk, augmentation, *PLAIN) for renderer in RENDERERS)
    assert (slow - fast).abs().max() <= 1e-4


@pytest.mark.parametrize("size", [32, 64, 128])
def test_views_of_shrunk_photos_differ_little(size: int) -> None:
    augmentations = [replace(augmentation, **CROP_ONLY) for augmentation in Views(size=size).augmentations()]
    differences, factors = [], []
    for index, (height, width) in enumerate([(600, 801), (767, 511), (900, 1203), (1000, 1333)]):
        data = jpeg(photo(height, width, index))
        factor = largest_shrink(augmentations, height, width, seed=0, epoch=0, index=index)
        whole = decode_rgb(data, "photo").pixels
        small = decode_rgb(data, "photo", lambda height, width, factor=factor: factor).pixels
        factors.append(factor)
        for view, augmentation in enumerate(augmentations):
            parameters = draw_parameters(augmentation, height, width, seed=0, epoch=0, indices=[index], view=view)
            theirs = render_views([whole], parameters, augmentation, *PLAIN)
            ours = render_views([small], parameters.shrunk(np.array([factor])), augmentation, *PLAIN)
            differences.append(float((ours - theirs).abs().mean()) * 255)
    assert max(factors) > 1
    assert np.mean(differences) < 1.5  # steps of 8 bits
    assert max(differences) < 3


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve photos of several kinds and sizes."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(9):
        options = {"exif": exif} if number % 3 == 0 else {}
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(photo(500 + 40 * number, 613 + 11 * number, number), **options))
    Image.fromarray(photo(300, 400)).save(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_bytes(jpeg(photo(500, 700))[:9000])
    (tmp_path / "c.jpg").write_bytes(jpeg(photo(90, 120)))
    return tmp_path


def loader(folder: Path, **options: int) -> TrainingViews:
    source = open_source(folder)
    return TrainingViews.create(
        source,
        Views(size=32, small=1, small_size=24).augmentations(),
        IMAGENET_MEAN,
        IMAGENET_STD,
        batch_size=12,
        seed=0,
        device=CPU,
        broken=BrokenImages(len(source), 1.0),
        **{"workers": 2, **options},
    )


def test_the_loader_asks_for_it_and_nothing_else_changes(photos: Path) -> None:
    views = loader(photos)
    (batch,) = views.batches(1)
    for options in ({"workers": 1}, {"workers": 5}):
        (same,) = loader(photos, **options).batches(1)
        assert all(torch.equal(one, other) for one, other in zip(batch.views, same.views, strict=True))
    parts = [next(iter(loader(photos, rank=rank, world_size=2).batches(1))) for rank in range(2)]
    for number, view in enumerate(batch.views):
        assert torch.equal(torch.cat([part.views[number] for part in parts]), view)

    augmentations = views.maker.views.augmentations
    smaller, differences = 0, []
    for row, index in enumerate(batch.indices.tolist()):
        source = views.source
        try:
            whole = source.load(index)
        except BrokenImage:
            whole = source.load((index + 1) % len(source))
        key = {"seed": 0, "epoch": 1}
        smaller += largest_shrink(augmentations, *whole.shape[:2], index=index, **key) > 1
        for number, augmentation in enumerate(augmentations):
            drawn = draw_parameters(augmentation, *whole.shape[:2], indices=[index], view=number, **key)
            full = render_views([whole], drawn, augmentation, IMAGENET_MEAN, IMAGENET_STD)[0]
            differences.append(float((full - batch.views[number][row]).abs().mean()))
    assert smaller > 5
    assert np.mean(differences) < 0.025  # of a standard deviation; another picture or crop is off by some 1
    assert max(differences) < 0.08


def test_what_was_decoded_and_from_what(photos: Path) -> None:
    source, broken = open_source(photos), BrokenImages(12, 1.0)
    names = [source.key(index) for index in range(12)]

    def load(name: str) -> tuple[object, ...]:
        load = partial(load_decoded, source, shrink=lambda height, width: 4)
        decoded = load_or_next(source, names.index(name), broken, load)
        return decoded.pixels.shape, *decoded[1:]

    assert load("1.jpg") == ((135, 156, 3), 540, 624, 4)
    assert load("3.jpg") == ((162, 155, 3), 646, 620, 4)  # turned upright
    assert load("a.png") == ((300, 400, 3), 300, 400, 1)
    assert load("b.jpg") == ((23, 30, 3), 90, 120, 4)  # the one after it
    assert len(broken) == 1
    array = ArraySource(np.zeros((2, 500, 400, 3), np.uint8))
    assert load_decoded(array, 1, lambda height, width: 8)[1:] == (500, 400, 1)


def test_sets_whose_images_may_be_shrunk_are_not_held(tmp_path: Path) -> None:
    """Else the free memory of the machine would decide which pixels a run sees."""
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(photo(513, 513, number)))
    broken = BrokenImages(3, 1.0)
    assert decode_whole_set(open_source(tmp_path), broken, 1, CPU) is None
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(photo(512, 512, number)))
    held = decode_whole_set(open_source(tmp_path), broken, 1, CPU)
    assert held is not None
    assert np.array_equal(held[2].numpy(), open_source(tmp_path).load(2))
