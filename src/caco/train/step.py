"""One step: from views on the device to moved weights. Nothing here waits for the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from caco import schedule
from caco.config import Pretrain, Views
from caco.distributed.world import World
from caco.model import CaCo, StepOutput, ViewOutput, step_output
from caco.optim import set_lr
from caco.precision import autocast
from caco.train.state import TrainingState

LONG_WARM_START = 1000
"""Steps of a warm start that is to teach the encoder, not only to fill the bank (docs/tuning.md)."""
LONGEST_WARM_START = 0.6
"""Steps of it for each step of training, at most."""


@dataclass(frozen=True)
class Rates:
    """Rates of an epoch: they change between epochs, not within (as published)."""

    lr: float
    bank_lr: float
    key_momentum: float


def rates_at(config: Pretrain, epoch: int) -> Rates:
    """Return the rates of an epoch, counted from 0, of a run whose number of epochs is known."""
    epochs, warmup = int(config.epochs), config.optimizer.warmup_epochs
    encoder, bank = config.encoder, config.bank
    return Rates(
        lr=schedule.encoder_lr(epoch, epochs, warmup, config.lr, config.optimizer.final_lr, config.batch_size),
        bank_lr=schedule.bank_lr(epoch, epochs, warmup, bank.lr, bank.final_lr, config.bank_size),
        key_momentum=schedule.key_momentum(
            epoch, epochs, encoder.key_momentum, cosine=encoder.key_momentum_schedule == "cosine"
        ),
    )


def warm_start_lr(config: Pretrain) -> float:
    """Return the learning rate of the warm start: the full base rate (published)."""
    return config.lr * config.batch_size / 256


def warm_start_steps(config: Pretrain, steps_per_epoch: int) -> int:
    """Return the length of the warm start; auto, as published: until all slots are filled, or the data ends.

    long: LONG_WARM_START steps, of which a short run takes fewer, but no fewer than auto.
    """
    steps = config.bank.warm_start_steps
    as_published = min(math.ceil(config.bank_size / config.batch_size), steps_per_epoch)
    if steps == "auto":
        return as_published
    if steps == "long":
        in_proportion = round(LONGEST_WARM_START * int(config.epochs) * steps_per_epoch)
        return max(min(LONG_WARM_START, in_proportion), as_published)
    return steps


def warm_start_cost(views: Views) -> float:
    """Return what a step of the warm start costs, in training steps: of one query and one key, by their pixels.

    A query's forward and backward pass is three times its forward pass.
    """
    queries = views.large + views.small * (views.small_size / views.size) ** 2
    return (3 + 1) / (3 * queries + 2)


def remarks_on_rates(config: Pretrain) -> Iterator[str]:
    """Yield what is odd about the rates of a run, in words."""
    epochs, warmup = int(config.epochs), config.optimizer.warmup_epochs
    if warmup >= epochs and warmup > 1:  # of a single epoch the rate is --lr from the start
        reaches = "reaches --lr in the last epoch only" if warmup == epochs else "never reaches --lr"
        yield (
            f"the learning rate {reaches}: it warms up over {warmup} epochs (--optimizer.warmup-epochs), and the run "
            f"has {epochs}"
        )
    ends = (
        ("lr", config.lr, "optimizer", config.optimizer.final_lr),
        ("bank.lr", config.bank.lr, "bank", config.bank.final_lr),
    )
    for name, first, group, final in ends:
        if final > first:  # one was given, the other is the recipe's
            yield f"--{name} {first:g} grows over the run, for --{group}.final-lr is {final:g}; set both to change this"


def train_step(
    state: TrainingState,
    gradients: Callable[[Sequence[Tensor]], StepOutput],
    views: Sequence[Tensor],
    rates: Rates,
    next_key_momentum: float,
) -> StepOutput:
    """Move encoder, bank and key encoder by one batch.

    gradients: `compute_gradients` with all but the views given, or the same work captured (`captured.py`).
    next_key_momentum: of the step that follows, since the published code updates the key encoder at the start of a step,
    which is the end of the one before.
    """
    set_lr(state.optimizer, rates.lr)
    set_lr(state.bank_optimizer, rates.bank_lr)
    state.optimizer.zero_grad(set_to_none=True)
    state.bank_optimizer.zero_grad(set_to_none=True)
    output = gradients(views)
    state.optimizer.step()
    state.bank_optimizer.step()
    state.model.update_key_encoder(next_key_momentum)
    state.step += 1
    state.meters.add(output, state.step)
    return output


def compute_gradients(
    model: CaCo, network: nn.Module, views: Sequence[Tensor], precision: torch.dtype, accumulate: int = 1
) -> StepOutput:
    """Add the gradients of one batch to those of encoder and bank, one view after another.

    network: `model`, or the data-parallel wrapper around it. accumulate: the batch goes through in so many parts, one after
    another; the negatives come from the bank, so only batch norm can tell.
    """
    in_precision = autocast(views[0].device, precision)
    outputs: list[ViewOutput] = []
    positives_of_parts: list[Tensor] = []
    parts = parts_of(views, accumulate)
    for part, crops in enumerate(parts):
        with in_precision:
            positives = model.find_positives(crops)
        positives_of_parts.append(positives.indices)
        for view_index, view in enumerate(crops):
            is_last = (part, view_index) == (len(parts) - 1, len(crops) - 1)
            earlier = [output.pull for output in outputs] if is_last else None
            with _gradients_stay_here(network, not is_last):
                with in_precision:
                    output: ViewOutput = network(view, view_index, positives, 1 / len(parts), earlier)
                output.loss.backward()
            outputs.append(output._replace(loss=output.loss.detach()))
    return step_output(outputs, positives_of_parts)


def parts_of(views: Sequence[Tensor], accumulate: int) -> list[list[Tensor]]:
    """Return the views of each part of a batch: of every so-manyth image, so that their batch norms see the same images
    whatever the number of processes, each of which has a run of neighbours."""
    return [[view[first::accumulate] for view in views] for first in range(accumulate)]


def _gradients_stay_here(network: nn.Module, stay: bool) -> AbstractContextManager[None]:
    """Return a context in which gradients are not yet averaged over the processes: more of the batch follows."""
    return network.no_sync() if stay and isinstance(network, DistributedDataParallel) else nullcontext()


class WarmStartOutput(NamedTuple):
    """What a batch of the warm start gives; no gradient."""

    loss: Tensor
    """Scalar: the mean over this process's images."""
    keys: Float[Tensor, "B D"]
    """Of this process's images, in their order."""


