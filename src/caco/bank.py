"""The bank: K learnable embeddings, which the encoder is trained against and which move by a gradient of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from caco.loss import BankLoss, Pull, encoder_loss, slot_term
from caco.slots import Alone, Holders, LogSumExp, Slots, compare, unit_scale


class Bank(nn.Module):
    """K learnable embeddings of width D.

    `weight: [K, D]` is an ordinary parameter: `torch.optim.SGD(momentum=…)` on it is the published bank step, its
    state_dict holds the velocity, and data-parallel averaging of its gradient is the published all-reduce.
    Slots start as N(0, 1) (published `CaCo_PN`).
    """

    holders: Holders = Alone()

    def __init__(self, size: int, width: int, temperature: float = 0.08, slot_temperature: float = 0.08) -> None:
        super().__init__()
        self.size = size
        self.temperature = temperature
        self.slot_temperature = slot_temperature
        self.weight = nn.Parameter(self.own_random_rows(width))

    def slots(self) -> Slots:
        """Return the bank for one step: its rows are measured once, however often they are used."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return Slots(self.weight, unit_scale(self.weight))

    def own_random_rows(self, width: int) -> Float[Tensor, "K D"]:
        """Return the rows a new bank starts with, N(0, 1)."""
        return torch.cat(list(random_rows(self.size, width)))

    def own(self, rows: Tensor) -> Tensor:
        """Return the rows [K, …] that this process keeps: all of them (a sharded bank keeps a part)."""
        return rows

    def whole(self, rows: Tensor) -> Tensor:
        """Return the rows [K, …] of which this process keeps `rows`: the inverse of `own`."""
        return rows

    def log_sum_exp(self, queries: Float[Tensor, "N D"], slots: Slots, temperature: float) -> Float[Tensor, " N"]:
        """Return log Σ exp(cosine/temperature) over all slots for each query, with its gradient for the queries."""
        result: Tensor = LogSumExp.apply(queries.to(slots.weight.dtype), slots, temperature, self.holders)
        return result

    @torch.no_grad()
    def nearest(self, keys: Float[Tensor, "N D"], slots: Slots) -> Int[Tensor, " N"]:
        """Return the index of the slot nearest to each key: the positive of the other view's query.

        Always in full precision: in bfloat16 over 1 % of the choices differ, which costs 20 % of the gradient. Of equally
        near slots the first.
        """
        with torch.autocast(keys.device.type, enabled=False):
            keys = self.holders.gather(keys.to(slots.weight.dtype))
            best = keys.new_full((len(keys),), -torch.inf)
            place = torch.zeros_like(best, dtype=torch.int64)
            for block in slots.blocks(len(keys)):
                cosine, column = compare(keys, slots.unit_rows(block), keys.dtype).max(dim=1)
                place = torch.where(cosine > best, column + block.start, place)
                best = torch.maximum(best, cosine)
            return self.holders.own(self._nearest_of_all(best, place))

    def _nearest_of_all(self, cosine: Tensor, place: Tensor) -> Tensor:
        """Return the place [N] of the largest cosine [N] that any holder of slots has found."""
        return place

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
        return encoder_loss(queries, slots, positives, weights, self.temperature, self.slot_temperature, self.holders)

    def slot_term(self, slots: Slots, pulls: Sequence[Pull]) -> Tensor:
        """Return 0, whose backward gives the slots the cooperative-adversarial gradient of all these queries."""
        return slot_term(slots, pulls, self.slot_temperature, self.holders)

    @torch.no_grad()
    def fill(self, keys: Float[Tensor, "N D"], batch: int) -> None:
        """Write the keys of the warm start's batch number `batch` (from 0) into the next slots.

        Batches fill the bank in order; what does not fit at its end is left out, and the next batch begins at slot 0.
        """
        batches = -(-self.size // len(keys))
        first = batch % batches * len(keys)
        self._store(keys[: self.size - first].to(self.weight.dtype), first)

    def _store(self, rows: Tensor, first: int) -> None:
        self.weight[first : first + len(rows)] = rows


def random_rows(size: int, width: int, block: int = 65536) -> Iterator[Tensor]:
    """Yield the rows of a random bank in blocks: one that keeps a part draws the same numbers as one that keeps all."""
    for first in range(0, size, block):
        yield torch.randn(min(block, size - first), width)
