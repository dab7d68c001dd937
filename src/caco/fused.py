"""Whether the bank is read by kernels of its own (`bank_kernels.py`): on an NVIDIA GPU where they do what is expected."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from caco.own_kernels import has_room, suits_kernels, works

WIDEST = 256
"""Width of the widest embedding that the kernels have room for."""
WIDEST_SEARCHED = 128
"""Of the widest whose nearest slot they search faster than cuBLAS."""
LARGEST_GAP = 5e-6
"""By how much a cosine that was found may differ from the largest one, by rounding: tensor cores cut off what they add."""
LARGEST_DEVIATION = 0.02
"""Largest relative deviation from plain products that rounding to bfloat16 explains."""


def of_loss(weight: Tensor, products: torch.dtype) -> ModuleType | None:
    """Return `bank_kernels` if slots like these [K, D] are compared with queries by them, else None.

    products: what their factors are rounded to.
    """
    return _of_bank(weight) if products == torch.bfloat16 else None


def of_search(weight: Tensor) -> ModuleType | None:
    """Return `bank_kernels` if the nearest of slots like these is found by them, else None.

    A product exact to float32 is three on tensor cores: worth it on a data centre's GPU, whose other units are few.
    """
    return _of_bank(weight) if _searches(weight.device, weight.shape[1]) else None


def _searches(device: torch.device, width: int) -> bool:
    return width <= WIDEST_SEARCHED and has_room(device)


def _of_bank(weight: Tensor) -> ModuleType | None:
    suits = weight.dtype == torch.float32 and weight.shape[1] <= WIDEST and suits_kernels(weight.device)
    return _checked(weight.device, weight.shape[1]) if suits else None


@lru_cache
def _checked(device: torch.device, width: int) -> ModuleType | None:
    """Return the bank's kernels if they give here what plain products give; waits for the device."""

    def problem() -> str:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return _problem(device, width)

    if not works("the bank's kernels", problem):
        return None
    from caco import bank_kernels

    return bank_kernels


def _problem(device: torch.device, width: int) -> str:
    """Return in what the bank's kernels deviate from plain products, "" if in nothing.

    At a size that is divided as a bank's is, and with remainders.
    """
    from caco import bank_kernels  # which needs Triton

    generator = torch.Generator().manual_seed(0)
    query, weight, pull = (torch.randn(count, width, generator=generator).to(device) for count in (500, 32_100, 500))
    query, inverse_length = F.normalize(query, dim=1), weight.norm(dim=1, keepdim=True).reciprocal()
    rows, scaled = weight * inverse_length, query / 0.1
    cosines, logits = query.double() @ rows.double().T, scaled @ rows.T
    probability, log_normaliser = logits.softmax(dim=1), logits.logsumexp(dim=1, keepdim=True)
    of_slots = probability.T @ pull

    searches = _searches(device, width)
    found, place = bank_kernels.nearest(query, weight, inverse_length) if searches else cosines.max(dim=1)
    largest, total, slot_sum = bank_kernels.softmax(scaled, weight, inverse_length)
    gradient = bank_kernels.pulls_on_slots(scaled, weight, inverse_length, log_normaliser, pull)
    gaps = cosines.amax(dim=1) - torch.stack([cosines.gather(1, place[:, None])[:, 0], found.double()])
    pairs = [
        (largest + total.log(), log_normaliser),
        (slot_sum / total, probability @ rows),
        (gradient, (of_slots - (of_slots * rows).sum(dim=1, keepdim=True) * rows) * inverse_length),
    ]
    deviation = torch.stack([(one - other).norm() / other.norm() for one, other in pairs]).amax()
    gap, furthest = gaps.abs().amax().item(), deviation.item()
    if gap < LARGEST_GAP and furthest < LARGEST_DEVIATION:  # not so for NaN
        return ""
    return f"they deviate by {furthest:.2g} from plain products, and by {gap:.2g} in the search"