def warm_start_step(
    state: TrainingState,
    gradients: Callable[[Sequence[Tensor]], WarmStartOutput],
    views: Sequence[Tensor],
    lr: float,
    key_momentum: float,
    world: World,
) -> Tensor:
    """Move the encoder by one batch of ordinary contrast, store the keys in the bank, and return the loss.

    gradients: `warm_start_gradients` with all but the views given, or the same work captured.
    """
    set_lr(state.optimizer, lr)
    state.optimizer.zero_grad(set_to_none=True)
    output = gradients(views)
    state.optimizer.step()
    state.model.update_key_encoder(key_momentum)
    state.model.bank.fill(world.gather(output.keys), batch=state.warm_start_step)
    state.warm_start_step += 1
    state.meters.note_loss(output.loss, state.warm_start_step)
    return output.loss


def warm_start_gradients(
    network: nn.Module, views: Sequence[Tensor], precision: torch.dtype, accumulate: int = 1
) -> WarmStartOutput:
    """Add the gradients of ordinary contrast to those of the encoder.

    network: `WarmStart(state.model)`, or the data-parallel wrapper around it. accumulate: as in `compute_gradients`.
    """
    losses, keys = [], []
    for part, crops in enumerate(parts_of(views[:2], accumulate)):
        with _gradients_stay_here(network, part < accumulate - 1):
            with autocast(views[0].device, precision):
                loss, found = network(crops)
            (loss / accumulate).backward()
        losses.append(loss.detach())
        keys.append(found)
    return WarmStartOutput(torch.stack(losses).mean(), torch.stack(keys, dim=1).flatten(0, 1))
