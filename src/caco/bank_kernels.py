"""The bank on an NVIDIA GPU: three kernels, each of which reads all slots once and writes no matrix of queries and slots.

Written in Triton, which torch brings along on Linux. A program takes a block of queries and a part of the slots (or the
other way round), and what it needs of their product stays on the chip. Beside them `slots.py` has the same in plain torch,
which is the oracle of the tests and what other devices compute. All tensors are contiguous and on one device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from caco.own_kernels import has_room

LOG2_E = tl.constexpr(1.4426950408889634)
"""GPUs have 2ˣ only."""


def nearest(
    keys: Float[Tensor, "N D"], weight: Float[Tensor, "K D"], inverse_length: Float[Tensor, "K 1"]
) -> tuple[Float[Tensor, " N"], Int[Tensor, " N"]]:
    """Return the cosine of the slot nearest to each key, and its index; exact to float32.

    Each product of two float32 is three of TensorFloat-32 on the tensor cores, of the factors' upper and lower halves.
    """
    blocks = _blocks(_NEAREST, weight)
    grid, of_part = _division(len(keys), len(weight), blocks, weight.device)
    cosines, places = keys.new_empty(grid[1], len(keys)), keys.new_empty(grid[1], len(keys), dtype=torch.int32)
    _nearest[grid](
        *(keys, weight, inverse_length, cosines, places, len(keys), *weight.shape, of_part),
        *blocks[:3],
        **blocks.options,
    )
    largest, part = cosines.max(dim=0)
    return largest, places.gather(0, part[None])[0].long()


def softmax(
    queries: Float[Tensor, "N D"],
    weight: Float[Tensor, "K D"],
    inverse_length: Float[Tensor, "K 1"],
    with_mean: bool = True,
    factors: torch.dtype = torch.bfloat16,
) -> tuple[Float[Tensor, "N 1"], Float[Tensor, "N 1"], Float[Tensor, "N D"]]:
    """Return each query's largest logit m, Σ exp(logit − m) over all slots, and Σ exp(logit − m) · unit slot.

    queries: over the temperature, so that logits are their products with unit slots. factors: of products are rounded to it;
    the sums are float32. with_mean: else the last is zero.
    """
    blocks = _blocks(_SOFTMAX, weight)
    grid, of_part = _division(len(queries), len(weight), blocks, weight.device)
    largest, total = queries.new_empty(2, grid[1], len(queries)).unbind()
    slot_sum = queries.new_empty(grid[1] if with_mean else 1, *queries.shape)
    _softmax[grid](
        *(queries.to(factors), weight, inverse_length, largest, total, slot_sum, len(queries), *weight.shape, of_part),
        *blocks[:3],
        with_mean,
        **blocks.options,
    )
    of_all = largest.amax(dim=0)
    shares = (largest - of_all).exp_()
    total = (total * shares).sum(dim=0)
    mean = torch.einsum("pn,pnd->nd", shares, slot_sum) if with_mean else torch.zeros_like(queries)
    return of_all[:, None], total[:, None], mean


def pulls_on_slots(
    queries: Float[Tensor, "N D"],
    weight: Float[Tensor, "K D"],
    inverse_length: Float[Tensor, "K 1"],
    log_normaliser: Float[Tensor, "N 1"],
    pulls: Float[Tensor, "N D"],
    factors: torch.dtype = torch.bfloat16,
) -> Float[Tensor, "K D"]:
    """Return Σ exp(query·unit slot − log_normaliser) · pull over the queries for each slot, pushed through its normalisation.

    queries: over the temperature. factors: as in `softmax`.
    """
    blocks, gradient = _blocks(_PULLS, weight), torch.empty_like(weight)
    _pulls[(triton.cdiv(len(weight), blocks.slots),)](
        *(queries.to(factors), weight, inverse_length, log_normaliser, pulls.to(factors), gradient),
        *(len(queries), *weight.shape),
        *blocks[:3],
        **blocks.options,
    )
    return gradient


class _Blocks(NamedTuple):
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


_NEAREST = {64: ((128, 64, 8, 3),), 128: ((128, 64, 8, 2),)}
_SOFTMAX = {
    64: ((128, 128, 8, 3), (64, 64, 4, 2)),
    128: ((64, 64, 4, 3), (64, 32, 4, 2)),
    256: ((128, 64, 8, 2), (32, 32, 4, 2)),
}
_PULLS = {
    64: ((64, 128, 8, 3), (32, 64, 4, 2)),
    128: ((64, 64, 4, 3), (32, 64, 4, 2)),
    256: ((64, 64, 8, 2), (32, 32, 4, 2)),
}
"""By the width of a row, at most; `_Blocks` but for that. The first are for GPUs that have room, measured on an H200; the second
for others, only compiled."""


def _blocks(choices: Mapping[int, Sequence[tuple[int, int, int, int]]], weight: Tensor) -> _Blocks:
    """Return the blocks of a kernel for slots [K, D]."""
    width = max(16, triton.next_power_of_2(weight.shape[1]))
    of_width = choices[min(most for most in choices if most >= width)]
    return _Blocks(width, *of_width[0 if has_room(weight.device) else -1])


def _division(queries: int, slots: int, blocks: _Blocks, device: torch.device) -> tuple[tuple[int, int], int]:
    """Return the grid, of blocks of queries and parts of the slots, two programs for each processor, and a part's slots."""
    processors = _processors(device).multi_processor_count if device.type == "cuda" else 2
    of_queries = triton.cdiv(queries, blocks.queries)
    parts = max(2 * processors // of_queries, 1)
    of_part = triton.cdiv(triton.cdiv(slots, parts), blocks.slots) * blocks.slots
    return (of_queries, triton.cdiv(slots, of_part)), of_part


def _processors(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


@triton.jit
def _block(pointer, rows, count, width, WIDTH: tl.constexpr):
    """Load rows of a matrix, zeros beyond its ends."""
    column = tl.arange(0, WIDTH)
    place = rows.to(tl.int64)[:, None] * width + column[None, :]
    return tl.load(pointer + place, mask=(rows[:, None] < count) & (column[None, :] < width), other=0.0)


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
):
    """A block of keys and a part of the slots: the largest cosine of each key there, and where."""
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    first = tl.program_id(1) * of_part
    last = tl.minimum(first + of_part, slot_count)
    block = _block(keys, key, key_count, width, WIDTH)
    best = tl.full([KEYS], float("-inf"), tl.float32)
    place = tl.zeros([KEYS], tl.int32)
    for start in range(first, last, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        rows = _block(weight, slot, last, width, WIDTH)
        inverse = tl.load(inverse_length + slot, mask=slot < last, other=0.0)
        cosine = tl.dot(block, tl.trans(rows), input_precision="tf32x3") * inverse[None, :]
        cosine = tl.where(slot[None, :] < last, cosine, float("-inf"))
        largest, column = tl.max(cosine, axis=1, return_indices=True)
        place = tl.where(largest > best, start + column, place)
        best = tl.maximum(largest, best)
    out = tl.program_id(1) * key_count + key
    tl.store(cosines + out, best, mask=key < key_count)
    tl.store(places + out, place, mask=key < key_count)


@triton.jit
def _softmax(
    queries,
    weight,
    inverse_length,
    largests,
    totals,
    slot_sums,
    query_count,
    slot_count,
    width,
    of_part,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    SLOTS: tl.constexpr,
    WITH_MEAN: tl.constexpr,
):
    """A block of queries and a part of the slots: the softmax there ("online": by the largest logit so far)."""
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    first = tl.program_id(1) * of_part
    last = tl.minimum(first + of_part, slot_count)
    block = _block(queries, query, query_count, width, WIDTH)
    largest = tl.full([QUERIES], float("-inf"), tl.float32)  # of logits in units of log 2
    total = tl.zeros([QUERIES], tl.float32)
    slot_sum = tl.zeros([QUERIES, WIDTH], tl.float32)
    for start in range(first, last, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        rows = _block(weight, slot, last, width, WIDTH).to(block.dtype)
        inverse = tl.load(inverse_length + slot, mask=slot < last, other=0.0)
        logits = tl.dot(block, tl.trans(rows)) * (inverse * LOG2_E)[None, :]
        logits = tl.where(slot[None, :] < last, logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, axis=1))
        exponentials = tl.exp2(logits - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(exponentials, axis=1)
        if WITH_MEAN:
            slot_sum = tl.dot((exponentials * inverse[None, :]).to(block.dtype), rows, slot_sum * shrink[:, None])
        largest = larger
    out = tl.program_id(1) * query_count + query
    tl.store(largests + out, largest / LOG2_E, mask=query < query_count)
    tl.store(totals + out, total, mask=query < query_count)
    if WITH_MEAN:
        column = tl.arange(0, WIDTH)
        here = (query[:, None] < query_count) & (column[None, :] < width)
        tl.store(slot_sums + out.to(tl.int64)[:, None] * width + column[None, :], slot_sum, mask=here)


@triton.jit
def _pulls(
    queries,
    weight,
    inverse_length,
    log_normalisers,
    pulls,
    gradient,
    query_count,
    slot_count,
    width,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """A block of slots and all queries: what moves the slots, along the sphere."""
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    factors = _block(weight, slot, slot_count, width, WIDTH).to(queries.dtype.element_ty)
    inverse = tl.load(inverse_length + slot, mask=slot < slot_count, other=0.0)
    pulled = tl.zeros([SLOTS, WIDTH], tl.float32)
    for start in range(0, query_count, QUERIES):
        query = start + tl.arange(0, QUERIES)
        block = _block(queries, query, query_count, width, WIDTH)
        pull = _block(pulls, query, query_count, width, WIDTH)
        normaliser = tl.load(log_normalisers + query, mask=query < query_count, other=float("inf"))
        logits = tl.dot(factors, tl.trans(block)) * (inverse * LOG2_E)[:, None]
        probability = tl.exp2(logits - (normaliser * LOG2_E)[None, :])
        pulled = tl.dot(probability.to(pull.dtype), pull, pulled)
    column = tl.arange(0, WIDTH)
    here = (slot[:, None] < slot_count) & (column[None, :] < width)
    place = slot.to(tl.int64)[:, None] * width + column[None, :]
    # Loaded once more, in other words so that the compiler does not keep them in scarce registers all the while.
    unit = tl.load(weight + place, mask=here, other=0.0, eviction_policy="evict_first") * inverse[:, None]
    pulled = (pulled - tl.sum(pulled * unit, axis=1)[:, None] * unit) * inverse[:, None]
    tl.store(gradient + place, pulled, mask=here)
