"""The published linear evaluation: random crops, a layer-wise learning rate, features computed anew in every epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from caco.config import IMAGENET_MEAN, IMAGENET_STD, Augmentation
from caco.data.augment import draw_parameters, render_views
from caco.data.decode import BrokenImage
from caco.data.order import epoch_order
from caco.data.render import copy_to
from caco.data.source import ImageSource
from caco.data.threads import map_in_order
from caco.distributed.world import World
from caco.errors import CacoError, UsageError
from caco.evaluate.features import (
    Features,
    backbone_features,
    evaluation_mode,
    extract,
    gather_features,
)
from caco.evaluate.linear import INITIAL_STD, LinearResult, check_labels, judge_head
from caco.optim import set_lr

FORWARD_BATCH = 256  # images that go through the backbone at a time in each process, whatever the head's batch size


@dataclass(frozen=True, eq=False)
class ReferenceResult:
    """The head that the published protocol has trained, and which images it could not see."""

    head: LinearResult
    train_broken: list[tuple[str, str]]
    """Key and reason of each training image that could not be read, in the source's order."""
    val_broken: list[tuple[str, str]]


class LayerWiseSGD(Optimizer):
    """SGD with momentum whose gradient is scaled, for each tensor, by its own rate (LARC without clipping).

    u = (g + weight_decay·p) · trust·‖p‖ / (‖g‖ + weight_decay·‖p‖ + 1e-8) where both norms are positive, else u = g;
    buffer ← momentum·buffer + u; p ← p − lr·buffer. Weights and biases alike. No host synchronisation.
    Source: You et al. 2017, arXiv:1708.03888; published `linear.py`; `linear_probe_lars.npz`.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        super().__init__(
            parameters,
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient},
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step. (No closure: the loss is computed once.)"""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, parameter.grad, group)

    def _step_one(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        decay = group["weight_decay"]
        parameter_norm, gradient_norm = parameter.norm(), gradient.norm()
        rate = group["trust_coefficient"] * parameter_norm / (gradient_norm + decay * parameter_norm + 1e-8)
        # A bias starts at 0: without this exception its rate would be 0 for ever.
        scaled = (parameter_norm > 0) & (gradient_norm > 0)
        update = torch.where(scaled, gradient.add(parameter, alpha=decay) * rate, gradient)
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
        parameter.add_(buffer, alpha=-group["lr"])


def train_reference_probe(
    backbone: nn.Module,
    train_source: ImageSource,
    val_source: ImageSource,
    *,
    world: World,
    workers: int,
    size: int = 224,
    resize: int = 256,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    epochs: int = 100,
    batch_size: int = 4096,
    learning_rate: float = 0.025,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    seed: int = 0,
    precision: Literal["fp32", "bf16"] = "fp32",
    on_epoch: Callable[[int, float], None] | None = None,
) -> ReferenceResult:
    """Train the published linear head on a frozen backbone in evaluation mode and judge it on the validation set.

    Train views: a random crop of 8-100 % of the area, resized to `size`, flipped half of the time. The rate is
    learning_rate · batch_size / 256, a cosine to 0 by epochs. A batch larger than the training set is the whole set.
    on_epoch(epoch, mean loss) is called after each epoch, counted from 0. The result's head is that of the last epoch.
    The processes of `world` share the features' work; each trains the same head on all of them, and has the result.
    Raises CacoError without labels, on labels out of range, when no image can be read, or when the head diverges.
    """
    device = world.device
    train_labels, val_labels = _labels(train_source), _labels(val_source)
    classes = check_labels(train_labels, val_labels, len(train_source.classes) or None)
    if epochs < 1 or batch_size < 1:
        raise UsageError("the linear probe needs at least one epoch and a batch size of at least 1")
    batch_size = min(batch_size, len(train_source))
    backbone.to(device)
    head = _new_head(_width(backbone), classes, seed, device)
    optimizer = LayerWiseSGD(head.parameters(), 0.0, momentum, weight_decay)
    crops = _CroppedFeatures(backbone, train_source, train_labels, size, mean, std, seed, world, workers, precision)
    for epoch in range(epochs):
        set_lr(optimizer, learning_rate * batch_size / 256 * 0.5 * (1 + math.cos(math.pi * epoch / epochs)))
        loss = _train_epoch(head, optimizer, crops.batches(epoch, batch_size))
        if loss is None:
            raise CacoError(f"none of the {len(train_source):,} images of {train_source.name} can be read")
        if not all(torch.isfinite(tensor).all() for tensor in (loss, *head.parameters())):
            raise CacoError(
                f"the linear probe diverged in epoch {epoch + 1} at --lr {learning_rate:g}; try a lower one"
            )
        if on_epoch is not None:
            on_epoch(epoch, loss.item())

    def judged_features(part: np.ndarray) -> Features:
        return extract(
            backbone,
            val_source,
            size=size,
            resize=resize,
            mean=mean,
            std=std,
            device=device,
            workers=workers,
            indices=part,
            precision=precision,
        )

    val = gather_features(judged_features, len(val_source), world)
    assert val.labels is not None  # _labels refused a source without
    weight, bias = head.weight.detach(), head.bias.detach()
    result = judge_head(weight, bias, val.vectors, val.labels, learning_rate, (), epochs, batch_size, device)
    return ReferenceResult(result, crops.broken_of_all(), val.broken)


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
    source: ImageSource
    labels: Int[Tensor, " N"]
    size: int
    mean: Sequence[float]
    std: Sequence[float]
    seed: int
    world: World
    workers: int
    precision: Literal["fp32", "bf16"]
    broken: dict[int, str] = field(default_factory=dict)
    """Of the images that this process has met: which could not be read, and why."""

    def batches(self, epoch: int, batch_size: int) -> Iterator[tuple[Float[Tensor, "B F"], Int[Tensor, " B"]]]:
        """Yield features and labels of an epoch's batches on the device; the last may be smaller."""
        waiting = torch.empty(0, device=self.world.device)
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
        met = {index: reason for broken in self.world.gather_objects(self.broken) for index, reason in broken.items()}
        return [(self.source.key(index), met[index]) for index in sorted(met)]

    def _good_images(self, epoch: int) -> Iterator[tuple[list[int], Float[Tensor, "B F"]]]:
        """Yield indices and features in the epoch's order; of each group every process makes a contiguous part."""
        order, group = epoch_order(len(self.source), self.seed, epoch), FORWARD_BATCH * self.world.size
        parts = [self.world.part(order[first : first + group]).tolist() for first in range(0, len(order), group)]
        own = (index for part in parts for index in part)
        views = map_in_order(partial(self._crop, epoch), own, [], 2 * FORWARD_BATCH + self.workers, self.workers)
        for part in parts:
            good = [(index, view) for index, view in islice(views, len(part)) if view is not None]
            features = self._forward([view for _, view in good])
            read = self.world.gather_objects([index for index, _ in good])
            yield [index for others in read for index in others], self.world.gather_parts(features)

    def _crop(self, epoch: int, index: int) -> Float[Tensor, "3 S S"] | None:
        """Return the epoch's crop of an image; None, noted in `broken`, where it cannot be read."""
        try:
            image = self.source.load(index)
        except BrokenImage as error:  # not left to `map_in_order`: what it skips would shift the parts that follow
            self.broken[index] = error.reason
            return None
        augmentation = Augmentation.crop_and_flip(self.size)
        parameters = draw_parameters(
            augmentation, [image.shape[0]], [image.shape[1]], seed=self.seed, epoch=epoch, indices=[index], view=0
        )
        return render_views([image], parameters, augmentation, self.mean, self.std)[0]

    def _forward(self, views: list[Tensor]) -> Float[Tensor, "B F"]:
        if not views:
            return torch.empty(0, _width(self.backbone), device=self.world.device)
        with evaluation_mode(self.backbone):
            return backbone_features(self.backbone, copy_to(self.world.device, torch.stack(views)), self.precision)

    def _labels(self, indices: list[int]) -> Int[Tensor, " B"]:
        return self.labels[indices].to(self.world.device)


def _new_head(features: int, classes: int, seed: int, device: torch.device) -> nn.Linear:
    """Return the published initial head: weight ~ N(0, 0.01), bias 0."""
    head: nn.Linear = nn.utils.skip_init(nn.Linear, features, classes)
    with torch.no_grad():
        head.weight.normal_(0, INITIAL_STD, generator=torch.Generator().manual_seed(seed))
        head.bias.zero_()
    return head.to(device)


def _width(backbone: nn.Module) -> int:
    width = backbone.num_features
    assert isinstance(width, int)  # of every backbone: architecture.md
    return width


def _labels(source: ImageSource) -> Int[Tensor, " N"]:
    if source.labels is None:
        raise CacoError(f"{source.name} has no labels; a linear probe needs them (a folder for each class)")
    return torch.from_numpy(np.asarray(source.labels, np.int64))
