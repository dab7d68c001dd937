"""What queries do to the slots: to all of them, and to their positives."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from caco.bank_kernels.blocks import LOG2_E, blocks_of, load_rows

BLOCKS = {
    64: ((64, 128, 8, 3), (32, 64, 4, 2)),
    128: ((64, 64, 4, 3), (32, 64, 4, 2)),
    256: ((64, 64, 8, 2), (32, 32, 4, 2)),
}
"""By the width of a row, at most: `Blocks` but for that (`benchmarks/bank_kernels.py`). The first are for GPUs that have room, the
second for others."""


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
    blocks, gradient = blocks_of(BLOCKS, weight), torch.empty_like(weight)
    _pulls[(triton.cdiv(len(weight), blocks.slots),)](
        *(queries.to(factors), weight, inverse_length, log_normaliser, pulls.to(factors), gradient),
        *(len(queries), *weight.shape),
        *blocks[:3],
        **blocks.options,
    )
    return gradient


def cooperate(
    gradient: Float[Tensor, "K D"],
    weight: Float[Tensor, "K D"],
    inverse_length: Float[Tensor, "K 1"],
    positives: Int[Tensor, "N P"],
    changes: Float[Tensor, "N P"],
    step: Float[Tensor, "N D"],
) -> None:
    """Add change · step of each query, pushed through the normalisation, to the gradient of each of its positive slots."""
    count, number = positives.shape
    width = weight.shape[1]
    _cooperate[(count, number)](
        *(
            gradient,
            weight,
            inverse_length,
            positives.contiguous(),
            changes.contiguous(),
            step.contiguous(),
            len(weight),
            width,
        ),
        WIDTH=triton.next_power_of_2(width),
    )


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
    factors = load_rows(weight, slot, slot_count, width, WIDTH).to(queries.dtype.element_ty)
    inverse = tl.load(inverse_length + slot, mask=slot < slot_count, other=0.0)
    pulled = tl.zeros([SLOTS, WIDTH], tl.float32)
    for start in range(0, query_count, QUERIES):
        query = start + tl.arange(0, QUERIES)
        block = load_rows(queries, query, query_count, width, WIDTH)
        pull = load_rows(pulls, query, query_count, width, WIDTH)
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


@triton.jit
def _cooperate(gradient, weight, inverse_length, positives, changes, step, slot_count, width, WIDTH: tl.constexpr):
    """A query and one of its positives: what moves that slot, along the sphere."""
    query = tl.program_id(0)
    place = query * tl.num_programs(1) + tl.program_id(1)
    slot, change = tl.load(positives + place), tl.load(changes + place)
    if (change != 0) & (slot >= 0) & (slot < slot_count):
        column = tl.arange(0, WIDTH)
        here = column < width
        row = slot.to(tl.int64) * width + column
        inverse = tl.load(inverse_length + slot)
        unit = tl.load(weight + row, mask=here, other=0.0) * inverse
        pulled = change * tl.load(step + query * width + column, mask=here, other=0.0)
        pulled = (pulled - tl.sum(pulled * unit, axis=0) * unit) * inverse
        tl.atomic_add(gradient + row, pulled, mask=here)
