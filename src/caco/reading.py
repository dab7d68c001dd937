"""One reading of the bank: what queries find in it, block by block, or at once by kernels."""

from __future__ import annotations

from collections.abc import Sequence
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
    positive_slot_logits: Tensor
    """[N, P]: the same / that of the slots."""
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
    temperatures = (temperature,) if slot_temperature == temperature else (temperature, slot_temperature)
    softmaxes = [RunningSoftmax(queries / each, products) for each in temperatures]
    if kernels := fused.of_parts(slots.weight, products):
        found = _read_at_once(kernels, softmaxes, slots, row)
    else:
        found = _read_in_blocks(softmaxes, temperature / slot_temperature, slots, row)
    for softmax in softmaxes:
        softmax.combine(shards)
    is_local = (row >= 0) & (row < len(slots.weight))
    logits = [shards.sum(torch.where(is_local, each, 0)) for each in found]
    return Reading(logits[0], logits[-1], softmaxes[0], softmaxes[-1])


def _read_at_once(kernels: ModuleType, softmaxes: Sequence[RunningSoftmax], slots: Slots, row: Tensor) -> list[Tensor]:
    """Take all slots into the softmax of the encoder, and into that of the slots if it is another one, by kernels.

    Returns each positive's logit in each of them, where it is in this process: of factors rounded as those of the softmax, lest
    a probability be above 1.
    """
    held = row.clamp(0, len(slots.weight) - 1)
    rows, inverse_length = slots.weight.detach()[held], slots.inverse_length[held]
    for number, softmax in enumerate(softmaxes):
        softmax.largest, softmax.total, softmax.slot_sum = kernels.softmax(
            softmax.queries, *slots, with_mean=number == 0
        )
    return [kernels.logits(softmax.queries, rows, inverse_length) for softmax in softmaxes]


def _read_in_blocks(softmaxes: Sequence[RunningSoftmax], to_others: float, slots: Slots, row: Tensor) -> list[Tensor]:
    """The same block by block. to_others: by what the encoder's logits become those of the slots."""
    softmax, *others = softmaxes
    positive_logits = softmax.queries.new_zeros(row.shape)
    for block in slots.blocks(len(row)):
        unit_rows = slots.unit_rows(block)
        logits = compare(softmax.queries, unit_rows, softmax.products)
        is_in_block = (row >= block.start) & (row < block.stop)
        found = logits.gather(1, (row - block.start).clamp_(0, len(unit_rows) - 1))
        positive_logits += torch.where(is_in_block, found, 0)
        for other in others:
            other.add(logits * to_others, None)
        softmax.add(logits, unit_rows)
        del logits, unit_rows  # else they are there beside the next block's
    return [positive_logits, *(positive_logits * to_others for _ in others)]
