"""The loss of queries against slots, and the gradient that makes slots cooperate and compete.

CaCo (Wang et al., arXiv:2203.14370) trains an encoder against a bank of slots. Each query has one positive slot, all
other slots are negatives. The encoder minimises the contrastive loss. So does a positive slot; every negative slot
*maximises* it. The whole method is this one sign, in `_CooperativeAdversarial.backward`.

The bank is read in blocks of slots (`slots.py`): what a block computes is thrown away, and computed again in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from caco.slots import Alone, Holders, RunningSoftmax, Slots, compare, product, unit_scale


class Pull(NamedTuple):
    """What some queries do to the slots: all that the slots' gradient needs, nothing with a gradient of its own.

    Of a bank that several processes hold: of the queries of all of them, N in all.
    """

    queries: Tensor
    """[N, D]: unit rows."""
    places: Tensor
    """[N, P]: the row of each positive, where it is `here`."""
    here: Tensor
    """[N, P]: whether the positive is among the slots that this process holds."""
    weights: Tensor
    """[N, P]"""
    log_normaliser: Tensor
    """[N, 1]: log Σ exp(cosine / slot temperature) over all slots."""
    probability: Tensor
    """[N, P]: of each positive, at the slot temperature."""


class BankLoss(NamedTuple):
    """The loss and what it measured on the way."""

    loss: Tensor
    """Scalar: the weighted cross-entropy of all query/positive pairs, with the gradient for the queries."""
    positive_probability: Tensor
    """[N, P]: probability each query gives to each of its positives, no gradient."""
    hit: Tensor
    """[N, P]: whether that positive is also the query's nearest slot, no gradient."""
    pull: Pull
    """For the slots' gradient: `Bank.slot_term`."""


class _Known(torch.autograd.Function):
    """A number whose gradient for the queries has been computed with it."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * grad_outputs[0], None, None


class _CooperativeAdversarial(torch.autograd.Function):
    """0, with the paper's gradient for the slots: of no loss, so it is written out."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, pull: Pull, temperature: float, products: torch.dtype, holders: Holders
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, *pull)
        ctx.temperature, ctx.products, ctx.holders = temperature, products, holders
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, *saved = ctx.saved_tensors
        slots, pull, temperature = Slots(weight, scale), Pull(*saved), ctx.temperature

        # Slots: the ordinary gradient −(1 − p) at the positive (cooperative, as in the loss), but with the sign flipped
        # at every negative: −p instead of p (adversarial). Both move a slot *toward* the query.
        # Every holder has weighed by its own batch: the mean over all batches is the sum divided by their number.
        step = pull.queries * (-grad_outputs[0] / (temperature * ctx.holders.size))
        adversarial = pull.weights.sum(dim=1, keepdim=True) * step
        gradient = torch.empty_like(weight)
        scaled = pull.queries / temperature
        for block in slots.blocks(len(scaled)):
            logits = compare(scaled, slots.unit_rows(block), ctx.products)
            shares = logits.sub_(pull.log_normaliser).exp_()
            gradient[block] = product(shares.T, adversarial, ctx.products)
        cooperative = torch.where(pull.here, pull.weights * (1 - 2 * pull.probability), 0)[:, :, None] * step[:, None]
        gradient.index_add_(0, pull.places.flatten(), cooperative.flatten(0, 1))

        # Through the rows' normalisation: what remains is tangent to the sphere.
        for block in slots.blocks(len(scaled)):
            rows, part = slots.unit_rows(block), gradient[block]
            part -= (part * rows).sum(dim=1, keepdim=True) * rows
            part *= scale[block]
        return gradient, *[None] * 5


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
    rows = slots.to(torch.promote_types(queries.dtype, torch.float32))
    measured = Slots(rows, unit_scale(rows))
    result = encoder_loss(queries, measured, positives, weights, temperature, slot_temperature, Alone())
    return result._replace(loss=result.loss + slot_term(measured, [result.pull], slot_temperature, Alone()))


def encoder_loss(
    queries: Tensor,
    slots: Slots,
    positives: Tensor,
    weights: Tensor,
    temperature: float,
    slot_temperature: float,
    holders: Holders,
) -> BankLoss:
    """Return the loss with its gradient for the queries alone, and what `slot_term` needs for that of the slots.

    Shapes and values as in `cooperative_adversarial_loss`; with several holders of slots, everything but the pull is of
    this process's own queries.
    """
    working = slots.weight.dtype
    products = _dtype_of_products(slots)
    with torch.autocast(queries.device.type, enabled=False):
        queries = queries.to(working)
        with torch.no_grad():
            gradient, measured = _compare(
                queries, slots, positives, weights.to(working), temperature, slot_temperature, products, holders
            )
        return measured._replace(loss=_Known.apply(queries, measured.loss, gradient))


def _compare(
    queries: Tensor,
    slots: Slots,
    positives: Tensor,
    weights: Tensor,
    temperature: float,
    slot_temperature: float,
    products: torch.dtype,
    holders: Holders,
) -> tuple[Tensor, BankLoss]:
    """Return the loss's gradient for the queries, and the loss without any; the bank is read once."""
    queries, weights = holders.gather(queries), holders.gather(weights)
    places = holders.gather(positives) - holders.first
    here = (places >= 0) & (places < len(slots.weight))

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
    log_probability = positive_logits - of_encoder.log_normaliser

    # Queries: the ordinary gradient of the cross-entropy, the mean slot under the softmax less the positives.
    local = places.clamp(0, len(slots.weight) - 1)
    positive_slots = slots.unit_rows(local.flatten()).view(*local.shape, -1)
    attraction = (torch.where(here, weights, 0)[:, :, None] * positive_slots).sum(dim=1)
    repulsion = weights.sum(dim=1, keepdim=True) * of_encoder.mean_slot
    gradient = holders.own(holders.sum(repulsion - attraction) / temperature)

    slot_probability = torch.exp(positive_logits * (temperature / slot_temperature) - of_slots.log_normaliser)
    return gradient, BankLoss(
        loss=-holders.own(weights * log_probability).sum(),
        positive_probability=holders.own(log_probability.exp()),
        hit=holders.own(positive_logits >= of_encoder.largest),
        pull=Pull(queries, local, here, weights, of_slots.log_normaliser, slot_probability),
    )


def slot_term(slots: Slots, pulls: Sequence[Pull], temperature: float, holders: Holders) -> Tensor:
    """Return 0, whose backward gives the slots the cooperative-adversarial gradient of all these queries.

    temperature: of the slots. A term of its own, taken once a step, because that gradient is as large as the bank.
    """
    products = _dtype_of_products(slots)
    pull = Pull(*map(torch.cat, zip(*pulls, strict=True)))
    result: Tensor = _CooperativeAdversarial.apply(*slots, pull, temperature, products, holders)
    return result


def _dtype_of_products(slots: Slots) -> torch.dtype:
    """Return bfloat16 under its autocast: the factors of products are rounded then, everything else stays in float32."""
    device = slots.weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else slots.weight.dtype
