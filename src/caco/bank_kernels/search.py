"""The search for the slots nearest to keys: products in half precision tell where to look, exact ones decide there."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from caco.bank_kernels.blocks import blocks_of, divide, load_rows

ROUGH = {
    64: ((128, 64, 8, 3), (64, 64, 4, 2)),
    128: ((128, 64, 8, 3), (64, 32, 4, 2)),
    256: ((128, 64, 8, 3), (32, 32, 4, 2)),
}
EXACT = {
    64: ((64, 64, 4, 2), (32, 32, 4, 2)),
    128: ((64, 32, 4, 2), (32, 32, 4, 2)),
    256: ((64, 32, 4, 1), (32, 32, 4, 1)),
}
"""Each by the width of a row, at most: `Blocks` but for that (`benchmarks/bank_kernels.py`). The first are for GPUs that have
room, the second for others."""
MOST_GROUPS = 2048
"""Of slots: of each group the largest rough cosine of every key is kept, so that memory does not grow with the bank."""
LEAST_GROUP = 64
"""Slots in a group: a multiple of those in all blocks."""
ROUNDING = 1.1 * 2**-10
"""Most by which a cosine of unit rows in half precision differs from the exact one: both factors are rounded by up to 2⁻¹¹ of
their size, and by the inequality of Cauchy and Schwarz that is all; a tenth for the sums."""
PRECISION = "tf32x3"
"""How exact products are made: three of TensorFloat-32 on the tensor cores, of the factors' upper and lower halves."""


def nearest(
    keys: Float[Tensor, "N D"], weight: Float[Tensor, "K D"], inverse_length: Float[Tensor, "K 1"]
) -> tuple[Float[Tensor, " N"], Int[Tensor, " N"]]:
    """Return the cosine of the slot nearest to each key, a unit row, and its index; exact to float32.

    No slot is missed: where a group's largest rough cosine is less than the key's largest one by more than `ROUNDING` for each
    of the two, none of the group can be the nearest. Mostly one group is left, or two.
    """
    count, size = len(keys), len(weight)
    of_group = triton.cdiv(triton.cdiv(size, MOST_GROUPS), LEAST_GROUP) * LEAST_GROUP
    blocks = blocks_of(ROUGH, weight)
    grid, of_part = divide(count, size, blocks._replace(slots=of_group), weight.device)
    rough = keys.new_empty(triton.cdiv(size, of_group), count)
    _rough[grid](
        *(keys.to(torch.float16), weight, inverse_length, rough, count, *weight.shape, of_part, of_group),
        *blocks[:3],
        **blocks.options,
    )
    blocks = blocks_of(EXACT, weight)
    grid, of_part = divide(count, size, blocks._replace(slots=of_group), weight.device)
    cosines, places = keys.new_empty(grid[1], count), keys.new_empty(grid[1], count, dtype=torch.int32)
    least = rough.amax(dim=0).sub_(2 * ROUNDING)
    _exact[grid](
        *(keys, weight, inverse_length, rough, least, cosines, places, count, *weight.shape, of_part, of_group),
        *blocks[:3],
        PRECISION,
        **blocks.options,
    )
    largest, part = cosines.max(dim=0)
    return largest, places.gather(0, part[None])[0].long()


@triton.jit
def _rough(
    keys,
    weight,
    inverse_length,
    rough,
    key_count,
    slot_count,
    width,
    of_part,
    of_group,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """A block of keys and a part of the slots: the largest rough cosine of each key in each of its groups."""
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    first = tl.program_id(1) * of_part
    last = tl.minimum(first + of_part, slot_count)
    block = load_rows(keys, key, key_count, width, WIDTH)
    largest = tl.full([KEYS], float("-inf"), tl.float32)
    for start in range(first, last, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        inverse = tl.load(inverse_length + slot, mask=slot < last, other=0.0)
        rows = (load_rows(weight, slot, last, width, WIDTH) * inverse[:, None]).to(block.dtype)
        cosine = tl.where(slot[None, :] < last, tl.dot(block, tl.trans(rows)), float("-inf"))
        largest = tl.maximum(tl.where(start % of_group == 0, float("-inf"), largest), tl.max(cosine, axis=1))
        # Written after each block: what the last one of a group writes is of all of it.
        place = (start // of_group).to(tl.int64) * key_count + key
        tl.store(rough + place, largest, mask=key < key_count)


@triton.jit
def _exact(
    keys,
    weight,
    inverse_length,
    rough,
    least,
    cosines,
    places,
    key_count,
    slot_count,
    width,
    of_part,
    of_group,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block of keys and a part of the slots: the largest cosine of each key there, and where, of equal ones the first.

    Groups are left out in which no key of the block has as much as the `least` rough cosine that it looks at.
    """
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    first = tl.program_id(1) * of_part
    last = tl.minimum(first + of_part, slot_count)
    block = load_rows(keys, key, key_count, width, WIDTH)
    enough = tl.load(least + key, mask=key < key_count, other=float("inf"))
    best = tl.full([KEYS], float("-inf"), tl.float32)
    place = tl.zeros([KEYS], tl.int32)
    for group in range(first, last, of_group):
        row = (group // of_group).to(tl.int64) * key_count
        promised = tl.load(rough + row + key, mask=key < key_count, other=float("-inf"))
        looks = tl.max((promised >= enough).to(tl.int32), axis=0)
        for start in range(group, tl.where(looks > 0, tl.minimum(group + of_group, last), group), SLOTS):
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
