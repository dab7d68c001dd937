"""The compiled kernel against plain torch, and what a loader asks of it: threads, memory layouts, a clean start."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from renderers import RENDERERS, render_by

import caco
from caco.config import Views
from caco.data.augment import draw_parameters, render_with_numba
from caco.views import IMAGENET_MEAN, IMAGENET_STD

pytest.importorskip("numba")
from caco.data.kernel import views as kernel

STATISTICS = IMAGENET_MEAN, IMAGENET_STD


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """The hardest picture: neighbours have nothing in common."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [8, 32, 37, 64, 96, 224])
@pytest.mark.parametrize("view", [0, 1])
def test_renderers_agree(size: int, view: int) -> None:
    augmentation = replace(Views().augmentations()[view], size=size, blur_probability=0.6, solarize_probability=0.3)
    shapes = [(8, 8), (375, 500), (8, 2000), (1500, 9), (1, 1), (33, 31), (224, 224), (640, 480)]
    images = [noise(*shape, seed) for seed, shape in enumerate(shapes * 2)]
    heights, widths = np.array(shapes * 2).T
    parameters = draw_parameters(
        augmentation, heights, widths, seed=1, epoch=0, indices=np.arange(len(images)), view=view
    )
    slow, fast = (
        render_by(renderer, images, parameters, augmentation, (0.0,) * 3, (1.0,) * 3) for renderer in RENDERERS
    )
    assert (slow - fast).abs().max() <= 1e-4


def test_renderers_agree_at_every_order_and_combination() -> None:
    augmentation = replace(
        Views(size=16).augmentations()[0], blur_probability=0.5, solarize_probability=0.5, gray_probability=0.3
    )
    images = torch.from_numpy(np.stack([noise(20, 20, seed) for seed in range(400)]))
    parameters = draw_parameters(augmentation, 20, 20, seed=0, epoch=0, indices=np.arange(400), view=0)
    assert len(np.unique(parameters.order, axis=0)) == 24
    slow, fast = (
        render_by(renderer, images, parameters, augmentation, (0.0,) * 3, (1.0,) * 3) for renderer in RENDERERS
    )
    assert (slow - fast).abs().max() <= 1e-4


@pytest.mark.parametrize("sigma", [4.0, 9.5])
def test_blur_wider_than_the_published_one_and_than_the_view(sigma: float) -> None:
    augmentation = replace(Views(size=24).augmentations()[0], blur_sigma=(sigma, sigma))
    parameters = draw_parameters(augmentation, 30, 30, seed=0, epoch=0, indices=[0, 1], view=0)
    images = [noise(30, 30), noise(30, 30, 1)]
    slow, fast = (render_by(renderer, images, parameters, augmentation, *STATISTICS) for renderer in RENDERERS)
    assert (slow - fast).abs().max() <= 1e-4


def test_batches_change_no_bit() -> None:
    augmentation = Views(size=32).augmentations()[0]
    images = torch.from_numpy(np.stack([noise(32, 32, seed) for seed in range(64)]))
    parameters = draw_parameters(augmentation, 32, 32, seed=0, epoch=0, indices=np.arange(64), view=0)
    whole = render_by(render_with_numba, images, parameters, augmentation, *STATISTICS)
    several = render_by(render_with_numba, list(images.numpy()), parameters, augmentation, *STATISTICS)
    assert torch.equal(several, whole)
    part = render_by(render_with_numba, images[20:31], parameters.rows(slice(20, 31)), augmentation, *STATISTICS)
    assert torch.equal(part, whole[20:31])


