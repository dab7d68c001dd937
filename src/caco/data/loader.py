"""From a source to batches of views on the device, ahead of the training step.

Which images are in a step, and how their views look, is a pure function of (seed, epoch, step): nothing of it has to
be saved for a resume, and it is the same for any number of threads or processes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from caco.config import ViewRecipe
from caco.data.augment import draw_parameters, render_views
from caco.data.broken import BrokenImages
from caco.data.compiled import CompiledViews
from caco.data.load import load_decoded, load_or_next
from caco.data.parameters import ViewParameters, largest_shrink
from caco.data.prefetch import Batch, prefetch, side_stream
from caco.data.render import copy_to
from caco.data.resident import decode_all
from caco.data.source import ImageSource
from caco.errors import UsageError

DECODED_CHUNK, RESIDENT_CHUNK = 16, 64
"""Images of which one thread makes all views at a time: of those that it decodes, and of those that are held decoded."""


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order in which an epoch visits its images: int64 [count], a permutation keyed by (seed, epoch)."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def check_batch_size(source: ImageSource, batch_size: int, world_size: int) -> None:
    """Raise UsageError when a batch is more than all images, or cannot be divided among the processes."""
    if batch_size % world_size:
        raise UsageError(f"--batch-size {batch_size} cannot be divided among {world_size} processes")
    if len(source) >= batch_size:
        return
    found = f"--data {source.name} has {len(source):,} image{'s' if len(source) > 1 else ''}"
    largest = len(source) // world_size * world_size
    if largest < 2:
        raise UsageError(f"{found}, too few to train on: a batch needs at least {max(world_size, 2)}")
    raise UsageError(f"{found}, fewer than one batch; use --batch-size {largest} or less")


class TrainingViews:
    """Batches of random views of a source's images."""

    def __init__(
        self,
        source: ImageSource,
        recipes: Sequence[ViewRecipe],
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        *,
        batch_size: int,
        seed: int,
        workers: int,
        device: torch.device,
        broken: BrokenImages,
        rank: int = 0,
        world_size: int = 1,
        local_size: int = 1,
        layout: torch.memory_format = torch.channels_last,
    ) -> None:
        """batch_size: over all processes; this one makes the rank-th of world_size equal parts. local_size: processes that
        share this machine's main memory. layout: of the views.

        Raises UsageError.
        """
        check_batch_size(source, batch_size, world_size)
        self.source, self.recipes, self.mean, self.std = source, tuple(recipes), mean, std
        self.batch_size, self.seed, self.device, self.broken = batch_size, seed, device, broken
        self.rank, self.world_size, self.layout = rank, world_size, layout
        self.steps_per_epoch = len(source) // batch_size
        self._workers, self._stream = workers, side_stream(device)
        self._resident = decode_all(source, broken, workers, device, local_size)
        self._on_device: list[CompiledViews] = []
        if self._resident is not None and device.type != "cpu":
            self._resident = self._resident.to(device)
            self._on_device = [
                CompiledViews(recipe, mean, std, compiled=device.type == "cuda") for recipe in self.recipes
            ]
            # Here and not in the thread that makes batches, because torch compiles in one thread at a time.
            self._from_device(self._resident, np.arange(batch_size // world_size), epoch=0)

    def batches(self, epoch: int, first_step: int = 0, last_step: int | None = None) -> Generator[Batch, None, None]:
        """Yield the batches of steps first_step … last_step − 1, counted from the start of an epoch.

        None: to its end. Later steps belong to the epochs that follow. Two batches are prepared ahead in the background,
        those of the next epoch, too, so that none has to be waited for when it begins.
        """
        steps = range(first_step, self.steps_per_epoch if last_step is None else last_step)
        with ThreadPoolExecutor(self._workers, thread_name_prefix="views") as pool:
            batches = (self._batch(pool, part, of) for of, part in self._parts(epoch, steps))
            yield from prefetch(batches, self.device, self._stream)

    def _parts(self, epoch: int, steps: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield for each step its epoch and this process's images; steps are counted from the start of `epoch`."""
        ordered, order = -1, np.empty(0, dtype=np.int64)
        for step in steps:
            of = epoch + step // self.steps_per_epoch
            if of != ordered:
                ordered, order = of, epoch_order(len(self.source), self.seed, of)
            yield of, self._part(order, step % self.steps_per_epoch)

    def _part(self, order: np.ndarray, step: int) -> np.ndarray:
        """Return this process's images of a step."""
        share = self.batch_size // self.world_size
        first = step * self.batch_size + self.rank * share
        return order[first : first + share]

    def _batch(self, pool: ThreadPoolExecutor, indices: np.ndarray, epoch: int) -> Batch:
        if self._resident is None:
            views = self._in_threads(pool, len(indices), DECODED_CHUNK, partial(self._decode, indices, epoch))
        elif self._resident.device.type == "cpu":
            drawn = self._draw(indices, self._resident.shape[1], self._resident.shape[2], epoch)
            work = partial(self._take, self._resident.numpy(), indices, drawn)
            views = self._in_threads(pool, len(indices), RESIDENT_CHUNK, work)
        else:
            views = self._from_device(self._resident, indices, epoch)
        return Batch(indices, [view.contiguous(memory_format=self.layout) for view in views])

    def _from_device(self, resident: Tensor, indices: np.ndarray, epoch: int) -> list[Tensor]:
        """Return views made on the device that holds the images."""
        images = resident.index_select(0, copy_to(self.device, torch.from_numpy(indices)))
        drawn = self._draw(indices, resident.shape[1], resident.shape[2], epoch)
        return [view(images, parameters) for view, parameters in zip(self._on_device, drawn, strict=True)]

    def _in_threads(
        self, pool: ThreadPoolExecutor, count: int, chunk: int, work: Callable[[slice, list[Tensor]], None]
    ) -> list[Tensor]:
        """Return views that `work` fills on the CPU, some rows at a time, and that are copied to the device."""
        pinned = self.device.type == "cuda"  # only from such memory is a copy that nobody waits for
        shapes = [(count, 3, recipe.size, recipe.size) for recipe in self.recipes]
        views = [torch.empty(shape, memory_format=torch.channels_last, pin_memory=pinned) for shape in shapes]

        def fill(first: int) -> None:
            rows = slice(first, min(first + chunk, count))
            work(rows, [view[rows] for view in views])

        list(pool.map(fill, range(0, count, chunk)))
        return [view.to(self.device, non_blocking=True) for view in views]

    def _decode(self, indices: np.ndarray, epoch: int, rows: slice, views: list[Tensor]) -> None:
        """Decode some images and fill their rows of the views."""
        loaded = []
        for index in indices[rows].tolist():
            shrink = partial(largest_shrink, self.recipes, seed=self.seed, epoch=epoch, index=index)
            load = partial(load_decoded, self.source, shrink=shrink)
            loaded.append(load_or_next(self.source, index, self.broken, load))
        pixels, heights, widths, factors = zip(*loaded, strict=True)
        drawn = self._draw(indices[rows], np.array(heights), np.array(widths), epoch)
        self._render(list(pixels), [parameters.shrunk(np.array(factors)) for parameters in drawn], views)

    def _take(
        self, images: np.ndarray, indices: np.ndarray, drawn: list[ViewParameters], rows: slice, views: list[Tensor]
    ) -> None:
        """Fill some rows of the views from images that are held decoded."""
        pixels = torch.from_numpy(images[indices[rows]])
        self._render(pixels, [parameters.rows(rows) for parameters in drawn], views)

    def _draw(
        self, indices: np.ndarray, heights: np.ndarray | int, widths: np.ndarray | int, epoch: int
    ) -> list[ViewParameters]:
        """Return each view's parameters for these images of these stored sizes."""
        key = {"seed": self.seed, "epoch": epoch}
        return [
            draw_parameters(recipe, heights, widths, indices=indices, view=view, **key)
            for view, recipe in enumerate(self.recipes)
        ]

    def _render(self, images: Tensor | list[np.ndarray], drawn: list[ViewParameters], views: list[Tensor]) -> None:
        for recipe, parameters, view in zip(self.recipes, drawn, views, strict=True):
            render_views(images, parameters, recipe, self.mean, self.std, out=view)
