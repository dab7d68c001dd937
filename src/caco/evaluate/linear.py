"""A linear classifier on frozen features: the default judge of an encoder.

Many learning rates are trained at once, as one batch of heads on the same shuffled features. The rate is chosen on a
part held out of *train*; the head reported is trained anew on all of train. The validation set is looked at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from caco.errors import CacoError, UsageError
from caco.evaluate.knn import held_out_split

LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
HELD_OUT = 0.1
"""Share of each class of train on which the learning rate is chosen."""
JUDGE_CHUNK = 8192
INITIAL_STD = 0.01


@dataclass(frozen=True)
class RateTrial:
    """How one learning rate did on the part held out of train."""

    learning_rate: float
    top1: float
    """Share (0-1); 0 when the head diverged."""
    loss: float
    """Mean cross-entropy; infinite when the head diverged."""


@dataclass(frozen=True, eq=False)
class LinearResult:
    """A linear head and how it does on the validation set."""

    top1: float
    """Share (0-1) of validation images whose class is the head's first guess."""
    top5: float
    """Share (0-1) whose class is among its first five guesses."""
    learning_rate: float
    trials: tuple[RateTrial, ...]
    """Every rate that was tried; empty when the rate was given."""
    per_class: Float[Tensor, " C"]
    """Top-1 share of each class's validation images; NaN for a class without any."""
    correct: Bool[Tensor, " M"]
    """Which validation images `top1` counts."""
    weight: Float[Tensor, "C F"]
    """The head on features as they come: logits = features @ weight.T + bias. On the CPU, as all tensors here."""
    bias: Float[Tensor, " C"]
    epochs: int
    batch_size: int


