"""From the images of a step to their views: three makers, which differ in where the images are and who renders.

How a view looks follows from (seed, epoch, image) alone (`RandomViews`), whoever makes it. Only a GPU that decodes JPEG files
itself (`file_maker.py`) has slightly other pixels to make it of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from caco.data.augment import Images, draw_parameters, render_views
from caco.data.broken import BrokenImages
from caco.data.compiled import DeviceViews
from caco.data.decode import Decoded
from caco.data.load import load_decoded, load_or_next
from caco.data.parameters import ViewParameters, largest_shrink
from caco.data.render import copy_to
from caco.data.source import ImageSource
from caco.views import Augmentation

DECODED_CHUNK, HELD_CHUNK = 16, 64
"""Images of which one thread makes all views (or reads) at a time: of those that it decodes, and of those held decoded."""


ViewMaker = Callable[[np.ndarray, int, ThreadPoolExecutor], list[Tensor]]
"""From indices, int64 [B], an epoch, and threads for what is done on the CPU, to the views of these images.

One float32 [B, 3, S, S] for each view, on the device.
"""


@dataclass(frozen=True)
class RandomViews:
    """How the views of a run look."""

    augmentations: tuple[Augmentation, ...]
    """One for each view."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    seed: int

    def draw(
        self, indices: np.ndarray, heights: np.ndarray | int, widths: np.ndarray | int, epoch: int
    ) -> list[ViewParameters]:
        """Return each view's parameters for these images of these stored sizes."""
        return [
            draw_parameters(augmentation, heights, widths, seed=self.seed, epoch=epoch, indices=indices, view=view)
            for view, augmentation in enumerate(self.augmentations)
        ]

    def shrink(self, height: int, width: int, *, index: int, epoch: int) -> int:
        """Return by how much an image of this stored size may be decoded smaller for its views: 1, 2, 4 or 8."""
        return largest_shrink(self.augmentations, height, width, seed=self.seed, epoch=epoch, index=index)

    def render(self, images: Images, drawn: list[ViewParameters], out: list[Tensor]) -> None:
        """Fill `out`, one float32 [B, 3, S, S] for each view, with the views of images on the CPU."""
        for augmentation, parameters, views in zip(self.augmentations, drawn, out, strict=True):
            render_views(images, parameters, augmentation, self.mean, self.std, out=views)


class FromSource:
    """Decodes the images in every step, no larger than their views need, and renders them on the CPU."""

    def __init__(self, source: ImageSource, views: RandomViews, broken: BrokenImages, device: torch.device) -> None:
        """device: to which the views are copied."""
        self.source, self.views, self.broken, self.device = source, views, broken, device

    def __call__(self, indices: np.ndarray, epoch: int, pool: ThreadPoolExecutor) -> list[Tensor]:
        """Return the views; in place of a broken image the next good one's."""

        def fill(rows: slice, out: list[Tensor]) -> None:
            decoded = [self._decode(index, epoch) for index in indices[rows].tolist()]
            pixels, heights, widths, factors = zip(*decoded, strict=True)
            drawn = self.views.draw(indices[rows], np.array(heights), np.array(widths), epoch)
            self.views.render(list(pixels), [parameters.shrunk(np.array(factors)) for parameters in drawn], out)

        return _fill_in_threads(pool, len(indices), DECODED_CHUNK, self.views.augmentations, self.device, fill)

    def _decode(self, index: int, epoch: int) -> Decoded:
        shrink = partial(self.views.shrink, index=index, epoch=epoch)
        return load_or_next(self.source, index, self.broken, partial(load_decoded, self.source, shrink=shrink))


class FromMemory:
    """Takes images that main memory holds decoded, and renders them on the CPU."""

    def __init__(self, images: UInt8[Tensor, "N H W 3"], views: RandomViews) -> None:
        self.images, self.views = images, views

    def __call__(self, indices: np.ndarray, epoch: int, pool: ThreadPoolExecutor) -> list[Tensor]:
        """Return the views, on the CPU."""
        _, height, width, _ = self.images.shape
        drawn = self.views.draw(indices, height, width, epoch)

        def fill(rows: slice, out: list[Tensor]) -> None:
            pixels = torch.from_numpy(self.images.numpy()[indices[rows]])
            self.views.render(pixels, [parameters.rows(rows) for parameters in drawn], out)

        return _fill_in_threads(pool, len(indices), HELD_CHUNK, self.views.augmentations, self.images.device, fill)


class FromDevice:
    """Takes images that the device holds decoded, and renders them there."""

    def __init__(self, images: UInt8[Tensor, "N H W 3"], views: RandomViews) -> None:
        self.images, self.views = images, views
        compiled = images.device.type == "cuda"
        self.renders = [
            DeviceViews(augmentation, views.mean, views.std, compiled=compiled) for augmentation in views.augmentations
        ]

    def __call__(self, indices: np.ndarray, epoch: int, pool: ThreadPoolExecutor) -> list[Tensor]:
        """Return the views; the pool is left alone."""
        return self.make(indices, epoch)

    def make(self, indices: np.ndarray, epoch: int) -> list[Tensor]:
        """Return the views, without waiting for the device."""
        _, height, width, _ = self.images.shape
        images = self.images.index_select(0, copy_to(self.images.device, torch.from_numpy(indices)))
        drawn = self.views.draw(indices, height, width, epoch)
        return [render(images, parameters) for render, parameters in zip(self.renders, drawn, strict=True)]


def _fill_in_threads(
    pool: ThreadPoolExecutor,
    count: int,
    chunk: int,
    augmentations: Sequence[Augmentation],
    device: torch.device,
    fill: Callable[[slice, list[Tensor]], None],
) -> list[Tensor]:
    """Return `count` rows of each view, which `fill` writes on the CPU, some rows a call, and which are copied to the device."""
    pinned = device.type == "cuda"  # only from such memory is a copy that nobody waits for
    shapes = [(count, 3, augmentation.size, augmentation.size) for augmentation in augmentations]
    views = [torch.empty(shape, memory_format=torch.channels_last, pin_memory=pinned) for shape in shapes]

    def fill_from(first: int) -> None:
        rows = slice(first, min(first + chunk, count))
        fill(rows, [view[rows] for view in views])

    list(pool.map(fill_from, range(0, count, chunk)))
    return [view.to(device, non_blocking=True) for view in views]
