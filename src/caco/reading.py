"""One reading of the bank: what queries find in it, block by block, or at once by kernels."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from caco import fused
from caco.slots import RunningSoftmax, Shards, Slots, compare


class Reading(NamedTuple):
    """What N queries have found in one reading of the bank."""

    positive_logits: Tensor
    """[N, P]: cosine of each positive / temperature of the encoder."""
    of_encoder: RunningSoftmax
    """Over all slots, at the temperature of the encoder."""
    of_slots: RunningSoftmax
    """At that of the slots; the same object when both are equal."""


def read_bank(
    queries: Tensor,
    slots: Slots,
    row: Tensor,
    temperature: float,
    slot_temperature: float,
    products: torch.dtype,
    shards: Shards,
) -> Reading:
    """Compare all queries with all slots; row: [N, P], of each positive in this process's slots, outside where it is not."""
    softmax = RunningSoftmax(queries / temperature, products)
    others = RunningSoftmax(queries / slot_temperature, products) if slot_temperature != temperature else None
    if kernels := fused.of_parts(slots.weight, products):
        found = _read_at_once(kernels, softmax, others, slots, row)
    else:
        found = _read_in_blocks(softmax, others, temperature / slot_temperature, slots, row)
    softmax.combine(shards)
    if others is not None:
        others.combine(shards)
    is_local = (row >= 0) & (row < len(slots.weight))
    return Reading(shards.sum(torch.where(is_local, found, 0)), softmax, others or softmax)


def _read_at_once(
    kernels: ModuleType, softmax: RunningSoftmax, others: RunningSoftmax | None, slots: Slots, row: Tensor
) -> Tensor:
    """Take all slots into the softmax of the encoder, and into that of the slots if it is another one, by kernels.

    Returns each positive's logit, where it is in this process.
    """
    softmax.largest, softmax.total, softmax.slot_sum = kernels.softmax(softmax.queries, *slots)
    if others is not None:
        others.largest, others.total, _ = kernels.softmax(others.queries, *slots, with_mean=False)
    held = row.clamp(0, len(slots.weight) - 1)
    found: Tensor = kernels.logits(softmax.queries, slots.weight.detach()[held], slots.inverse_length[held])
    return found


def _read_in_blocks(
    softmax: RunningSoftmax, others: RunningSoftmax | None, to_others: float, slots: Slots, row: Tensor
) -> Tensor:
    """The same block by block. to_others: by what the encoder's logits become those of the slots."""
    positive_logits = softmax.queries.new_zeros(row.shape)
    for block in slots.blocks(len(row)):
        unit_rows = slots.unit_rows(block)
        logits = compare(softmax.queries, unit_rows, softmax.products)
        is_in_block = (row >= block.start) & (row < block.stop)
        found = logits.gather(1, (row - block.start).clamp_(0, len(unit_rows) - 1))
        positive_logits += torch.where(is_in_block, found, 0)
        if others is not None:
            others.add(logits * to_others, None)
        softmax.add(logits, unit_rows)
        del logits, unit_rows  # else they are there beside the next block's
    return positive_logits
