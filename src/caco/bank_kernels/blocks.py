"""How the kernels of the bank divide their work, and how they load rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from caco.own_kernels import has_room

LOG2_E = tl.constexpr(1.4426950408889634)
"""GPUs have 2ˣ only."""


class Blocks(NamedTuple):
    """How a kernel divides its work."""

    width: int
    """Of a row, zeros added: a power of two that tensor cores take."""
    queries: int
    slots: int
    warps: int
    loads_ahead: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.loads_ahead}


def blocks_of(choices: Mapping[int, Sequence[tuple[int, int, int, int]]], weight: Tensor) -> Blocks:
    """Return the blocks of a kernel for slots [K, D]."""
    width = max(16, triton.next_power_of_2(weight.shape[1]))
    of_width = choices[min(most for most in choices if most >= width)]
    return Blocks(width, *of_width[0 if has_room(weight.device) else -1])


def divide(queries: int, slots: int, blocks: Blocks, device: torch.device) -> tuple[tuple[int, int], int]:
    """Return the grid, of blocks of queries and parts of the slots, two programs for each processor, and a part's slots."""
    processors = _processors(device).multi_processor_count if device.type == "cuda" else 2
    query_blocks = triton.cdiv(queries, blocks.queries)
    parts = max(2 * processors // query_blocks, 1)
    of_part = triton.cdiv(triton.cdiv(slots, parts), blocks.slots) * blocks.slots
    return (query_blocks, triton.cdiv(slots, of_part)), of_part


def _processors(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


@triton.jit
def load_rows(pointer, rows, count, width, WIDTH: tl.constexpr):
    """Load rows of a matrix, zeros beyond its ends."""
    column = tl.arange(0, WIDTH)
    place = rows.to(tl.int64)[:, None] * width + column[None, :]
    return tl.load(pointer + place, mask=(rows[:, None] < count) & (column[None, :] < width), other=0.0)
