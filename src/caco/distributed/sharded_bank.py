"""A bank of which each process keeps its share of the slots: K/N rows, their gradient and their velocity.

Queries and keys are gathered; softmax and arg-max are brought together over the processes. What is exchanged in a step
does not depend on K, so a bank of millions of slots grows with the number of machines.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from caco.bank import Bank, random_rows
from caco.distributed.world import World


class Shards:
    """All processes of a world, each holding its share of the slots (`caco.slots.Holders`)."""

    def __init__(self, world: World, first: int) -> None:
        self.size, self.first, self.rank = world.size, first, world.rank
        self.gather, self.sum, self.maximum = world.gather, world.sum, world.maximum

    def own(self, rows: Tensor) -> Tensor:
        """Return this process's part of gathered rows."""
        count = len(rows) // self.size
        return rows[self.rank * count : (self.rank + 1) * count]


class ShardedBank(Bank):
    """Slots rank·K/N … (rank + 1)·K/N − 1 of a bank; everything else as `Bank`, to rounding.

    Indices of slots are those of the whole bank. Its gradient is complete: no averaging over processes follows.
    """

    def __init__(
        self, size: int, width: int, temperature: float = 0.08, slot_temperature: float = 0.08, *, world: World
    ) -> None:
        if size % world.size:
            raise ValueError(f"{size} slots cannot be divided among {world.size} processes")
        self.world, self.share = world, size // world.size
        self.first = world.rank * self.share
        self.holders = Shards(world, self.first)
        super().__init__(size, width, temperature, slot_temperature)

    def own_random_rows(self, width: int) -> Float[Tensor, "k D"]:
        parts, begin = [], 0
        for block in random_rows(self.size, width):
            low, high = max(self.first - begin, 0), max(self.first + self.share - begin, 0)
            parts.append(block[low:high].clone())
            begin += len(block)
        return torch.cat(parts)

    def own(self, rows: Tensor) -> Tensor:
        return rows[self.first : self.first + self.share]

    def whole(self, rows: Tensor) -> Tensor:
        """Return all rows in the main process; in others an empty tensor (only the main one writes checkpoints)."""
        if self.world.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.world.size)] if self.world.is_main else None
        dist.gather(rows.contiguous(), parts, dst=0)
        return torch.cat(parts) if parts is not None else rows.new_empty(0, *rows.shape[1:])

    def _nearest_of_all(self, cosine: Tensor, place: Tensor) -> Tensor:
        all_cosines = self.world.gather(cosine[None])
        all_places = self.world.gather(place[None] + self.first)
        return all_places.gather(0, all_cosines.argmax(dim=0, keepdim=True))[0]

    def _store(self, rows: Tensor, first: int) -> None:
        low, high = max(first, self.first), min(first + len(rows), self.first + self.share)
        if low < high:
            self.weight[low - self.first : high - self.first] = rows[low - first : high - first]
