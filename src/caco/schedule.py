"""Schedules: pure functions of the epoch (paper §4; published `adjust_learning_rate*`, `adjust_moco_momentum`)."""

from __future__ import annotations

import math


def warmup_cosine(epoch: float, epochs: float, warmup_epochs: float, base: float, final: float) -> float:
    """Return base·(epoch + 1)/warmup during warm-up, then a cosine from base to final.

    epoch counts from 0. With base == final the rate is constant after warm-up. A run that is all warm-up has no cosine
    part: what would follow its last epoch is final.
    """
    if epoch < warmup_epochs:
        return base * (epoch + 1) / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs) if epochs > warmup_epochs else 1.0
    return final + 0.5 * (1 + math.cos(math.pi * progress)) * (base - final)


def encoder_lr(epoch: float, epochs: float, warmup_epochs: float, lr: float, final_lr: float, batch_size: int) -> float:
    """Return the encoder's learning rate; lr and final_lr are per 256 images of the global batch."""
    scale = batch_size / 256
    return warmup_cosine(epoch, epochs, warmup_epochs, lr * scale, final_lr * scale)


def bank_lr(epoch: float, epochs: float, warmup_epochs: float, lr: float, final_lr: float, bank_size: int) -> float:
    """Return the bank's learning rate; lr and final_lr are per 65,536 slots. The batch size plays no part.

    A slot's share of the gradient is proportional to 1/K: it is larger in a smaller bank, whose rate is lower in the same
    proportion. At the published K = 65,536 this is the published rate.
    """
    scale = bank_size / 65536
    return warmup_cosine(epoch, epochs, warmup_epochs, lr * scale, final_lr * scale)


def key_momentum(epoch: float, epochs: float, momentum: float, cosine: bool) -> float:
    """Return the key encoder's momentum: constant, or 1 − ½(1 + cos(π·epoch/epochs))·(1 − momentum)."""
    if not cosine:
        return momentum
    return 1 - 0.5 * (1 + math.cos(math.pi * epoch / epochs)) * (1 - momentum)
