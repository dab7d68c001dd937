"""Features of a whole source: every good image exactly once, in the source's order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from caco.data.augment import centre_view, normalise
from caco.data.decode import BrokenImage
from caco.data.render import copy_to
from caco.data.source import ImageSource
from caco.distributed.world import World
from caco.errors import CacoError
from caco.precision import PRECISIONS, autocast

View = TypeVar("View")

BATCHES_ON_DEVICE = 32  # features are fetched from the device this many batches at a time

PIXELS_A_THREAD, IMAGES_A_THREAD = 4 * 224**2, 16
"""On a CPU so much, at most, goes through a backbone at a time: then a layer finds its input still in the cache.
Speed: `python benchmarks/evaluate.py --parts extract`."""


@dataclass(frozen=True, eq=False)
class Features:
    """What an encoder makes of a source's images; all on the CPU, one row for each good image."""

    vectors: Float[Tensor, "N F"]
    """float32"""
    labels: Int[Tensor, " N"] | None
    """int64; None for a source without labels."""
    keys: list[str]
    broken: list[tuple[str, str]] = field(default_factory=list)
    """Key and reason of each image that could not be read."""


def extract(
    backbone: nn.Module,
    source: ImageSource,
    *,
    size: int,
    resize: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    workers: int,
    indices: Sequence[int] | np.ndarray | None = None,
    batch_size: int = 256,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Features:
    """Return the backbone's features of a source's images (or of `indices`), seen through the validation transform.

    The shorter side is resized to `resize` pixels and the centre `size` × `size` taken. The backbone is moved to
    `device`, runs in evaluation mode and is left in the mode and the memory format it was in (channels_last is fastest on
    most machines): a run that is checked trains on as if it had not been. Broken images are skipped and listed. Images are
    decoded by `workers` threads while the device computes. Raises CacoError when no image can be read, when the backbone
    returns anything but [B, F], and when features are not finite.
    """
    device = torch.device(device)
    backbone.to(device)
    chosen = range(len(source)) if indices is None else [int(index) for index in indices]

    def view(index: int) -> np.ndarray:
        return centre_view(source.load(index), resize, size)

    taken: list[int] = []
    broken: list[tuple[str, str]] = []
    finished: list[Tensor] = []
    waiting: list[Tensor] = []
    with evaluation_mode(backbone):
        for places, views in in_batches(ahead(view, chosen, broken, 2 * batch_size + workers, workers), batch_size):
            taken += places
            images = copy_to(device, torch.from_numpy(np.stack(views)))
            waiting.append(backbone_features(backbone, normalise(images, mean, std), precision))
            if len(waiting) == BATCHES_ON_DEVICE:
                finished.append(torch.cat(waiting).cpu())
                waiting.clear()
    if waiting:
        finished.append(torch.cat(waiting).cpu())
    return _collect(source, taken, broken, finished)


def labels_of(features: Features) -> Int[Tensor, " N"]:
    """Return the labels of features that must have some. Raises CacoError when their source has none."""
    if features.labels is None:
        raise CacoError("these images have no labels (class folders, or a label column); judging needs them")
    return features.labels


def gather_features(
    make: Callable[[np.ndarray], Features], count: int, world: World, indices: np.ndarray | None = None
) -> Features:
    """Return make(indices) (None: of all `count` images), the work shared among all processes of `world`.

    Each process makes a contiguous part, so that every image counts once and the order is the source's, whatever their
    number. All processes get the whole.
    """
    chosen = np.arange(count) if indices is None else indices
    if world.size == 1 or len(chosen) < world.size:
        return make(chosen)
    own = make(world.part(chosen))
    keys, broken = zip(*world.gather_objects((own.keys, own.broken)), strict=True)
    labels = None if own.labels is None else world.gather_parts(own.labels)
    return Features(world.gather_parts(own.vectors), labels, sum(keys, []), sum(broken, []))


def pixel_features(
    source: ImageSource, *, size: int, resize: int, workers: int, indices: Sequence[int] | np.ndarray | None = None
) -> Features:
    """Return raw pixels as features, float32 [N, size · size · 3] in 0-1: what no encoder at all would give.

    The same images and the same validation transform as `extract`.
    """
    chosen = range(len(source)) if indices is None else [int(index) for index in indices]

    def view(index: int) -> np.ndarray:
        return centre_view(source.load(index), resize, size).ravel()

    taken: list[int] = []
    broken: list[tuple[str, str]] = []
    finished: list[Tensor] = []
    for places, views in in_batches(ahead(view, chosen, broken, 512 + workers, workers), 256):
        taken += places
        finished.append(torch.from_numpy(np.stack(views)).float() / 255)
    return _collect(source, taken, broken, finished)


def ahead(
    view: Callable[[int], View], indices: Iterable[int], broken: list[tuple[str, str]], depth: int, workers: int
) -> Iterator[tuple[int, View]]:
    """Yield (index, view(index)) in the order of `indices`; up to `depth` views are made ahead by `workers` threads.

    A BrokenImage is skipped and its (key, reason) appended to `broken`.
    """
    pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="decode")
    futures: deque[tuple[int, Future[View]]] = deque()
    try:
        remaining = iter(indices)
        while True:
            while len(futures) < depth and (index := next(remaining, None)) is not None:
                futures.append((index, pool.submit(view, index)))
            if not futures:
                return
            index, future = futures.popleft()
            try:
                yield index, future.result()
            except BrokenImage as error:
                broken.append((error.key, error.reason))
    finally:
        pool.shutdown(cancel_futures=True)