def linear_probe(
    train: Float[Tensor, "N F"],
    train_labels: Int[Tensor, " N"],
    val: Float[Tensor, "M F"],
    val_labels: Int[Tensor, " M"],
    *,
    classes: int | None = None,
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: int = 100,
    batch_size: int | Literal["auto"] = "auto",
    momentum: float = 0.9,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> LinearResult:
    """Train a linear head on cached features and judge it on the validation set.

    Features are standardised by train's mean and standard deviation. SGD with momentum, no weight decay, cosine to 0
    over all steps; weight ~ N(0, 0.01), bias 0. The rate is chosen on HELD_OUT of each class of train; with one rate
    nothing is held out. classes: None takes the largest train label + 1. device: None trains where `train` is. The same
    input gives the same result on the same machine. Raises CacoError on labels out of range, nothing to train on or to
    judge, and a head that diverges; UsageError on options that cannot be, and on several rates where no class of train
    has two images.
    """
    classes = check_labels(train_labels, val_labels, classes)
    check_choice(train_labels, learning_rates)
    if not learning_rates or min(learning_rates) <= 0 or epochs < 1:
        raise UsageError("the linear probe needs at least one learning rate above 0 and one epoch")
    target = torch.device(device) if device is not None else train.device
    centre, scale = _standardisation(train.float())
    features = (train.float() - centre).div_(scale).to(target)
    labels = train_labels.to(target)

    trials: tuple[RateTrial, ...] = ()
    rate = learning_rates[0]
    if len(learning_rates) > 1:
        trials = _try_rates(features, labels, classes, learning_rates, epochs, batch_size, momentum, seed)
        rate = min(trials, key=lambda trial: (-trial.top1, trial.loss)).learning_rate

    size = _batch_size(batch_size, len(features))
    weights, biases = train_heads(features, labels, classes, [rate], epochs, size, momentum, seed)
    weight = weights[0].cpu() / scale.cpu()
    bias = biases[0].cpu() - weight @ centre.cpu()
    if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise CacoError(f"the linear probe diverged at learning rate {rate:g}; try a lower --lr")
    return judge_head(weight, bias, val, val_labels, rate, trials, epochs, size, target)


def _try_rates(
    features: Float[Tensor, "N F"],
    labels: Int[Tensor, " N"],
    classes: int,
    learning_rates: Sequence[float],
    epochs: int,
    batch_size: int | Literal["auto"],
    momentum: float,
    seed: int,
) -> tuple[RateTrial, ...]:
    """Return how a head of each rate, trained on the kept part of train, does on the part held out."""
    parts = held_out_split(labels.cpu(), HELD_OUT, seed)
    kept, held = (torch.from_numpy(part).to(features.device) for part in parts)
    size = _batch_size(batch_size, len(kept))
    heads = train_heads(features[kept], labels[kept], classes, learning_rates, epochs, size, momentum, seed)
    return try_heads(*heads, features[held], labels[held], learning_rates)


def train_heads(
    features: Float[Tensor, "N F"],
    labels: Int[Tensor, " N"],
    classes: int,
    learning_rates: Sequence[float],
    epochs: int,
    batch_size: int,
    momentum: float,
    seed: int,
) -> tuple[Float[Tensor, "R C F"], Float[Tensor, "R C"]]:
    """Train one linear head for each learning rate, all at once; return weights and biases.

    All start from the same weights and see the same batches, so each is what training it alone would give. The gradient
    of the mean cross-entropy is written out: (softmax − one-hot)ᵀ · features / B. An epoch is cut into batches of equal
    size, to within one image, of at most `batch_size`. A head that diverges leaves the others untouched.
    """
    count, width = features.shape
    heads, device = len(learning_rates), features.device
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(classes, width, generator=generator) * INITIAL_STD
    weights = start.to(features).repeat(heads, 1, 1)
    biases = features.new_zeros(heads, classes)
    weight_velocity, bias_velocity = torch.zeros_like(weights), torch.zeros_like(biases)
    rates = torch.tensor(learning_rates, dtype=features.dtype).to(device)
    minus_one = -features.new_ones(())
    steps_per_epoch = math.ceil(count / batch_size)
    total = epochs * steps_per_epoch
    for epoch in range(epochs):
        order = torch.randperm(count, generator=generator).to(device)
        for step, chosen in enumerate(order.tensor_split(steps_per_epoch), start=epoch * steps_per_epoch):
            batch = features[chosen]
            logits = torch.addmm(biases.view(-1), batch, weights.view(-1, width).T)
            error = logits.view(-1, heads, classes).softmax(dim=2)
            truth = labels[chosen][:, None, None].expand(-1, heads, 1)
            error.scatter_add_(2, truth, minus_one.expand(truth.shape))
            error = error.flatten(1).div_(len(chosen))
            weight_velocity.mul_(momentum).view(-1, width).addmm_(error.T, batch)
            bias_velocity.mul_(momentum).view(-1).add_(error.sum(dim=0))
            rate = rates * (0.5 * (1 + math.cos(math.pi * step / total)))
            weights.addcmul_(weight_velocity, rate[:, None, None], value=-1)
            biases.addcmul_(bias_velocity, rate[:, None], value=-1)
    return weights, biases


def judge_head(
    weight: Float[Tensor, "C F"],
    bias: Float[Tensor, " C"],
    features: Float[Tensor, "M F"],
    labels: Int[Tensor, " M"],
    learning_rate: float,
    trials: tuple[RateTrial, ...],
    epochs: int,
    batch_size: int,
    device: torch.device,
) -> LinearResult:
    """Return the result of a finished head on the validation features."""
    on_device = weight.to(device), bias.to(device)
    guesses = []
    for part in features.split(JUDGE_CHUNK):
        logits = torch.addmm(on_device[1], part.to(on_device[0]), on_device[0].T)
        guesses.append(logits.topk(min(5, len(bias)), dim=1).indices)
    labels = labels.cpu()
    hits = torch.cat(guesses).cpu() == labels[:, None]
    correct = hits[:, 0]
    seen = torch.bincount(labels, minlength=len(bias))
    right = torch.bincount(labels[correct], minlength=len(bias))
    return LinearResult(
        top1=correct.double().mean().item(),
        top5=hits.any(dim=1).double().mean().item(),
        learning_rate=learning_rate,
        trials=trials,
        per_class=right / seen,
        correct=correct,
        weight=weight.cpu(),
        bias=bias.cpu(),
        epochs=epochs,
        batch_size=batch_size,
    )


def check_choice(train_labels: Tensor, learning_rates: Sequence[float]) -> None:
    """Raise UsageError when a learning rate must be chosen and no training image can be held out for it."""
    if len(learning_rates) > 1 and len(train_labels.unique()) == len(train_labels):
        raise UsageError(
            "no class has two training images, so none can be held out to choose the learning rate on; name one rate, "
            "for example --lr 0.1"
        )


def check_labels(train_labels: Tensor, val_labels: Tensor, classes: int | None) -> int:
    """Return the number of classes.

    Raises CacoError when there is nothing to train on or to judge, or a label is outside.
    """
    if not len(train_labels) or not len(val_labels):
        raise CacoError("a linear probe needs at least one labelled image to train on and one to judge")
    if classes is None:
        classes = int(train_labels.max()) + 1
    for labels, what in ((train_labels, "training"), (val_labels, "validation")):
        for label in (int(labels.min()), int(labels.max())):
            if not 0 <= label < classes:
                raise CacoError(f"label {label} of the {what} images is outside 0-{classes - 1} ({classes} classes)")
    return classes


def try_heads(
    weights: Float[Tensor, "R C F"],
    biases: Float[Tensor, "R C"],
    features: Float[Tensor, "M F"],
    labels: Int[Tensor, " M"],
    learning_rates: Sequence[float],
) -> tuple[RateTrial, ...]:
    """Return how each head does on images that it was not trained on; one that is not finite counts as always wrong."""
    hits, losses = biases.new_zeros(len(biases)), biases.new_zeros(len(biases))
    for part, truth in zip(features.split(JUDGE_CHUNK), labels.split(JUDGE_CHUNK), strict=True):
        logits = torch.addmm(biases.view(-1), part, weights.flatten(0, 1).T).view(-1, *biases.shape)
        hits += (logits.argmax(dim=2) == truth[:, None]).sum(dim=0)
        losses -= logits.log_softmax(dim=2).gather(2, truth[:, None, None].expand(-1, len(biases), 1)).sum(dim=(0, 2))
    finite = torch.isfinite(losses)
    accuracies = torch.where(finite, hits / len(labels), 0).tolist()
    means = torch.where(finite, losses / len(labels), torch.inf).tolist()
    return tuple(RateTrial(*trial) for trial in zip(learning_rates, accuracies, means, strict=True))


def _standardisation(train: Float[Tensor, "N F"]) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation of each feature.

    A (nearly) constant feature is not blown up: no deviation counts as less than a thousandth of the largest one.
    """
    std, mean = torch.std_mean(train, dim=0, correction=0)
    largest = std.max()
    floor = torch.where(largest > 0, 1e-3 * largest, 1.0)
    return mean, std.clamp(min=floor)


def _batch_size(batch_size: int | Literal["auto"], count: int) -> int:
    """Return the batch size; auto: a power of two, some 50 to 100 steps an epoch where 16 to 1,024 images allow it."""
    if batch_size == "auto":
        return min(1024, max(16, 1 << (count // 50).bit_length() - 1)) if count >= 50 else 16
    if batch_size < 1:
        raise UsageError(f"the batch size must be at least 1, not {batch_size}")
    return min(batch_size, count)
