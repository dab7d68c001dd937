"""A bank of which each process holds a part: K/N slots, their gradient and their velocity.

Queries and keys are gathered; softmax and arg-max are brought together over the processes (`bank.py`, `slots.py`). What
is exchanged in a step does not depend on K, so a bank of millions of slots grows with the number of machines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from caco.distributed.world import World


class ProcessShards:
    """All processes of a world hold an equal part of the slots each (`caco.slots.Shards`)."""

    def __init__(self, world: World) -> None:
        self.size, self.rank, self.device = world.size, world.rank, world.device
        self.gather, self.sum, self.maximum = world.gather, world.sum, world.maximum

    def local_queries(self, rows: Tensor) -> Tensor:
        """Return this process's part of gathered rows."""
        count = len(rows) // self.size
        return rows[self.rank * count : (self.rank + 1) * count]

    def gather_in_main(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes in the main one, none in the others (only the main one writes checkpoints).

        They come into main memory, a part at a time: the main one's device may not hold the whole bank.
        """
        if self.size == 1:
            return rows
        if self.rank > 0:
            _exchange(dist.isend, rows.contiguous(), 0)
            return rows.new_empty(0, *rows.shape[1:])
        gathered = torch.empty(self.size, *rows.shape, dtype=rows.dtype)
        gathered[0] = rows
        part = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for rank in range(1, self.size):
            _exchange(dist.irecv, part, rank)
            gathered[rank] = part
        return gathered.flatten(0, 1)

    def divide_from_main(self, rows: Tensor) -> Tensor:
        """Return this process's part of the rows [K, …] that the main one has; the others give none, [0, …], of the same type.

        They go a part at a time, as they came.
        """
        count = torch.tensor(len(rows) // self.size, device=self.device)
        dist.broadcast(count, src=0)
        if self.rank > 0:
            part = rows.new_empty(int(count), *rows.shape[1:], device=self.device)
            _exchange(dist.irecv, part, 0)
            return part
        for rank in range(1, self.size):
            _exchange(dist.isend, rows[rank * int(count) : (rank + 1) * int(count)].contiguous().to(self.device), rank)
        return rows[: int(count)]


def _exchange(operation: Callable[..., Any], rows: Tensor, peer: int) -> None:
    """Send rows to one process, or receive them. (NCCL warns of what is not called a batch.)"""
    for work in dist.batch_isend_irecv([dist.P2POp(operation, rows, peer)]):
        work.wait()
