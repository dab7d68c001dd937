"""What queries get from the bank: all that follows from their softmax over the slots, by one kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from caco.bank_kernels.softmaxes import softmax, softmax_of_parts

CHUNK = 16
"""Parts of the slots whose sums are added at a time."""


class OfQueries(NamedTuple):
    """What N queries with P positives each have from all slots."""

    loss: Float[Tensor, " N"]
    """Σ weight · cross-entropy over a query's positives."""
    gradient: Float[Tensor, "N D"]
    """Of the sum of all losses, for the queries."""
    probability: Float[Tensor, "N P"]
    """Of each positive, at the temperature of the encoder."""
    slot_probability: Float[Tensor, "N P"]
    """At that of the slots."""
    log_normaliser: Float[Tensor, "N 1"]
    """log Σ exp(cosine / temperature of the slots)."""
    hit: Bool[Tensor, "N P"]
    """Whether the positive has the largest logit."""


def of_queries(
    queries: Float[Tensor, "N D"],
    weight: Float[Tensor, "K D"],
    inverse_length: Float[Tensor, "K 1"],
    positives: Int[Tensor, "N P"],
    weights: Float[Tensor, "N P"],
    temperature: float,
    slot_temperature: float,
    hit_margin: float,
    factors: torch.dtype = torch.bfloat16,
) -> OfQueries:
    """Compare queries, unit rows, with all slots.

    hit_margin: share of the largest logit by which a positive's may be less. factors: of products are rounded to it.
    """
    scaled, others = (queries / temperature).to(factors), (queries / slot_temperature).to(factors)
    parts = softmax_of_parts(scaled, weight, inverse_length, with_mean=True)
    count, width = queries.shape
    loss, gradient = weight.new_empty(count), weight.new_empty(count, width)
    probability, slot_probability = weight.new_empty(2, *positives.shape).unbind()
    hit = torch.empty(positives.shape, dtype=torch.uint8, device=weight.device)
    has_other_temperature = slot_temperature != temperature
    log_normaliser = weight.new_empty(count, 1)
    if has_other_temperature:
        largest, total, _ = softmax(others, weight, inverse_length, with_mean=False, factors=factors)
        log_normaliser = largest + total.log()
    _of_query[(count,)](
        *(scaled, others, weight, inverse_length, positives.contiguous(), weights.contiguous(), *parts),
        *(loss, gradient, probability, slot_probability, log_normaliser, hit),
        *(count, len(weight), width, len(parts.largest), 1 / temperature, hit_margin),
        WIDTH=triton.next_power_of_2(width),
        PARTS=triton.next_power_of_2(len(parts.largest)),
        POSITIVES=positives.shape[1],
        OTHER_TEMPERATURE=has_other_temperature,
        CHUNK=CHUNK,
    )
    return OfQueries(loss, gradient, probability, slot_probability, log_normaliser, hit.view(torch.bool))


@triton.jit
def _of_query(
    scaled,
    others,
    weight,
    inverse_length,
    positives,
    weights,
    largests,
    totals,
    slot_sums,
    losses,
    gradient,
    probabilities,
    slot_probabilities,
    log_normalisers,
    hits,
    query_count,
    slot_count,
    width,
    part_count,
    inverse_temperature,
    hit_margin,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    POSITIVES: tl.constexpr,
    OTHER_TEMPERATURE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A query: its softmax over all parts, then its positives one after another."""
    query = tl.program_id(0)
    part, column = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    here = column < width
    largest_of_part = tl.load(largests + part * query_count + query, mask=part < part_count, other=float("-inf"))
    largest = tl.max(largest_of_part, axis=0)
    total_of_part = tl.load(totals + part * query_count + query, mask=part < part_count, other=0.0)
    total = tl.sum(total_of_part * tl.exp(largest_of_part - largest), axis=0)
    log_normaliser = largest + tl.log(total)
    slot_log_normaliser = log_normaliser
    if OTHER_TEMPERATURE:
        slot_log_normaliser = tl.load(log_normalisers + query)
    else:
        tl.store(log_normalisers + query, log_normaliser)
    mean_slot = tl.zeros([WIDTH], tl.float32)
    for start in range(0, part_count, CHUNK):
        of_chunk = start + tl.arange(0, CHUNK)
        row = of_chunk * query_count + query
        own = tl.load(largests + row, mask=of_chunk < part_count, other=float("-inf"))
        inside = (of_chunk[:, None] < part_count) & here[None, :]
        slot_sum = tl.load(slot_sums + row.to(tl.int64)[:, None] * width + column[None, :], mask=inside, other=0.0)
        mean_slot += tl.sum(tl.exp(own - largest)[:, None] * slot_sum, axis=0)
    mean_slot /= total
    factor = tl.load(scaled + query * width + column, mask=here, other=0.0).to(tl.float32)
    of_other = tl.load(others + query * width + column, mask=here, other=0.0).to(tl.float32)
    loss, weight_sum = 0.0, 0.0
    attraction = tl.zeros([WIDTH], tl.float32)
    for positive in tl.static_range(POSITIVES):
        place = query * POSITIVES + positive
        slot, counts = tl.load(positives + place), tl.load(weights + place)
        is_slot = (slot >= 0) & (slot < slot_count)
        row = tl.load(weight + slot.to(tl.int64) * width + column, mask=here & is_slot, other=0.0)
        inverse = tl.load(inverse_length + slot, mask=is_slot, other=0.0)
        rounded = row.to(scaled.dtype.element_ty).to(tl.float32)  # as the softmax has it
        logit, slot_logit = tl.sum(factor * rounded, axis=0) * inverse, tl.sum(of_other * rounded, axis=0) * inverse
        log_probability = logit - log_normaliser
        loss -= counts * log_probability
        weight_sum += counts
        attraction += counts * inverse * row
        tl.store(probabilities + place, tl.exp(log_probability))
        tl.store(slot_probabilities + place, tl.exp(slot_logit - slot_log_normaliser))
        tl.store(hits + place, (logit >= largest - hit_margin * tl.abs(largest)).to(tl.uint8))
    tl.store(losses + query, loss)
    out = (weight_sum * mean_slot - attraction) * inverse_temperature
    tl.store(gradient + query * width + column, out, mask=here)
