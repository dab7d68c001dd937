"""From a source to batches of views on the device, ahead of the training step.

Which images are in a step, and how their views look, is a pure function of (seed, epoch, step): nothing of it has to
be saved for a resume, and it is the same for any number of threads or processes.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from caco.config import ViewRecipe
from caco.data.augment import draw_parameters, render_views
from caco.data.broken import BrokenImages
from caco.data.decode import BrokenImage
from caco.data.source import ImageSource
from caco.errors import CacoError, UsageError

CHUNK = 16
"""Images that one thread decodes and augments at a time."""

RESIDENT_SHARE = 0.25
"""Share of the free memory that a set of equal-sized images may take to be held decoded."""


class Batch(NamedTuple):
    """One step's input."""

    indices: np.ndarray
    """int64 [B]: which images of the source."""
    views: list[Tensor]
    """One float32 [B, 3, S, S] for each view, normalised, on the device."""


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order in which an epoch visits its images: int64 [count], a permutation keyed by (seed, epoch)."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def check_batch_size(source: ImageSource, batch_size: int, world_size: int) -> None:
    """Raise UsageError when a batch is more than all images, or cannot be divided among the processes."""
    if batch_size % world_size:
        raise UsageError(f"--batch-size {batch_size} cannot be divided among {world_size} processes")
    if len(source) < batch_size:
        raise UsageError(
            f"--data {source.name} has {len(source):,} images, fewer than one batch; use --batch-size {len(source)} or less"
        )


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
        layout: torch.memory_format = torch.channels_last,
    ) -> None:
        """batch_size: over all processes; this one makes the rank-th of world_size equal parts. Raises UsageError."""
        check_batch_size(source, batch_size, world_size)
        self.source, self.recipes, self.mean, self.std = source, tuple(recipes), mean, std
        self.batch_size, self.seed, self.device, self.broken = batch_size, seed, device, broken
        self.rank, self.world_size, self.layout = rank, world_size, layout
        self.steps_per_epoch = len(source) // batch_size
        self._workers = workers
        self._resident = _decode_all(source, broken, workers)
        if self._resident is not None and device.type != "cpu":
            self._resident = self._resident.to(device)

    def batches(self, epoch: int, first_step: int = 0, last_step: int | None = None) -> Iterator[Batch]:
        """Yield an epoch's batches first_step … last_step − 1 (None: all); two are prepared ahead in the background."""
        order = epoch_order(len(self.source), self.seed, epoch)
        steps = range(first_step, self.steps_per_epoch if last_step is None else last_step)
        if self._resident is not None and self.device.type != "cpu":
            for step in steps:
                indices = self._part(order, step)
                rendered = self._render(self._resident[indices], indices, epoch)
                yield Batch(indices, [view.contiguous(memory_format=self.layout) for view in rendered])
            return
        with ThreadPoolExecutor(self._workers, thread_name_prefix="views") as pool:
            yield from _ahead(self._batch(pool, self._part(order, step), epoch) for step in steps)

    def _part(self, order: np.ndarray, step: int) -> np.ndarray:
        """Return this process's images of a step."""
        share = self.batch_size // self.world_size
        first = step * self.batch_size + self.rank * share
        return order[first : first + share]

    def _batch(self, pool: ThreadPoolExecutor, indices: np.ndarray, epoch: int) -> Batch:
        shapes = [(len(indices), 3, recipe.size, recipe.size) for recipe in self.recipes]
        views = [torch.empty(shape, memory_format=self.layout) for shape in shapes]

        def fill(first: int) -> None:
            part = indices[first : first + CHUNK]
            images = self._load(part)
            for view, rendered in zip(views, self._render(images, part, epoch), strict=True):
                view[first : first + CHUNK] = rendered

        list(pool.map(fill, range(0, len(indices), CHUNK)))
        return Batch(indices, [view.to(self.device, non_blocking=True) for view in views])

    def _load(self, indices: np.ndarray) -> Tensor | list[np.ndarray]:
        if self._resident is not None:
            return self._resident[indices]
        return [load_or_next(self.source, int(index), self.broken) for index in indices]

    def _render(self, images: Tensor | list[np.ndarray], indices: np.ndarray, epoch: int) -> list[Tensor]:
        heights = np.array([image.shape[0] for image in images])
        widths = np.array([image.shape[1] for image in images])
        rendered = []
        for number, recipe in enumerate(self.recipes):
            parameters = draw_parameters(
                recipe, heights, widths, seed=self.seed, epoch=epoch, indices=indices, view=number
            )
            rendered.append(render_views(images, parameters, recipe, self.mean, self.std))
        return rendered


def load_or_next(source: ImageSource, index: int, broken: BrokenImages) -> np.ndarray:
    """Return an image, or in place of a broken one the next good one: the same choice in every run.

    Raises CacoError when too many are broken (`BrokenImages.add`) or none is left.
    """
    for offset in range(len(source)):
        try:
            return source.load((index + offset) % len(source))
        except BrokenImage as error:
            broken.add(error.key, error.reason)
    raise CacoError(f"{source.name} has no image that can be read")


def free_memory() -> int:
    """Return the bytes of memory that are free or easily freed (Linux), else half of all there is."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _decode_all(source: ImageSource, broken: BrokenImages, workers: int) -> Tensor | None:
    """Return all images as one uint8 tensor [N, H, W, 3] if they are of one size and fit in memory, else None."""
    probes = np.unique(np.linspace(0, len(source) - 1, 32).astype(int))
    shapes = {load_or_next(source, int(index), broken).shape for index in probes}
    shape = shapes.pop()
    if shapes or len(source) * int(np.prod(shape)) > RESIDENT_SHARE * free_memory():
        return None
    images = np.empty((len(source), *shape), dtype=np.uint8)

    def fill(first: int) -> bool:
        for index in range(first, min(first + 256, len(source))):
            image = load_or_next(source, index, broken)
            if image.shape != shape:
                return False
            images[index] = image
        return True

    with ThreadPoolExecutor(workers) as pool:
        for same in pool.map(fill, range(0, len(source), 256)):
            if not same:
                pool.shutdown(cancel_futures=True)
                return None
    return torch.from_numpy(images)


def _ahead(batches: Iterator[Batch], depth: int = 2) -> Iterator[Batch]:
    """Yield what `batches` yields, computed in a background thread up to `depth` ahead; errors come through."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for batch in batches:
                put(batch)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:  # handed to the consumer, which raises it
            put(error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
