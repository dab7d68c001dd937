"""Features of a whole source: every good image exactly once, in the source's order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from caco.backbone import evaluation_mode
from caco.data.augment import normalise
from caco.data.render import copy_to
from caco.distributed.world import World
from caco.errors import CacoError
from caco.evaluate.centre_views import CentreViews
from caco.precision import autocast
from caco.winograd.network import uses_winograd

BATCHES_ON_DEVICE = 32  # features are fetched from the device this many batches at a time

PIXELS_A_THREAD, IMAGES_A_THREAD = 4 * 224**2, 16
"""On a CPU so much, at most, goes through a backbone at a time: then a layer finds its input still in the cache.
Speed: `python benchmarks/evaluate.py --parts extract`."""
MANY_PIXELS = 64 * 224**2
"""Pixels that go through one with Winograd's convolutions, if that is more: their filters are made anew each time, and they take
an image through by tiles themselves."""


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


class NoneReadable(CacoError):
    """None of the images of a source, or of a part of it, can be read."""

    def __init__(self, name: str, broken: list[tuple[str, str]]) -> None:
        """name: of the source. broken: key and reason of each image."""
        why = f"; the first, {broken[0][0]}: {broken[0][1]}" if broken else ""
        super().__init__(f"none of the {len(broken):,} images of {name} can be read{why}")
        self.name, self.broken = name, broken


def extract(
    backbone: nn.Module, views: CentreViews, *, device: torch.device | str, precision: torch.dtype = torch.float32
) -> Features:
    """Return the backbone's features of images, seen through the validation transform.

    The backbone is moved to `device`, runs in evaluation mode and is left in the mode and the memory format it was in
    (channels_last is fastest on most machines): a run that is checked trains on as if it had not been. Broken images are
    skipped and listed. Images are decoded by threads while the device computes. Raises CacoError when no image can be read,
    when the backbone returns anything but [B, F], and when features are not finite.
    """
    device, how = torch.device(device), views.preparation
    backbone.to(device)

    def encode(batch: UInt8[Tensor, "B S S 3"]) -> Float[Tensor, "B F"]:
        return backbone_features(backbone, normalise(copy_to(device, batch), how.mean, how.std), precision)

    with evaluation_mode(backbone):
        return _collect_features(views, encode, BATCHES_ON_DEVICE)


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
    number. All processes get the whole. A part may be without a good image while another has one: raises NoneReadable
    in all processes when none has.
    """
    chosen = np.arange(count) if indices is None else indices
    if world.size == 1 or len(chosen) < world.size:
        return make(chosen)
    try:
        own = make(world.part(chosen))
        parts = own.keys, own.broken, own.vectors.shape[1], own.labels is not None
    except NoneReadable as error:
        name, parts = error.name, ([], error.broken, 0, False)
    keys, broken, widths, labelled = zip(*world.gather_objects(parts), strict=True)
    if not max(widths):
        raise NoneReadable(name, sum(broken, []))
    if not parts[2]:
        own = Features(torch.empty(0, max(widths)), torch.empty(0, dtype=torch.int64) if any(labelled) else None, [])
    labels = None if own.labels is None else world.gather_parts(own.labels)
    return Features(world.gather_parts(own.vectors), labels, sum(keys, []), sum(broken, []))


def pixel_features(views: CentreViews) -> Features:
    """Return pixels as features, float32 [N, 3 · size · size]: what no encoder at all would give.

    The same images and the same centre views as `extract`, normalised as for an encoder: without the mean, a cosine
    compares above all how bright pictures are, and the baseline would be too easily beaten (docs/results.md).
    """

    def flatten(batch: UInt8[Tensor, "B S S 3"]) -> Float[Tensor, "B F"]:
        return normalise(batch, views.preparation.mean, views.preparation.std).flatten(1)

    return _collect_features(views, flatten, fetched_together=1)


def _collect_features(views: CentreViews, encode: Callable[[Tensor], Tensor], fetched_together: int) -> Features:
    """Return what `encode` makes of each batch of centre views, uint8 [B, S, S, 3].

    fetched_together: of so many batches the vectors stay on their device until they are fetched in one go.
    """
    source = views.source
    taken: list[int] = []
    finished: list[Tensor] = []
    waiting: list[Tensor] = []
    for read, batch in views:
        taken += read
        waiting.append(encode(batch))
        if len(waiting) == fetched_together:
            finished.append(torch.cat(waiting).cpu())
            waiting.clear()
    if waiting:
        finished.append(torch.cat(waiting).cpu())
    if not taken:
        raise NoneReadable(source.name, views.broken)
    vectors = joined(finished)
    if not torch.isfinite(vectors).all():
        raise CacoError(f"the encoder gives features that are not finite for images of {source.name}")
    labels = None if source.labels is None else torch.from_numpy(np.asarray(source.labels, np.int64)[taken])
    return Features(vectors, labels, [source.key(index) for index in taken], views.broken)


@torch.no_grad()
def backbone_features(
    backbone: nn.Module, images: Float[Tensor, "B 3 S S"], precision: torch.dtype
) -> Float[Tensor, "B F"]:
    """Return the backbone's float32 features of one batch, without gradient. Raises CacoError on another shape."""
    with autocast(images.device, precision):
        outputs = [backbone(part) for part in images.split(_at_a_time(backbone, images))]
    for output in outputs:
        if not isinstance(output, Tensor) or output.ndim != 2:
            shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise CacoError(f"a backbone must return one vector for each image, [images, features], not {shape}")
    features = torch.cat(outputs)
    if len(features) != len(images):
        raise CacoError(f"a backbone must return one vector for each image, not {len(features)} for {len(images)}")
    return features.float()


def _at_a_time(backbone: nn.Module, images: Float[Tensor, "B 3 S S"]) -> int:
    """Return how many images go through the backbone at a time: all of them on a GPU."""
    if images.device.type != "cpu":
        return len(images)
    pixels = images[0, 0].numel()
    few = torch.get_num_threads() * min(max(PIXELS_A_THREAD // pixels, 1), IMAGES_A_THREAD)
    return max(few, MANY_PIXELS // pixels) if uses_winograd(backbone) else few


def joined(parts: list[Tensor]) -> Tensor:
    """Return the rows of all parts as one tensor. Empties the list, so that hardly more than the result is ever held."""
    whole = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    parts.reverse()
    row = 0
    while parts:
        part = parts.pop()
        whole[row : row + len(part)] = part
        row += len(part)
    return whole