def test_many_threads_at_once_do_not_disturb_each_other() -> None:
    """Each thread has its own scratch memory, also when images of different sizes make it grow."""
    augmentations = [replace(Views().augmentations()[0], size=size) for size in (16, 96, 48)]
    images = [noise(40 + 37 * (seed % 5), 50 + 11 * (seed % 7), seed) for seed in range(60)]

    def one(number: int) -> torch.Tensor:
        augmentation = augmentations[number % 3]
        image = images[number % 60]
        parameters = draw_parameters(augmentation, *image.shape[:2], seed=0, epoch=0, indices=[number], view=0)
        return render_by(render_with_numba, [image], parameters, augmentation, *STATISTICS)

    alone = [one(number) for number in range(240)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(one, range(240)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_any_memory_layout() -> None:
    """Decoders give read-only arrays, upright turning gives strided ones."""
    augmentation = Views(size=32).augmentations()[0]
    image = noise(50, 70)
    read_only = image.copy()
    read_only.flags.writeable = False
    turned = np.rot90(np.ascontiguousarray(np.rot90(image)), -1)
    assert not turned.flags.c_contiguous
    parameters = draw_parameters(augmentation, 50, 70, seed=0, epoch=0, indices=[4], view=0)
    views = [
        render_by(render_with_numba, [pixels], parameters, augmentation, *STATISTICS)
        for pixels in (image, read_only, turned)
    ]
    assert torch.equal(views[0], views[1])
    assert torch.equal(views[0], views[2])
    spread = torch.from_numpy(np.stack([image] * 4))[::2]
    twice = render_by(render_with_numba, spread, parameters.rows([0, 0]), augmentation, *STATISTICS)
    assert torch.equal(twice[1], views[0][0])


def test_rubbish_in_scratch_memory_does_not_reach_a_view() -> None:
    """Zero times what lay in memory before would be NaN where that was infinite."""
    augmentation = Views(size=32).augmentations()[0]
    parameters = draw_parameters(augmentation, 9, 7, seed=0, epoch=0, indices=np.arange(50), view=0)
    images = [noise(9, 7, seed) for seed in range(50)]
    clean = render_by(render_with_numba, images, parameters, augmentation, *STATISTICS)
    kernel._scratch.buffer[:] = np.inf
    assert torch.equal(render_by(render_with_numba, images, parameters, augmentation, *STATISTICS), clean)


PROGRAM = """
import hashlib, numpy, torch
from caco.config import Views
from caco.data.augment import draw_parameters, render_views
images = torch.from_numpy(numpy.random.default_rng(0).integers(0, 256, (64, 40, 48, 3), dtype=numpy.uint8))
for size in (8, 24, 37):
    augmentation = Views(size=size).augmentations()[0]
    drawn = draw_parameters(augmentation, 40, 48, seed=0, epoch=0, indices=numpy.arange(64), view=0)
    views = render_views(images, drawn, augmentation, (0.5,) * 3, (0.2,) * 3)
    print(hashlib.sha256(views.contiguous().numpy().tobytes()).hexdigest())
"""


def views_of_a_new_process(cache: Path, **environment: str) -> list[str]:
    """Return a hash for each of three sizes, as a process makes the views that finds what earlier ones have compiled."""
    variables = {**os.environ, "NUMBA_CACHE_DIR": str(cache), **environment}
    command = [sys.executable, "-c", PROGRAM]
    printed = subprocess.run(command, env=variables, check=True, capture_output=True, text=True).stdout.split()
    assert len(printed) == 3
    return printed


@pytest.fixture(scope="module")
def copy_of_caco(tmp_path_factory):
    """The package in a folder of its own, with a cache of its own, and the views of the process that fills it."""
    folder = tmp_path_factory.mktemp("copy")
    copied = folder / "caco"
    shutil.copytree(Path(caco.__file__).parent, copied, ignore=shutil.ignore_patterns("__pycache__"))
    first = views_of_a_new_process(folder / "cache", PYTHONPATH=str(folder))
    assert list((folder / "cache").rglob("*.nbi"))
    return folder, first


def test_a_process_that_compiles_makes_the_views_of_one_that_need_not(copy_of_caco):
    folder, first = copy_of_caco
    assert views_of_a_new_process(folder / "cache", PYTHONPATH=str(folder)) == first


def test_an_installation_and_a_home_that_cannot_be_written_to(copy_of_caco, tmp_path):
    """As in a container: a temporary folder takes what is compiled, and goes with the process."""
    folder, first = copy_of_caco
    blocked = [folder / "caco" / part / "__pycache__" for part in (".", "data", "data/kernel")]
    for path in blocked:
        shutil.rmtree(path, ignore_errors=True)
        path.touch()  # what is to be a folder is a file: that stops root, too
    try:
        nowhere = {
            "HOME": "/dev/null",
            "XDG_CACHE_HOME": "/dev/null",
            "TMPDIR": str(tmp_path),
            "PYTHONPATH": str(folder),
        }
        assert views_of_a_new_process(Path(""), **nowhere, NUMBA_CACHE_DIR="") == first
    finally:
        for path in blocked:
            path.unlink()
    assert not list(tmp_path.glob("caco-*"))


def test_a_change_of_a_stage_reaches_the_views(copy_of_caco):
    """numba itself would load what it compiled before, as long as the file that calls the stage is the same."""
    folder, before = copy_of_caco
    blur = folder / "caco" / "data" / "kernel" / "blur.py"
    text = blur.read_text("utf-8")
    assert "math.exp(-0.5" in text
    blur.write_text(text.replace("math.exp(-0.5", "math.exp(-0.6"), "utf-8")
    try:
        after = views_of_a_new_process(folder / "cache", PYTHONPATH=str(folder))
    finally:
        blur.write_text(text, "utf-8")
    assert all(one != other for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((40, 50, 3), np.float32),
        np.zeros((40, 50), np.uint8),
        np.zeros((40, 50, 4), np.uint8),
    ],
)
def test_what_is_no_image_is_refused_and_not_read(image: NDArray[np.generic]) -> None:
    """Compiled code takes addresses, and would read whatever is there."""
    views = np.empty((2, 8, 8, 3), np.float32)
    for images in ([np.zeros((40, 50, 3), np.uint8), image], np.stack([image, image])):
        with pytest.raises(TypeError, match=r"an image must be uint8 \[H, W, 3\]"):
            kernel.fill_views(images, np.zeros((2, 16), np.float32), *STATISTICS, views)
    with pytest.raises(TypeError, match="in one piece"):
        kernel.fill_views(
            [np.zeros((40, 60, 3), np.uint8)[:, ::2]], np.zeros((1, 16), np.float32), *STATISTICS, views[:1]
        )


def test_images_of_many_sizes_in_one_call_are_those_of_a_call_each() -> None:
    augmentation = Views(size=24).augmentations()[1]
    images = [noise(20 + 7 * number, 60 - 3 * number, number) for number in range(9)]
    heights, widths = (np.array([image.shape[side] for image in images]) for side in (0, 1))
    drawn = draw_parameters(augmentation, heights, widths, seed=0, epoch=0, indices=np.arange(9), view=1)
    together = render_by(render_with_numba, images, drawn, augmentation, *STATISTICS)
    for row, image in enumerate(images):
        alone = render_by(render_with_numba, [image], drawn.rows([row]), augmentation, *STATISTICS)
        assert torch.equal(together[row], alone[0])
