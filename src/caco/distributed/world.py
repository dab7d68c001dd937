"""The processes of a run, and what they exchange. One process needs no process group: every exchange is the identity."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from caco.distributed.meeting import Meeting

T = TypeVar("T")

PIECE = 2**26
"""Bytes that go from process to process at a time."""


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    device: torch.device
    rank: int = 0
    size: int = 1
    attempt: int = 0
    """How often torchrun or SLURM had started this run before."""
    local_rank: int = 0
    """This process among those of its machine."""
    local_size: int = 1
    """Processes of this run on this machine: they share its main memory."""
    sharing_cores: int = 1
    """Processes of this run that may use the same cores as this one."""
    meeting: Meeting | None = None
    """Where several processes wait for each other."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and talks."""
        return self.rank == 0

    def worker_count(self, workers: int | str) -> int:
        """Return the number of threads for "auto" (one per core, divided among the processes that share them) or a number."""
        return max(len(own_cores()) // self.sharing_cores if workers == "auto" else int(workers), 1)

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows [B, …] of all processes, in rank order: [size·B, …]. B must be the same everywhere."""
        if self.size == 1:
            return rows
        gathered = rows.new_empty(self.size * len(rows), *rows.shape[1:])
        dist.all_gather(list(gathered.chunk(self.size)), rows.contiguous())
        return gathered

    def sum(self, values: Tensor) -> Tensor:
        """Return the elementwise sum over all processes."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def maximum(self, values: Tensor) -> Tensor:
        """Return the elementwise maximum over all processes."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def vote(self, *flags: bool) -> tuple[bool, ...]:
        """Return, for each flag, whether it is set in any process. Waits for all of them."""
        if self.size == 1:
            return flags
        return tuple(self.maximum(torch.tensor(flags, dtype=torch.int32, device=self.device)).bool().tolist())

    def part(self, items: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Return this process's contiguous part of the items: all parts together are each item once, in order."""
        return np.array_split(np.asarray(items), self.size)[self.rank]

    def gather_objects(self, item: Any) -> list[Any]:
        """Return what every process gave, in rank order. For small things: lists of names, numbers."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def gather_parts(self, rows: Tensor) -> Tensor:
        """Return the rows [n, …] of all processes, in rank order, where n may differ between them."""
        if self.size == 1:
            return rows
        counts = self.gather_objects(len(rows))
        if not any(counts):
            return rows
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = self.gather(padded.to(self.device)).to(rows.device).split(max(counts))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def decide_in_main(self, make: Callable[[], T], for_others: Callable[[T], T] = lambda made: made) -> T:
        """Return what `make` returns in the main process; only there it is called, and may take as long as it likes.

        for_others: what the other processes get instead.
        """
        if self.size == 1:
            return make()
        made = make() if self.is_main else None
        self.wait()
        content = self._from_main(pickle.dumps(for_others(made)) if self.is_main else b"")  # type: ignore[arg-type]
        return made if self.is_main else pickle.loads(content)  # type: ignore[return-value]

    def _from_main(self, content: bytes) -> bytearray:
        """Return the main process's content; a piece at a time is on the device, which may not hold it all."""
        length = torch.tensor(len(content), device=self.device)
        dist.broadcast(length, src=0)
        gathered = bytearray(content or int(length))
        for begin in range(0, len(gathered), PIECE):
            piece = torch.frombuffer(gathered, dtype=torch.uint8, offset=begin, count=min(PIECE, len(gathered) - begin))
            on_device = piece.to(self.device)
            dist.broadcast(on_device, src=0)
            piece.copy_(on_device)
        return gathered

    def wait(self) -> None:
        """Wait until every process is here, without a deadline."""
        if self.size > 1:
            assert self.meeting is not None
            self.meeting.wait()

    def _reduced(self, values: Tensor, operation: Any) -> Tensor:
        if self.size == 1:
            return values
        result = values.clone()
        dist.all_reduce(result, operation)
        return result


def own_cores() -> tuple[int, ...]:
    """Return the numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))
