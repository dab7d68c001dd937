"""The published linear evaluation: random crops, a layer-wise learning rate, features computed anew in every epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from caco.backbone import evaluation_mode
from caco.data.augment import draw_parameters, render_views
from caco.data.decode import BrokenImage
from caco.data.order import epoch_order
from caco.data.render import copy_to
from caco.data.source import ImageSource
from caco.data.threads import map_in_order
from caco.errors import CacoError, UsageError
from caco.evaluate.encoder import UsableEncoder
from caco.evaluate.features import backbone_features, labels_of
from caco.evaluate.linear import INITIAL_STD, LinearResult, check_labels, judge_head
from caco.optim import LayerWiseSGD, set_lr
from caco.views import Augmentation

FORWARD_BATCH = 256  # images that go through the backbone at a time in each process, whatever the head's batch size


@dataclass(frozen=True, eq=False)
class ReferenceResult:
    """The head that the published protocol has trained, and which images it could not see."""

    head: LinearResult
    val_broken: list[tuple[str, str]]
    """Key and reason of each validation image that could not be read, in the source's order."""
    train_broken: list[tuple[str, str]]


@dataclass(frozen=True)
class ProbeSettings:
    """How the published head is trained."""

    epochs: int = 100
    batch_size: int = 4096
    """Images a step, over all processes; more than there are: all."""
    learning_rate: float = 0.025
    """For 256 images a step; it grows with the batch, and falls by a cosine to 0 over the epochs."""
    momentum: float = 0.9
    weight_decay: float = 0.0
    seed: int = 0
    """Of the initial head, the order of the images and their crops."""


def train_reference_probe(
    encoder: UsableEncoder,
    train: ImageSource,
    val: ImageSource,
    settings: ProbeSettings,
    on_epoch: Callable[[int, float], None] | None = None,
) -> ReferenceResult:
    """Train the published linear head on a frozen backbone in evaluation mode and judge it on the validation set.

    Train views: a random crop of 8-100 % of the area, resized to the encoder's size, flipped half of the time.
    on_epoch(epoch, mean loss) is called after each epoch, counted from 0. The result's head is that of the last epoch.
    The processes of the encoder's world share the features' work; each trains the same head on all of them, and has the
    result. Raises UsageError without a backbone or with settings that cannot be; CacoError without labels, on labels out of
    range, when no image can be read, or when the head diverges.
    """
    if encoder.backbone is None:
        raise UsageError("the reference protocol judges encoders, not pixels; use --protocol cached")
    train_labels, val_labels = _labels(train), _labels(val)
    classes = check_labels(train_labels, val_labels, len(train.classes) or None)
    settings = _checked(settings, len(train))
    device = encoder.world.device
    backbone = encoder.backbone.to(device)
    head = _new_head(_width(backbone), classes, settings.seed, device)
    crops = _CroppedFeatures(backbone, encoder, train, train_labels, settings.seed)
    _fit(head, crops, settings, on_epoch)
    return ReferenceResult(*_judged(head, encoder, val, settings), train_broken=crops.broken_of_all())


def _checked(settings: ProbeSettings, images: int) -> ProbeSettings:
    """Return the settings for a training set of so many images, none of which a batch exceeds. Raises UsageError."""
    if settings.epochs < 1 or settings.batch_size < 1:
        raise UsageError("the linear probe needs at least one epoch and a batch size of at least 1")
    return replace(settings, batch_size=min(settings.batch_size, images))


def _fit(
    head: nn.Linear, crops: _CroppedFeatures, settings: ProbeSettings, on_epoch: Callable[[int, float], None] | None
) -> None:
    """Train the head in place. Raises CacoError when no image can be read, or when it diverges."""
    optimizer = LayerWiseSGD(head.parameters(), 0.0, settings.momentum, settings.weight_decay)
    highest = settings.learning_rate * settings.batch_size / 256
    for epoch in range(settings.epochs):
        set_lr(optimizer, highest * 0.5 * (1 + math.cos(math.pi * epoch / settings.epochs)))
        loss = _train_epoch(head, optimizer, crops.batches(epoch, settings.batch_size))
        if loss is None:
            raise CacoError(f"none of the {len(crops.source):,} images of {crops.source.name} can be read")
        if not all(torch.isfinite(tensor).all() for tensor in (loss, *head.parameters())):
            rate = f"--lr {settings.learning_rate:g}"
            raise CacoError(f"the linear probe diverged in epoch {epoch + 1} at {rate}; try a lower one")
        if on_epoch is not None:
            on_epoch(epoch, loss.item())


def _judged(
    head: nn.Linear, encoder: UsableEncoder, val: ImageSource, settings: ProbeSettings
) -> tuple[LinearResult, list[tuple[str, str]]]:
    """Return how the trained head does on the validation images, and which of these could not be read."""
    features = encoder.features(val)
    result = judge_head(
        head.weight.detach(),
        head.bias.detach(),
        features.vectors,
        labels_of(features),
        learning_rate=settings.learning_rate,
        trials=(),
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        device=encoder.world.device,
    )
    return result, features.broken


