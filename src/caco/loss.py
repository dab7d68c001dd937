"""The loss of queries against slots, and the gradient that makes slots cooperate and compete.

CaCo (Wang et al., arXiv:2203.14370) trains an encoder against a bank of slots. Each query has one positive slot, all
other slots are negatives. The encoder minimises the contrastive loss. So does a positive slot; every negative slot
*maximises* it. The whole method is this one sign, in `_CooperativeAdversarial.backward`.

With one matrix of all queries and slots it would be these few lines (`tests/dense_bank.py`), by N queries q of one view,
their positives y, weights w, unit slots d, and the temperatures T of the encoder and T′ of the slots:

    s = q @ d.T
    loss = -(w * log_softmax(s / T)[y]).sum()                                 # gradient for q: the ordinary one
    p = softmax(s / T′)
    gradient for d = -(w * where(slot is y, 1 - p, p)).T @ q / T′             # for the loss it were -p at the negatives

Here the bank is read in blocks of slots instead (`slots.py`), so that no such matrix is held:

1. `encoder_loss` reads the bank once. It returns the loss with its gradient for the queries, and a `Pull`: the queries,
   their positives and softmax normalisers, which is all that the slots' gradient needs.
2. `slot_term` takes the pulls of all views of a step. Its value is 0; its backward reads the bank once more and gives the
   slots their gradient, which is as large as the bank and so made once a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from caco import fused
from caco.reading import read_bank
from caco.slots import Shards, Slots, Unsharded, along_sphere, inverse_lengths, pulls_on_slots

HIT = 1e-5
"""A positive's logit is the largest one if it is less by no more than this share: by rounding, where another sum gave it."""


class Pull(NamedTuple):
    """What some queries do to the slots: all that the slots' gradient needs, nothing with a gradient of its own.

    Of a bank that several processes hold: of the queries of all of them, N in all.
    """

    queries: Tensor
    """[N, D]: unit rows."""
    rows: Tensor
    """[N, P]: the row of each positive in the weight of this process, where it `is_local`."""
    is_local: Tensor
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


class _WithGradient(torch.autograd.Function):
    """A loss whose gradient for the queries has been computed with it."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * grad_outputs[0], None, None


class _CooperativeAdversarial(torch.autograd.Function):
    """0, with the paper's gradient for the slots: no loss has it, so it is written out."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        inverse_length: Tensor,
        pull: Pull,
        temperature: float,
        products: torch.dtype,
        shards: Shards,
    ) -> Tensor:
        ctx.save_for_backward(weight, inverse_length, *pull)
        ctx.temperature, ctx.products, ctx.shards = temperature, products, shards
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        weight, inverse_length, *saved = ctx.saved_tensors
        slots, pull, temperature = Slots(weight, inverse_length), Pull(*saved), ctx.temperature

        # Slots: the ordinary gradient −(1 − p) at the positive (cooperative, as in the loss), but with the sign flipped
        # at every negative: −p instead of p (adversarial). Both move a slot *toward* the query.
        # Every process has weighed by its own batch: the mean over all batches is the sum divided by their number.
        step = pull.queries * (-grad_outputs[0] / (temperature * ctx.shards.size))
        adversarial = pull.weights.sum(dim=1, keepdim=True) * step
        scaled = pull.queries / temperature
        change = torch.where(pull.is_local, pull.weights * (1 - 2 * pull.probability), 0)
        if kernels := fused.of_parts(weight, ctx.products):
            gradient: Tensor = kernels.pulls_on_slots(scaled, *slots, pull.log_normaliser, adversarial)
            kernels.cooperate(gradient, *slots, pull.rows, change, step)
            return gradient, *[None] * 5
        positives = pull.rows.flatten()
        cooperative = (change[:, :, None] * step[:, None]).flatten(0, 1)
        gradient = torch.empty_like(weight)
        for block in slots.blocks(len(scaled)):
            rows = slots.unit_rows(block)
            gradient[block] = pulls_on_slots(scaled, rows, pull.log_normaliser, adversarial, ctx.products)
        gradient.index_add_(0, positives, cooperative)
        for block in slots.blocks(len(scaled)):
            along_sphere(gradient[block], slots.unit_rows(block), inverse_length[block])
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
    rows = slots.to(torch.promote_types(queries.dtype, torch.float32)).contiguous()
    measured = Slots(rows, inverse_lengths(rows))
    result = encoder_loss(queries, measured, positives, weights, temperature, slot_temperature, Unsharded())
    return result._replace(loss=result.loss + slot_term(measured, [result.pull], slot_temperature, Unsharded()))


