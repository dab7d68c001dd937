"""The bank: K learnable embeddings, and the gradient that makes them cooperate and compete.

CaCo (Wang et al., arXiv:2203.14370) trains an encoder against a bank of slots. Each query has one positive slot, all
other slots are negatives. The encoder minimises the contrastive loss. So does a positive slot; every negative slot
*maximises* it. The whole method is this one sign, in `_CooperativeAdversarial.backward`.

The bank is read in blocks of slots (`slots.py`): what a block computes is thrown away, and computed again in backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from caco.slots import Alone, Holders, LogSumExp, RunningSoftmax, Slots, compare, product, unit_scale


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
        weight: Tensor,
        scale: Tensor,
        positives: Tensor,
        weights: Tensor,
        temperature: float,
        slot_temperature: float,
        products: torch.dtype,
        holders: Holders,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        slots = Slots(weight, scale)
        queries, weights = holders.gather(queries), holders.gather(weights)
        places = holders.gather(positives) - holders.first
        here = (places >= 0) & (places < len(weight))

        of_encoder, of_slots = RunningSoftmax(queries, products), RunningSoftmax(queries, products)
        positive_logits = torch.zeros_like(weights)
        scaled = queries / temperature
        for block in slots.blocks(len(queries)):
            rows = slots.unit_rows(block)
            logits = compare(scaled, rows, products)
            inside = (places >= block.start) & (places < block.stop)
            found = logits.gather(1, (places - block.start).clamp_(0, len(rows) - 1))
            positive_logits += torch.where(inside, found, 0)
            if slot_temperature != temperature:
                of_slots.add(logits * (temperature / slot_temperature), None)
            of_encoder.add(logits, rows)
        positive_logits = holders.sum(positive_logits)
        of_encoder.join(holders)
        if slot_temperature == temperature:
            of_slots = of_encoder
        else:
            of_slots.join(holders)
        hit = positive_logits >= of_encoder.largest
        log_probability = positive_logits - of_encoder.log_normaliser
        query_loss = -(weights * log_probability).sum(dim=1)

        # Queries: the ordinary gradient of the cross-entropy, the mean slot under the softmax less the positives.
        local = places.clamp(0, len(weight) - 1)
        positive_slots = slots.unit_rows(local.flatten()).view(*local.shape, -1)
        push = (torch.where(here, weights, 0)[:, :, None] * positive_slots).sum(dim=1)
        pull = weights.sum(dim=1, keepdim=True) * of_encoder.mean_slot
        grad_queries = holders.sum(pull - push) / temperature

        slot_logits = positive_logits * (temperature / slot_temperature)
        probability_of_slots = torch.exp(slot_logits - of_slots.log_normaliser)
        ctx.save_for_backward(
            queries, weight, scale, local, here, weights, grad_queries, of_slots.log_normaliser, probability_of_slots
        )
        ctx.slot_temperature, ctx.products, ctx.holders = slot_temperature, products, holders
        measured = [holders.own(values) for values in (query_loss, log_probability.exp(), hit)]
        ctx.mark_non_differentiable(*measured)
        return measured[0].sum(), *measured  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        queries, weight, scale, places, here, weights, grad_queries, log_normaliser, probability = ctx.saved_tensors
        slots, holders, temperature = Slots(weight, scale), ctx.holders, ctx.slot_temperature

        # Slots: the ordinary gradient −(1 − p) at the positive (cooperative, as in the loss), but with the sign flipped
        # at every negative: −p instead of p (adversarial). Both move a slot *toward* the query.
        # Every holder has weighed by its own batch: the mean over all batches is the sum divided by their number.
        step = queries * (-grad_outputs[0] / (temperature * holders.size))
        adversarial = weights.sum(dim=1, keepdim=True) * step
        grad_weight = torch.empty_like(weight)
        scaled = queries / temperature
        for block in slots.blocks(len(queries)):
            logits = compare(scaled, slots.unit_rows(block), ctx.products)
            shares = logits.sub_(log_normaliser).exp_()
            grad_weight[block] = product(shares.T, adversarial, ctx.products)
        cooperative = torch.where(here, weights * (1 - 2 * probability), 0)[:, :, None] * step[:, None]
        grad_weight.index_add_(0, places.flatten(), cooperative.flatten(0, 1))

        # Through the rows' normalisation: what remains is tangent to the sphere.
        for block in slots.blocks(len(queries)):
            rows, gradient = slots.unit_rows(block), grad_weight[block]
            gradient -= (gradient * rows).sum(dim=1, keepdim=True) * rows
            gradient *= scale[block]
        return holders.own(grad_queries) * grad_outputs[0], grad_weight, *[None] * 7


def cooperative_adversarial_loss(
    queries: Float[Tensor, "N D"],
    slots: Float[Tensor, "K D"],
    positives: Int[Tensor, "N P"],
    weights: Float[Tensor, "N P"],
    temperature: float,
    slot_temperature: float,
) -> BankLoss:
    """Return Σ weights · cross-entropy(queries·slotsᵀ / temperature, positives), with CaCo's gradient for the slots.

    queries: L2-normalised rows. slots: rows of any length, which are normalised here. Half precisions are computed in
    float32. A query may have several positives, each with its weight; for the mean over a batch of B the weights are
    1/B. The gradient of the queries is the ordinary one at `temperature`. The unit slots get
    −Σ weights · p̃ᵀ·queries / slot_temperature with p̃ = 1 − p at the positive and p elsewhere,
    p = softmax(queries·slotsᵀ / slot_temperature), which is pushed through the normalisation to `slots`.

    Source: paper eq. 5-8; the published `update_sym_network`, whose step this reproduces to rounding in float64.
    """
    working = torch.promote_types(queries.dtype, torch.float32)
    rows = slots.to(working)
    return _loss(queries, Slots(rows, unit_scale(rows)), positives, weights, temperature, slot_temperature, Alone())


def _loss(
    queries: Tensor,
    slots: Slots,
    positives: Tensor,
    weights: Tensor,
    temperature: float,
    slot_temperature: float,
    holders: Holders,
) -> BankLoss:
    device, working = queries.device.type, slots.weight.dtype
    # Under bfloat16 autocast the products take bfloat16 factors; everything between them stays in float32.
    products = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else working
    with torch.autocast(device, enabled=False):
        return BankLoss(
            *_CooperativeAdversarial.apply(
                queries.to(working),
                *slots,
                positives,
                weights.to(working),
                temperature,
                slot_temperature,
                products,
                holders,
            )
        )


class Bank(nn.Module):
    """K learnable embeddings of width D.

    `weight: [K, D]` is an ordinary parameter: `torch.optim.SGD(momentum=…)` on it is the published bank step, its
    state_dict holds the velocity, and data-parallel averaging of its gradient is the published all-reduce.
    Slots start as N(0, 1) (published `CaCo_PN`).
    """

    holders: Holders = Alone()

    def __init__(self, size: int, width: int, temperature: float = 0.08, slot_temperature: float = 0.08) -> None:
        super().__init__()
        self.size = size
        self.temperature = temperature
        self.slot_temperature = slot_temperature
        self.weight = nn.Parameter(self.own_random_rows(width))

    def slots(self) -> Slots:
        """Return the bank for one step: its rows are measured once, however often they are used."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return Slots(self.weight, unit_scale(self.weight))

    def own_random_rows(self, width: int) -> Float[Tensor, "K D"]:
        """Return the rows a new bank starts with, N(0, 1)."""
        return torch.cat(list(random_rows(self.size, width)))

    def own(self, rows: Tensor) -> Tensor:
        """Return the rows [K, …] that this process keeps: all of them (a sharded bank keeps a part)."""
        return rows

    def whole(self, rows: Tensor) -> Tensor:
        """Return the rows [K, …] of which this process keeps `rows`: the inverse of `own`."""
        return rows

    def log_sum_exp(self, queries: Float[Tensor, "N D"], slots: Slots, temperature: float) -> Float[Tensor, " N"]:
        """Return log Σ exp(cosine/temperature) over all slots for each query, with its gradient for the queries."""
        result: Tensor = LogSumExp.apply(queries.to(slots.weight.dtype), slots, temperature, self.holders)
        return result

    @torch.no_grad()
    def nearest(self, keys: Float[Tensor, "N D"], slots: Slots) -> Int[Tensor, " N"]:
        """Return the index of the slot nearest to each key: the positive of the other view's query.

        Always in full precision: in bfloat16 over 1 % of the choices differ, which costs 20 % of the gradient. Of equally
        near slots the first.
        """
        with torch.autocast(keys.device.type, enabled=False):
            keys = self.holders.gather(keys.to(slots.weight.dtype))
            best = keys.new_full((len(keys),), -torch.inf)
            place = torch.zeros_like(best, dtype=torch.int64)
            for block in slots.blocks(len(keys)):
                cosine, column = compare(keys, slots.unit_rows(block), keys.dtype).max(dim=1)
                place = torch.where(cosine > best, column + block.start, place)
                best = torch.maximum(best, cosine)
            return self.holders.own(self._nearest_of_all(best, place))

    def _nearest_of_all(self, cosine: Tensor, place: Tensor) -> Tensor:
        """Return the place [N] of the largest cosine [N] that any holder of slots has found."""
        return place

    def loss(
        self,
        queries: Float[Tensor, "N D"],
        slots: Slots,
        positives: Int[Tensor, "N P"],
        weights: Float[Tensor, "N P"],
    ) -> BankLoss:
        """Return `cooperative_adversarial_loss` at this bank's temperatures."""
        return _loss(queries, slots, positives, weights, self.temperature, self.slot_temperature, self.holders)

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
