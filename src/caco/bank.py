"""The bank: K learnable embeddings, and the gradient that makes them cooperate and compete.

CaCo (Wang et al., arXiv:2203.14370) trains an encoder against a bank of slots. Each query has one positive slot, all
other slots are negatives. The encoder minimises the contrastive loss. So does a positive slot; every negative slot
*maximises* it. The whole method is this one sign, in `_CooperativeAdversarial.backward`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


class BankLoss(NamedTuple):
    """The loss and what it measured on the way."""

    loss: Tensor
    """Scalar: the weighted cross-entropy of all query/positive pairs."""
    query_loss: Tensor
    """[N]: each query's own weighted share of the loss, no gradient."""
    positive_probability: Tensor
    """[N, P]: probability each query gives to each of its positives, no gradient."""
    hit: Tensor
    """[N, P]: whether that positive is also the query's nearest slot, no gradient."""


class _CooperativeAdversarial(torch.autograd.Function):
    """Weighted cross-entropy of queries against slots, with the paper's gradient for the slots."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        slots: Tensor,
        positives: Tensor,
        weights: Tensor,
        temperature: float,
        slot_temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cosines = queries @ slots.T
        positive_cosines = cosines.gather(1, positives)
        nearest = cosines.argmax(dim=1, keepdim=True)
        log_normaliser = torch.logsumexp(cosines / temperature, dim=1, keepdim=True)
        log_probability = positive_cosines / temperature - log_normaliser
        query_loss = -(weights * log_probability).sum(dim=1)
        ctx.save_for_backward(queries, slots, positives, weights, cosines, log_normaliser)
        ctx.temperatures = temperature, slot_temperature
        measured = query_loss, log_probability.exp(), nearest == positives
        ctx.mark_non_differentiable(*measured)
        return query_loss.sum(), *measured

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        queries, slots, positives, weights, cosines, log_normaliser = ctx.saved_tensors
        temperature, slot_temperature = ctx.temperatures
        weight = weights.sum(dim=1, keepdim=True) * grad_outputs[0]
        positive_weights = weights * grad_outputs[0]

        # Queries: the ordinary gradient of the cross-entropy.
        probability = torch.exp(cosines / temperature - log_normaliser)
        pull = (weight * probability).scatter_add_(1, positives, -positive_weights)
        grad_queries = (pull @ slots) / temperature

        # Slots: the same gradient, −(1 − p) at the positive (cooperative, as in the loss), but with the sign flipped at
        # every negative: −p instead of p (adversarial). Both move a slot *toward* the query.
        if slot_temperature != temperature:
            probability = torch.softmax(cosines / slot_temperature, dim=1)
        flipped = (weight * probability).scatter_add_(
            1, positives, positive_weights * (1 - 2 * probability.gather(1, positives))
        )
        grad_slots = -(flipped.T @ queries) / slot_temperature
        return grad_queries, grad_slots, None, None, None, None


def cooperative_adversarial_loss(
    queries: Float[Tensor, "N D"],
    slots: Float[Tensor, "K D"],
    positives: Int[Tensor, "N P"],
    weights: Float[Tensor, "N P"],
    temperature: float,
    slot_temperature: float,
) -> BankLoss:
    """Return Σ weights · cross-entropy(queries·slotsᵀ / temperature, positives), with CaCo's gradient for the slots.

    queries and slots are L2-normalised rows of one floating dtype (half precisions are computed in float32). A query
    may have several positives, each with its weight; for the mean over a batch of B the weights are 1/B. The gradient
    of the queries is the ordinary one at `temperature`. The slots get −Σ weights · p̃ᵀ·queries / slot_temperature with
    p̃ = 1 − p at the positive and p elsewhere, p = softmax(queries·slotsᵀ / slot_temperature).

    Source: paper eq. 5-8; the published `update_sym_network`, whose step this reproduces to rounding in float64.
    """
    working = torch.promote_types(queries.dtype, torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        return BankLoss(
            *_CooperativeAdversarial.apply(
                queries.to(working),
                slots.to(working),
                positives,
                weights.to(working),
                temperature,
                slot_temperature,
            )
        )


class Bank(nn.Module):
    """K learnable embeddings of width D.

    `weight: [K, D]` is an ordinary parameter: `torch.optim.SGD(momentum=…)` on it is the published bank step, its
    state_dict holds the velocity, and data-parallel averaging of its gradient is the published all-reduce.
    Slots start as N(0, 1) (published `CaCo_PN`).
    """

    def __init__(self, size: int, width: int, temperature: float = 0.08, slot_temperature: float = 0.08) -> None:
        super().__init__()
        self.size = size
        self.temperature = temperature
        self.slot_temperature = slot_temperature
        self.weight = nn.Parameter(self.own_random_rows(width))

    def slots(self) -> Float[Tensor, "K D"]:
        """Return the unit rows of the bank; gradients flow through the normalisation to `weight`."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return F.normalize(self.weight, dim=1)

    def own_random_rows(self, width: int) -> Float[Tensor, "K D"]:
        """Return the rows a new bank starts with, N(0, 1)."""
        return torch.cat(list(random_rows(self.size, width)))

    def own(self, rows: Tensor) -> Tensor:
        """Return the rows [K, …] that this process keeps: all of them (a sharded bank keeps a part)."""
        return rows

    def whole(self, rows: Tensor) -> Tensor:
        """Return the rows [K, …] of which this process keeps `rows`: the inverse of `own`."""
        return rows

    def log_sum_exp(
        self, queries: Float[Tensor, "N D"], slots: Float[Tensor, "K D"], temperature: float
    ) -> Float[Tensor, " N"]:
        """Return log Σ exp(cosine/temperature) over all slots for each query, with its gradient for the queries."""
        return torch.logsumexp(queries @ slots.T / temperature, dim=1)

    @torch.no_grad()
    def nearest(self, keys: Float[Tensor, "N D"], slots: Float[Tensor, "K D"]) -> Int[Tensor, " N"]:
        """Return the index of the slot nearest to each key: the positive of the other view's query.

        Always in full precision: in bfloat16 over 1 % of the choices differ, which costs 20 % of the gradient.
        """
        with torch.autocast(keys.device.type, enabled=False):
            return (keys.to(slots.dtype) @ slots.T).argmax(dim=1)

    def loss(
        self,
        queries: Float[Tensor, "N D"],
        slots: Float[Tensor, "K D"],
        positives: Int[Tensor, "N P"],
        weights: Float[Tensor, "N P"],
    ) -> BankLoss:
        """Return `cooperative_adversarial_loss` at this bank's temperatures."""
        return cooperative_adversarial_loss(queries, slots, positives, weights, self.temperature, self.slot_temperature)

    @torch.no_grad()
    def fill(self, keys: Float[Tensor, "N D"], batch: int) -> None:
        """Write the keys of the warm start's batch number `batch` (from 0) into the next slots.

        Batches fill the bank in order; what does not fit at its end is left out, and the next batch begins at slot 0.
        """
        batches = -(-self.size // len(keys))
        first = batch % batches * len(keys)
        self._store(keys[: self.size - first].to(self.weight.dtype), first)

    def _store(self, rows: Tensor, first: int) -> None:
        self.weight[first : first + len(rows)] = rows


def random_rows(size: int, width: int, block: int = 65536) -> Iterator[Tensor]:
    """Yield the rows of a random bank in blocks: one that keeps a part draws the same numbers as one that keeps all."""
    for first in range(0, size, block):
        yield torch.randn(min(block, size - first), width)
