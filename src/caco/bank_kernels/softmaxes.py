"""The softmax of queries over all slots."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from caco.bank_kernels.blocks import LOG2_E, blocks_of, divide, load_rows

BLOCKS = {
    64: ((128, 128, 8, 3), (64, 64, 4, 2)),
    128: ((64, 128, 4, 2), (64, 32, 4, 2)),
    256: ((128, 64, 8, 2), (32, 32, 4, 2)),
}
"""By the width of a row, at most: `Blocks` but for that (`benchmarks/bank_kernels.py`). The first are for GPUs that have room, the
second for others."""


class SoftmaxOfParts(NamedTuple):
    """The softmax of N queries over each of some parts of the slots."""

    largest: Float[Tensor, "parts N"]
    """Largest logit m."""
    total: Float[Tensor, "parts N"]
    """Σ exp(logit − m) over the part."""
    slot_sum: Float[Tensor, "parts N D"]
    """Σ exp(logit − m) · unit slot; of one part and never written where none is wanted."""


def softmax_of_parts(
    queries: Float[Tensor, "N D"], weight: Float[Tensor, "K D"], inverse_length: Float[Tensor, "K 1"], with_mean: bool
) -> SoftmaxOfParts:
    """Return the softmax of queries over the temperature, rounded to what the factors of products are to be rounded to."""
    blocks = blocks_of(BLOCKS, weight)
    grid, of_part = divide(len(queries), len(weight), blocks, weight.device)
    largest, total = weight.new_empty(2, grid[1], len(queries)).unbind()
    slot_sum = weight.new_empty(grid[1] if with_mean else 1, *queries.shape)
    _softmax[grid](
        *(queries, weight, inverse_length, largest, total, slot_sum, len(queries), *weight.shape, of_part),
        *blocks[:3],
        with_mean,
        **blocks.options,
    )
    return SoftmaxOfParts(largest, total, slot_sum)


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
    parts = softmax_of_parts(queries.to(factors), weight, inverse_length, with_mean)
    of_all = parts.largest.amax(dim=0)
    shares = (parts.largest - of_all).exp_()
    total = (parts.total * shares).sum(dim=0)
    mean = torch.einsum("pn,pnd->nd", shares, parts.slot_sum) if with_mean else torch.zeros_like(queries)
    return of_all[:, None], total[:, None], mean


def logits(
    queries: Float[Tensor, "N D"],
    rows: Float[Tensor, "N P D"],
    inverse_length: Float[Tensor, "N P 1"],
    factors: torch.dtype = torch.bfloat16,
) -> Float[Tensor, "N P"]:
    """Return the logits of some slots for each query, of factors rounded as in `softmax`."""
    products = queries.to(factors).float()[:, None] * rows.to(factors).float()
    return products.sum(dim=2) * inverse_length[:, :, 0]


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
    block = load_rows(queries, query, query_count, width, WIDTH)
    largest = tl.full([QUERIES], float("-inf"), tl.float32)  # of logits in units of log 2
    total = tl.zeros([QUERIES], tl.float32)
    slot_sum = tl.zeros([QUERIES, WIDTH], tl.float32)
    for start in range(first, last, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        rows = load_rows(weight, slot, last, width, WIDTH).to(block.dtype)
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