def _train_epoch(head: nn.Linear, optimizer: Optimizer, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor | None:
    """Take one step for each batch; return the mean loss of all images, None without any."""
    losses, seen = [], 0
    for features, labels in batches:
        loss = F.cross_entropy(head(features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach() * len(labels))
        seen += len(labels)
    return torch.stack(losses).sum() / seen if losses else None


@dataclass(frozen=True)
class _CroppedFeatures:
    """The features of one random crop of every training image, in a new order and with new crops in each epoch."""

    backbone: nn.Module
    encoder: UsableEncoder
    """How images are prepared for the backbone, and where it runs."""
    source: ImageSource
    labels: Int[Tensor, " N"]
    seed: int
    broken: dict[int, str] = field(default_factory=dict)
    """Of the images that this process has met: which could not be read, and why."""

    def batches(self, epoch: int, batch_size: int) -> Iterator[tuple[Float[Tensor, "B F"], Int[Tensor, " B"]]]:
        """Yield features and labels of an epoch's batches on the device; the last may be smaller."""
        waiting = torch.empty(0, device=self.encoder.world.device)
        indices: list[int] = []
        for part, features in self._good_images(epoch):
            waiting = torch.cat([waiting, features]) if len(waiting) else features
            indices += part
            while len(indices) >= batch_size:
                yield waiting[:batch_size], self._labels(indices[:batch_size])
                waiting, indices = waiting[batch_size:], indices[batch_size:]
        if indices:
            yield waiting, self._labels(indices)

    def broken_of_all(self) -> list[tuple[str, str]]:
        """Return key and reason of the broken images that all processes have met, in the source's order."""
        met = {
            index: reason
            for broken in self.encoder.world.gather_objects(self.broken)
            for index, reason in broken.items()
        }
        return [(self.source.key(index), met[index]) for index in sorted(met)]

    def _good_images(self, epoch: int) -> Iterator[tuple[list[int], Float[Tensor, "B F"]]]:
        """Yield indices and features in the epoch's order; of each group every process makes a contiguous part."""
        world, workers = self.encoder.world, self.encoder.workers
        order, group = epoch_order(len(self.source), self.seed, epoch), FORWARD_BATCH * world.size
        parts = [world.part(order[first : first + group]).tolist() for first in range(0, len(order), group)]
        own = [index for part in parts for index in part]
        views = map_in_order(partial(self._crop, epoch), own, [], 2 * FORWARD_BATCH + workers, workers)
        for part in parts:
            good = [(index, view) for index, view in islice(views, len(part)) if view is not None]
            features = self._forward([view for _, view in good])
            read = world.gather_objects([index for index, _ in good])
            yield [index for others in read for index in others], world.gather_parts(features)

    def _crop(self, epoch: int, index: int) -> Float[Tensor, "3 S S"] | None:
        """Return the epoch's crop of an image; None, noted in `broken`, where it cannot be read."""
        try:
            image = self.source.load(index)
        except BrokenImage as error:  # not left to `map_in_order`: what it skips would shift the parts that follow
            self.broken[index] = error.reason
            return None
        preparation = self.encoder.preparation
        augmentation = Augmentation.crop_and_flip(preparation.size)
        parameters = draw_parameters(
            augmentation, [image.shape[0]], [image.shape[1]], seed=self.seed, epoch=epoch, indices=[index], view=0
        )
        return render_views([image], parameters, augmentation, preparation.mean, preparation.std)[0]

    def _forward(self, views: list[Tensor]) -> Float[Tensor, "B F"]:
        if not views:
            return torch.empty(0, _width(self.backbone), device=self.encoder.world.device)
        with evaluation_mode(self.backbone):
            images = copy_to(self.encoder.world.device, torch.stack(views))
            return backbone_features(self.backbone, images, self.encoder.precision)

    def _labels(self, indices: list[int]) -> Int[Tensor, " B"]:
        return self.labels[indices].to(self.encoder.world.device)


def _new_head(features: int, classes: int, seed: int, device: torch.device) -> nn.Linear:
    """Return the published initial head: weight ~ N(0, 0.01), bias 0."""
    head: nn.Linear = nn.utils.skip_init(nn.Linear, features, classes)
    with torch.no_grad():
        head.weight.normal_(0, INITIAL_STD, generator=torch.Generator().manual_seed(seed))
        head.bias.zero_()
    return head.to(device)


def _width(backbone: nn.Module) -> int:
    width = backbone.num_features
    assert isinstance(width, int)  # of every backbone: docs/architecture.md
    return width


def _labels(source: ImageSource) -> Int[Tensor, " N"]:
    if source.labels is None:
        raise CacoError(f"{source.name} has no labels; a linear probe needs them (a folder for each class)")
    return torch.from_numpy(np.asarray(source.labels, np.int64))
