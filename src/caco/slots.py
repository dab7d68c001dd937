"""The slots of a bank, block by block: unit rows, comparison with queries, softmax over all of them.

No matrix of all queries and all slots is ever held, so memory beyond the bank, its gradient and its velocity does not
grow with the bank. Kernels of their own read the slots on a GPU, and many of them on a CPU (`fused.py`).
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

_ONEDNN = torch.backends.mkldnn.is_available() and platform.machine().lower() in ("x86_64", "amd64")

BLOCK = {"cpu": 2**21, "cuda": 2**26}
"""Entries of the matrix of queries and slots that are held at a time (CPU: what stays in a cache)."""
MOST_SLOTS = {"cpu": 4096}
"""Slots that are taken at a time, at most: their unit rows stay in the cache, too."""


class Slots(NamedTuple):
    """The bank as one step sees it: rows of any length, and what makes unit rows of them."""

    weight: Float[Tensor, "K D"]
    inverse_length: Float[Tensor, "K 1"]
    """1 / ‖row‖, no gradient (it is written out where it is needed)."""

    def unit_rows(self, rows: slice | Tensor) -> Tensor:
        """Return the chosen slots with length 1, no gradient."""
        return self.weight.detach()[rows] * self.inverse_length[rows]

    def blocks(self, queries: int) -> Iterator[slice]:
        """Yield the slots in parts small enough to be compared with so many queries at a time."""
        kind = self.weight.device.type
        most = MOST_SLOTS.get(kind, len(self.weight))
        size = max(min(BLOCK.get(kind, BLOCK["cuda"]) // max(queries, 1), most), 64)
        for first in range(0, len(self.weight), size):
            yield slice(first, min(first + size, len(self.weight)))


@runtime_checkable
class Shards(Protocol):
    """How a bank is divided: which processes hold its slots, an equal part each, and what they exchange."""

    size: int
    """Number of these processes."""
    rank: int
    """Number of this one, from 0."""

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, in the order of their ranks."""

    def local_queries(self, rows: Tensor) -> Tensor:
        """Return this process's part of gathered rows."""

    def sum(self, values: Tensor) -> Tensor:
        """Return the elementwise sum over all processes."""

    def maximum(self, values: Tensor) -> Tensor:
        """Return the elementwise maximum over all processes."""

    def gather_in_main(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes in the main one (rank 0), none in the others."""

    def divide_from_main(self, rows: Tensor) -> Tensor:
        """Return this process's part of the main one's rows: the inverse of `gather_in_main`."""


class Unsharded:
    """The bank is whole in this process: every exchange is the identity."""

    size, rank = 1, 0

    def gather(self, rows: Tensor) -> Tensor:
        return rows

    local_queries = sum = maximum = gather_in_main = divide_from_main = gather


class RunningSoftmax:
    """The softmax of each query over all slots, block by block: its normaliser, and the mean slot under it.

    With the largest logit so far taken out of every exponent ("online" softmax), so that any temperature is safe.
    queries: over the temperature of this softmax, so that logits are their products with unit slots.
    """

    def __init__(self, queries: Float[Tensor, "N D"], products: torch.dtype) -> None:
        self.queries, self.products = queries, products
        self.largest = queries.new_full((len(queries), 1), -torch.inf)
        self.total = queries.new_zeros(len(queries), 1)
        self.slot_sum = torch.zeros_like(queries)

    def add(self, logits: Float[Tensor, "N k"], rows: Float[Tensor, "k D"] | None) -> None:
        """Take in a block, whose logits may be overwritten. rows: its unit slots; None when no mean slot is wanted."""
        largest = torch.maximum(self.largest, logits.amax(dim=1, keepdim=True))
        shrink = (self.largest - largest).exp_()
        self.total.mul_(shrink)
        self.slot_sum.mul_(shrink)
        self.largest = largest
        exponentials = logits.sub_(largest).exp_()
        self.total.add_(exponentials.sum(dim=1, keepdim=True))
        if rows is not None:
            self.slot_sum.add_(product(exponentials, rows, self.products))

    def combine(self, shards: Shards) -> None:
        """Take in what all other processes have seen; the mean slot stays this one's part of a sum over all."""
        if shards.size == 1:
            return
        largest = shards.maximum(self.largest)
        shrink = (self.largest - largest).exp_()
        self.total, self.largest = shards.sum(self.total * shrink), largest
        self.slot_sum.mul_(shrink)

    @property
    def log_normaliser(self) -> Float[Tensor, "N 1"]:
        return self.largest + self.total.log()

    @property
    def mean_slot(self) -> Float[Tensor, "N D"]:
        return self.slot_sum / self.total


class LogSumExp(torch.autograd.Function):
    """log Σ exp(cosine / temperature) over all slots, with the gradient for the queries alone."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, slots: Slots, temperature: float, shards: Shards) -> Tensor:
        scaled = shards.gather(queries) / temperature
        softmax = RunningSoftmax(scaled, scaled.dtype)
        for block in slots.blocks(len(scaled)):
            rows = slots.unit_rows(block)
            softmax.add(compare(scaled, rows, scaled.dtype), rows)
        softmax.combine(shards)
        ctx.save_for_backward(shards.local_queries(shards.sum(softmax.mean_slot)) / temperature)
        return shards.local_queries(softmax.log_normaliser)[:, 0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (mean_slot,) = ctx.saved_tensors
        return grad_outputs[0][:, None] * mean_slot, None, None, None


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return left @ right in the dtype of `left`, its factors rounded to `dtype` first."""
    if dtype == left.dtype:
        large = left.numel() * right.shape[1] >= 2**20
        return _product_by_convolution(left, right) if large and _ONEDNN and _on_cpu(left) else left @ right
    if left.device.type == "cuda":  # the tensor cores sum in float32, and so the result stays
        return torch.mm(left.to(dtype), right.to(dtype), out_dtype=left.dtype)
    return (left.to(dtype) @ right.to(dtype)).to(left.dtype)


def _product_by_convolution(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right as a convolution of 1 x 1 over left's rows: the same numbers from another library.

    For a matrix product torch calls MKL, which on AMD processors is half as fast as oneDNN, which makes convolutions.
    """
    rows, inner = left.shape
    # A picture of one column, a pixel for each row. Its strides have to tell which layout that is.
    if left.is_contiguous():
        picture = left.view(1, rows, 1, inner).permute(0, 3, 1, 2)
    else:
        picture = left.T.contiguous().view(1, inner, rows, 1)
    return F.conv2d(picture, right.T.contiguous().view(-1, inner, 1, 1)).view(-1, rows).T


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and not torch.is_grad_enabled()


def pulls_on_slots(
    queries: Float[Tensor, "N D"],
    rows: Float[Tensor, "k D"],
    log_normaliser: Float[Tensor, "N 1"],
    pulls: Float[Tensor, "N D"],
    products: torch.dtype,
) -> Float[Tensor, "k D"]:
    """Return Σ p · pull over the queries for each of some slots, p a query's probability of that slot.

    queries: over the temperature. rows: unit slots. log_normaliser: of each query, over all slots.
    """
    probability = compare(queries, rows, products).sub_(log_normaliser).exp_()
    return product(probability.T, pulls, products)


def along_sphere(
    pulled: Float[Tensor, "k D"], rows: Float[Tensor, "k D"], inverse_length: Float[Tensor, "k 1"]
) -> None:
    """Push the gradient of unit rows through their normalisation, in place: what remains is tangent to the sphere."""
    pulled -= (pulled * rows).sum(dim=1, keepdim=True) * rows
    pulled *= inverse_length


def compare(queries: Float[Tensor, "N D"], rows: Float[Tensor, "k D"], dtype: torch.dtype) -> Float[Tensor, "N k"]:
    """Return queries @ rowsᵀ, the factors rounded to `dtype`, but never the result: an exponential follows.

    A CPU's bfloat16 product would round it, by 1 % of the gradient; there the factors are not rounded either.
    """
    return product(queries, rows.T, dtype if queries.device.type == "cuda" else queries.dtype)


def inverse_lengths(weight: Float[Tensor, "K D"]) -> Float[Tensor, "K 1"]:
    """Return 1 / ‖row‖ of every row, no gradient."""
    result: Tensor = weight.detach().norm(dim=1, keepdim=True).clamp_min_(1e-12).reciprocal_()
    return result
