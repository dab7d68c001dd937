"""The bank: K learnable embeddings, which the encoder is trained against and which move by a gradient of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from caco import fused
from caco.loss import BankLoss, Pull, encoder_loss, slot_term
from caco.slots import LogSumExp, Shards, Slots, Unsharded, compare, inverse_lengths

_DRAWN_AT_ONCE = 65536
"""Rows of a new bank that are drawn at a time."""


class Bank(nn.Module):
    """K learnable embeddings of width D.

    `weight: [K, D]` is an ordinary parameter: `torch.optim.SGD(momentum=…)` on it is the published bank step, its
    state_dict holds the velocity, and data-parallel averaging of its gradient is the published all-reduce.
    Slots start as N(0, 1) (published `CaCo_PN`).

    shards: N processes may hold K/N slots each (`distributed/bank_shards.py`). Indices of slots are those of the whole bank
    then, results are the same to rounding, and the gradient is complete: no averaging over processes follows.
    Raises ValueError when K is not divisible by N.
    """

    def __init__(
        self,
        size: int,
        width: int,
        temperature: float = 0.08,
        slot_temperature: float = 0.08,
        shards: Shards | None = None,
    ) -> None:
        super().__init__()
        self.shards = shards or Unsharded()
        if size % self.shards.size:
            raise ValueError(f"{size} slots cannot be divided among {self.shards.size} processes")
        self.size = size
        self.temperature = temperature
        self.slot_temperature = slot_temperature
        held = size // self.shards.size
        self.held = range(self.shards.rank * held, (self.shards.rank + 1) * held)  # the slots in this process
        self.weight = nn.Parameter(self._initial_rows(width))

    def _initial_rows(self, width: int) -> Float[Tensor, "k D"]:
        """Return this process's rows of a new bank. Every process draws them all, so that each gets what it would alone."""
        parts = []
        for first in range(0, self.size, _DRAWN_AT_ONCE):
            rows = torch.randn(min(_DRAWN_AT_ONCE, self.size - first), width)
            parts.append(rows[_overlap(self.held, first, len(rows))].clone())
        return torch.cat(parts)

    def slots(self) -> Slots:
        """Return the bank for one step: its rows are measured once, however often they are used."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return Slots(self.weight, inverse_lengths(self.weight))

    def local_rows(self, rows: Tensor) -> Tensor:
        """Return those of the bank's rows [K, …] that this process holds."""
        return rows[self.held.start : self.held.stop]

    def rows_from_main(self, rows: Tensor) -> Tensor:
        """Return those of the bank's rows [K, …] that this process holds; the main process has all, the others need none."""
        return self.shards.divide_from_main(rows)

    def all_rows(self, rows: Tensor) -> Tensor:
        """Return all rows [K, …] in the main process, of which this one holds `rows`; none in the other processes."""
        return self.shards.gather_in_main(rows)

    def log_sum_exp(self, queries: Float[Tensor, "N D"], slots: Slots, temperature: float) -> Float[Tensor, " N"]:
        """Return log Σ exp(cosine/temperature) over all slots for each query, with its gradient for the queries."""
        result: Tensor = LogSumExp.apply(queries.to(slots.weight.dtype), slots, temperature, self.shards)
        return result

    @torch.no_grad()
    def nearest(self, keys: Float[Tensor, "N D"], slots: Slots) -> Int[Tensor, " N"]:
        """Return the index of the slot nearest to each key: the positive of the other view's query.

        Always in full precision: in bfloat16 over 1 % of the choices differ, which costs 20 % of the gradient. Of equally
        near slots the first.
        """
        with torch.autocast(keys.device.type, enabled=False):
            keys = self.shards.gather(keys.to(slots.weight.dtype))
            index: Tensor
            if kernels := fused.of_search(slots.weight):
                largest, index = kernels.nearest(keys, *slots)
            else:
                largest = keys.new_full((len(keys),), -torch.inf)
                index = torch.zeros_like(largest, dtype=torch.int64)
                for block in slots.blocks(len(keys)):
                    cosine, column = compare(keys, slots.unit_rows(block), keys.dtype).max(dim=1)
                    index = torch.where(cosine > largest, column + block.start, index)
                    largest = torch.maximum(largest, cosine)
            if self.shards.size == 1:
                return index
            index = index + self.held.start
            # The best of the processes' best.
            largest, index = self.shards.gather(largest[None]), self.shards.gather(index[None])
            index = index.gather(0, largest.argmax(dim=0, keepdim=True))[0]
            return self.shards.local_queries(index)

    def loss(
        self,
        queries: Float[Tensor, "N D"],
        slots: Slots,
        positives: Int[Tensor, "N P"],
        weights: Float[Tensor, "N P"],
    ) -> BankLoss:
        """Return the loss at this bank's temperatures, with its gradient for the queries alone.

        The slots' gradient comes from `slot_term`, for all queries of a step together: it is as large as the bank.
        """
        return encoder_loss(queries, slots, positives, weights, self.temperature, self.slot_temperature, self.shards)

    def slot_term(self, slots: Slots, pulls: Sequence[Pull]) -> Tensor:
        """Return 0, whose backward gives the slots the cooperative-adversarial gradient of all these queries."""
        return slot_term(slots, pulls, self.slot_temperature, self.shards)

    @torch.no_grad()
    def fill(self, keys: Float[Tensor, "N D"], batch: int) -> None:
        """Write the keys of the warm start's batch number `batch` (from 0) into the next slots.

        Batches fill the bank in order; what does not fit at its end is left out, and the next batch begins at slot 0.
        """
        batches = -(-self.size // len(keys))
        first = batch % batches * len(keys)
        rows = keys[: self.size - first].to(self.weight.dtype)
        here = _overlap(self.held, first, len(rows))
        begin = max(first - self.held.start, 0)
        self.weight[begin : begin + len(rows[here])] = rows[here]


def _overlap(held: range, first: int, count: int) -> slice:
    """Return which of `count` rows, of which the first belongs to slot `first`, belong to slots in `held`."""
    start = min(max(held.start - first, 0), count)
    return slice(start, max(min(held.stop - first, count), start))
