"""One step: from views on the device to moved weights. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from caco import schedule
from caco.config import BankOptions, EncoderOptions, OptimizerOptions, Pretrain
from caco.distributed.world import World
from caco.model import CaCo, Output, Share, add_up
from caco.optim import set_lr
from caco.train.state import TrainingState


@dataclass(frozen=True)
class Rates:
    """Rates of an epoch: they change between epochs, not within (as published)."""

    lr: float
    bank_lr: float
    key_momentum: float


@dataclass(frozen=True)
class Schedules:
    """All schedules of a run; `at(epoch)` returns the rates."""

    epochs: int
    lr: float
    batch_size: int
    bank_size: int
    optimizer: OptimizerOptions
    bank: BankOptions
    encoder: EncoderOptions

    def at(self, epoch: int) -> Rates:
        """Return the rates of an epoch, counted from 0."""
        warmup = self.optimizer.warmup_epochs
        return Rates(
            lr=schedule.encoder_lr(epoch, self.epochs, warmup, self.lr, self.optimizer.final_lr, self.batch_size),
            bank_lr=schedule.bank_lr(epoch, self.epochs, warmup, self.bank.lr, self.bank.final_lr, self.bank_size),
            key_momentum=schedule.key_momentum(
                epoch, self.epochs, self.encoder.key_momentum, self.encoder.key_momentum_schedule == "cosine"
            ),
        )

    @classmethod
    def of(cls, config: Pretrain) -> Schedules:
        """Return the schedules of a run whose number of epochs is known."""
        return cls(
            epochs=int(config.epochs),
            lr=config.lr,
            batch_size=config.batch_size,
            bank_size=config.bank_size,
            optimizer=config.optimizer,
            bank=config.bank,
            encoder=config.encoder,
        )

    def remarks(self) -> Iterator[str]:
        """Yield what is odd about the schedules, in words."""
        warmup = self.optimizer.warmup_epochs
        if warmup >= self.epochs and warmup > 1:  # of a single epoch the rate is --lr from the start
            reaches = "reaches --lr in the last epoch only" if warmup == self.epochs else "never reaches --lr"
            yield (
                f"the learning rate {reaches}: it warms up over {warmup} epochs (--optimizer.warmup-epochs), and the run "
                f"has {self.epochs}"
            )
        ends = (
            ("lr", self.lr, "optimizer", self.optimizer.final_lr),
            ("bank.lr", self.bank.lr, "bank", self.bank.final_lr),
        )
        for name, first, group, final in ends:
            if final > first:  # one was given, the other is the recipe's
                yield f"--{name} {first:g} grows over the run, for --{group}.final-lr is {final:g}; set both to change this"

    @property
    def warm_start_lr(self) -> float:
        """Learning rate of the warm start: the full base rate (published)."""
        return self.lr * self.batch_size / 256


def train_step(
    state: TrainingState,
    network: nn.Module,
    views: Sequence[Tensor],
    rates: Rates,
    next_key_momentum: float,
    precision: torch.dtype,
    accumulate: int = 1,
) -> Output:
    """Move encoder, bank and key encoder by one batch.

    network: `state.model`, or the data-parallel wrapper around it. next_key_momentum: of the step that follows, since
    the published code updates the key encoder at the start of a step, which is the end of the one before.
    """
    set_lr(state.optimizer, rates.lr)
    set_lr(state.bank_optimizer, rates.bank_lr)
    state.optimizer.zero_grad(set_to_none=True)
    state.bank_optimizer.zero_grad(set_to_none=True)
    output = compute_gradients(state.model, network, views, precision, accumulate)
    state.optimizer.step()
    state.bank_optimizer.step()
    state.model.update_key_encoder(next_key_momentum)
    state.step += 1
    state.meters.add(output, state.step)
    return output


def compute_gradients(
    model: CaCo, network: nn.Module, views: Sequence[Tensor], precision: torch.dtype, accumulate: int = 1
) -> Output:
    """Add the gradients of one batch to those of encoder and bank, one view after another.

    accumulate: the batch goes through in so many parts, one after another; the negatives come from the bank, so only
    batch norm can tell.
    """
    autocast = torch.autocast(views[0].device.type, dtype=precision, enabled=precision != torch.float32)
    shares: list[Share] = []
    places: list[Tensor] = []
    for crops in parts_of(views, accumulate):
        with autocast:
            positives = model.find_positives(crops)
        places.append(positives.places)
        for number, view in enumerate(crops):
            last = len(shares) + 1 == accumulate * len(views)
            with _gradients_stay_here(network, not last):
                with autocast:
                    # The bank's gradient is as large as the bank: made once, for the queries of all views and parts.
                    others = [share.pull for share in shares] if last else None
                    share: Share = network(view, number, positives, others, 1 / accumulate)
                share.loss.backward()
            shares.append(share._replace(loss=share.loss.detach()))
    return add_up(shares, places)


def parts_of(views: Sequence[Tensor], accumulate: int) -> list[list[Tensor]]:
    """Return the views of each part of a batch: of every so-manyth image, so that their batch norms see the same images
    whatever the number of processes, each of which has a run of neighbours."""
    return [[view[first::accumulate] for view in views] for first in range(accumulate)]


def _gradients_stay_here(network: nn.Module, stay: bool) -> AbstractContextManager[None]:
    """Return a context in which gradients are not yet averaged over the processes: more of the batch follows."""
    return network.no_sync() if stay and isinstance(network, DistributedDataParallel) else nullcontext()


def warm_start_step(
    state: TrainingState,
    network: nn.Module,
    views: Sequence[Tensor],
    lr: float,
    key_momentum: float,
    precision: torch.dtype,
    world: World,
    accumulate: int = 1,
) -> Tensor:
    """Move the encoder by one batch of ordinary contrast, store the keys in the bank, and return the loss.

    network: `WarmStart(state.model)`, or the data-parallel wrapper around it. accumulate: as in `compute_gradients`.
    """
    set_lr(state.optimizer, lr)
    state.optimizer.zero_grad(set_to_none=True)
    losses, keys = [], []
    for part, crops in enumerate(parts_of(views[:2], accumulate)):
        with _gradients_stay_here(network, part < accumulate - 1):
            with torch.autocast(views[0].device.type, dtype=precision, enabled=precision != torch.float32):
                loss, found = network(crops)
            (loss / accumulate).backward()
        losses.append(loss.detach())
        keys.append(found)
    state.optimizer.step()
    state.model.update_key_encoder(key_momentum)
    state.model.bank.fill(world.gather(torch.stack(keys, dim=1).flatten(0, 1)), batch=state.warm_start_step)
    state.warm_start_step += 1
    mean = torch.stack(losses).mean()
    state.meters.note_loss(mean, state.warm_start_step)
    return mean