def encoder_loss(
    queries: Tensor,
    slots: Slots,
    positives: Tensor,
    weights: Tensor,
    temperature: float,
    slot_temperature: float,
    shards: Shards,
) -> BankLoss:
    """Return the loss with its gradient for the queries alone, and what `slot_term` needs for that of the slots.

    Shapes and values as in `cooperative_adversarial_loss`; where several processes hold the slots, everything but the pull
    is of this process's own queries.
    """
    working = slots.weight.dtype
    products = _dtype_of_products(slots)
    with torch.autocast(queries.device.type, enabled=False):
        queries = queries.to(working).contiguous()
        result, gradient = _loss_and_gradient(
            queries, slots, positives, weights.to(working), temperature, slot_temperature, products, shards
        )
        return result._replace(loss=_WithGradient.apply(queries, result.loss, gradient))


@torch.no_grad()
def _loss_and_gradient(
    queries: Tensor,
    slots: Slots,
    positives: Tensor,
    weights: Tensor,
    temperature: float,
    slot_temperature: float,
    products: torch.dtype,
    shards: Shards,
) -> tuple[BankLoss, Tensor]:
    """Return the loss, without gradient, and beside it its gradient for the queries [N, D].

    The bank is read once; by kernels once more for a slot temperature of its own.
    """
    if shards.size == 1 and (kernels := fused.of_loss(slots.weight, products)):
        found = kernels.of_queries(queries, *slots, positives, weights, temperature, slot_temperature, HIT)
        is_local = torch.ones_like(found.hit)
        pull = Pull(queries, positives, is_local, weights, found.log_normaliser, found.slot_probability)
        return BankLoss(found.loss.sum(), found.probability, found.hit, pull), found.gradient
    queries, weights = shards.gather(queries), shards.gather(weights)
    held = len(slots.weight)
    row = shards.gather(positives) - shards.rank * held
    is_local = (row >= 0) & (row < held)
    reading = read_bank(queries, slots, row, temperature, slot_temperature, products, shards)
    of_encoder, of_slots = reading.of_encoder, reading.of_slots
    log_probability = reading.positive_logits - of_encoder.log_normaliser

    # The ordinary gradient of the cross-entropy: the mean slot under the softmax, less the positives.
    row = row.clamp_(0, held - 1)
    positive_slots = slots.unit_rows(row.flatten()).view(*row.shape, -1)
    attraction = (torch.where(is_local, weights, 0)[:, :, None] * positive_slots).sum(dim=1)
    repulsion = weights.sum(dim=1, keepdim=True) * of_encoder.mean_slot
    gradient = shards.local_queries(shards.sum(repulsion - attraction) / temperature)

    slot_probability = torch.exp(reading.positive_slot_logits - of_slots.log_normaliser)
    result = BankLoss(
        loss=-shards.local_queries(weights * log_probability).sum(),
        positive_probability=shards.local_queries(log_probability.exp()),
        hit=shards.local_queries(reading.positive_logits >= of_encoder.largest - HIT * of_encoder.largest.abs()),
        pull=Pull(queries, row, is_local, weights, of_slots.log_normaliser, slot_probability),
    )
    return result, gradient


def slot_term(slots: Slots, pulls: Sequence[Pull], temperature: float, shards: Shards) -> Tensor:
    """Return 0, whose backward gives the slots the cooperative-adversarial gradient of all these queries.

    temperature: of the slots. A term of its own, taken once a step, because that gradient is as large as the bank.
    """
    products = _dtype_of_products(slots)
    pull = Pull(*map(torch.cat, zip(*pulls, strict=True)))
    result: Tensor = _CooperativeAdversarial.apply(*slots, pull, temperature, products, shards)
    return result


def _dtype_of_products(slots: Slots) -> torch.dtype:
    """Return bfloat16 under its autocast: factors of products may be rounded then, all else stays in float32."""
    device = slots.weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else slots.weight.dtype
