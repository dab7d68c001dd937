"""The search for the slots nearest to keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from caco.bank_kernels.blocks import blocks_of, divide, load_rows

BLOCKS = {64: ((128, 64, 8, 3),), 128: ((128, 64, 8, 2),)}
"""By the width of a row, at most: `Blocks` but for that (`benchmarks/bank_kernels.py`); for GPUs that have room: on others
cuBLAS is as fast."""
PRECISION = "tf32x3"
"""How exact products are made: three of TensorFloat-32 on the tensor cores, of the factors' upper and lower halves."""


def nearest(
    keys: Float[Tensor, "N D"], weight: Float[Tensor, "K D"], inverse_length: Float[Tensor, "K 1"]
) -> tuple[Float[Tensor, " N"], Int[Tensor, " N"]]:
    """Return the cosine of the slot nearest to each key, and its index; exact to float32."""
    blocks = blocks_of(BLOCKS, weight)
    grid, of_part = divide(len(keys), len(weight), blocks, weight.device)
    cosines, places = keys.new_empty(grid[1], len(keys)), keys.new_empty(grid[1], len(keys), dtype=torch.int32)
    _nearest[grid](
        *(keys, weight, inverse_length, cosines, places, len(keys), *weight.shape, of_part),
        *blocks[:3],
        PRECISION,
        **blocks.options,
    )
    largest, part = cosines.max(dim=0)
    return largest, places.gather(0, part[None])[0].long()


@triton.jit
def _nearest(
    keys,
    weight,
    inverse_length,
    cosines,
    places,
    key_count,
    slot_count,
    width,
    of_part,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block of keys and a part of the slots: the largest cosine of each key there, and where."""
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    first = tl.program_id(1) * of_part
    last = tl.minimum(first + of_part, slot_count)
    block = load_rows(keys, key, key_count, width, WIDTH)
    best = tl.full([KEYS], float("-inf"), tl.float32)
    place = tl.zeros([KEYS], tl.int32)
    for start in range(first, last, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        rows = load_rows(weight, slot, last, width, WIDTH)
        inverse = tl.load(inverse_length + slot, mask=slot < last, other=0.0)
        cosine = tl.dot(block, tl.trans(rows), input_precision=PRECISION) * inverse[None, :]
        cosine = tl.where(slot[None, :] < last, cosine, float("-inf"))
        largest, column = tl.max(cosine, axis=1, return_indices=True)
        place = tl.where(largest > best, start + column, place)
        best = tl.maximum(largest, best)
    out = tl.program_id(1) * key_count + key
    tl.store(cosines + out, best, mask=key < key_count)
    tl.store(places + out, place, mask=key < key_count)