def in_batches(views: Iterable[tuple[int, View]], batch_size: int) -> Iterator[tuple[list[int], list[View]]]:
    """Group (index, view) into full batches; the last may be smaller."""
    places: list[int] = []
    batch: list[View] = []
    for index, view in views:
        places.append(index)
        batch.append(view)
        if len(batch) == batch_size:
            yield places, batch
            places, batch = [], []
    if batch:
        yield places, batch


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode and afterwards every part of it back into its own."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@torch.no_grad()
def backbone_features(
    backbone: nn.Module, images: Float[Tensor, "B 3 S S"], precision: Literal["fp32", "bf16"]
) -> Float[Tensor, "B F"]:
    """Return the backbone's float32 features of one batch, without gradient. Raises CacoError on another shape."""
    with autocast(images.device, PRECISIONS[precision]):
        outputs = [backbone(part) for part in images.split(_at_a_time(images))]
    for output in outputs:
        if not isinstance(output, Tensor) or output.ndim != 2:
            shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise CacoError(f"a backbone must return one vector for each image, [images, features], not {shape}")
    features = torch.cat(outputs)
    if len(features) != len(images):
        raise CacoError(f"a backbone must return one vector for each image, not {len(features)} for {len(images)}")
    return features.float()


def _at_a_time(images: Float[Tensor, "B 3 S S"]) -> int:
    """Return how many images go through the backbone at a time: all of them on a GPU."""
    if images.device.type != "cpu":
        return len(images)
    share = PIXELS_A_THREAD // images[0, 0].numel()
    return torch.get_num_threads() * min(max(share, 1), IMAGES_A_THREAD)


def _collect(source: ImageSource, taken: list[int], broken: list[tuple[str, str]], finished: list[Tensor]) -> Features:
    if not taken:
        why = f"; the first, {broken[0][0]}: {broken[0][1]}" if broken else ""
        raise CacoError(f"none of the {len(broken):,} images of {source.name} can be read{why}")
    vectors = torch.cat(finished)
    if not torch.isfinite(vectors).all():
        raise CacoError(f"the encoder gives features that are not finite for images of {source.name}")
    labels = None if source.labels is None else torch.from_numpy(np.asarray(source.labels, np.int64)[taken])
    return Features(vectors, labels, [source.key(index) for index in taken], broken)
