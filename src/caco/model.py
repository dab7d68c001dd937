"""CaCo: an encoder, its momentum copy, and a bank; from views to a loss."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from caco.bank import Bank
from caco.loss import Pull
from caco.slots import Slots


class ViewPair(NamedTuple):
    """One term of the loss: the query of one view, with the positive found by the key of another."""

    query: int
    key: int
    weight: float


def view_pairs(large: int, small: int) -> tuple[ViewPair, ...]:
    """Return the terms of the loss for `large` + `small` views, of which the first two have keys.

    Two views: CE(q₁, k₂) + CE(q₂, k₁), a sum. More: the mean over those two pairs, plus the mean over all pairs of a
    further view with either key (published `update_sym_network`, `update_multicrop_network`).
    """
    views = large + small
    if large < 2:
        raise ValueError(f"CaCo needs at least 2 large views, not {large}")
    big = [(0, 1), (1, 0)]
    others = [(query, key) for query in range(2, views) for key in range(2)]
    if not others:
        return tuple(ViewPair(query, key, 1.0) for query, key in big)
    return tuple(
        [ViewPair(query, key, 1 / len(big)) for query, key in big]
        + [ViewPair(query, key, 1 / len(others)) for query, key in others]
    )


class Positives(NamedTuple):
    """What the keys of a batch have chosen."""

    slots: Slots
    """The bank as this step sees it."""
    places: Int[Tensor, "2 B"]
    """The slot nearest to each key of view 1 and of view 2."""


class Share(NamedTuple):
    """What the queries of one view add to their step: the shares of all views add up to its `Output`."""

    loss: Tensor
    """Scalar with gradients for the encoder, and with the last share for the bank."""
    positive_probability: Tensor
    hit_rate: Tensor
    """Scalars, no gradient; 0 for views without a key, which are not measured."""
    mean_embedding: Float[Tensor, " D"]
    """No gradient; as above."""
    pull: Pull
    """What these queries do to the bank."""


class Output(NamedTuple):
    """The loss of one batch and what was measured on the way (no gradient; still on the device)."""

    loss: Tensor
    """Scalar."""
    positive_probability: Tensor
    """Scalar: mean probability that a query gives to its positive, over the two pairs of large views."""
    hit_rate: Tensor
    """Scalar: share of those queries whose nearest slot is their positive."""
    positives: Int[Tensor, "2 B"]
    """The slot chosen by each key."""
    feature_spread: Tensor
    """Scalar in 0-1: √(1 − ‖mean embedding‖²), the embeddings' root mean square distance from their mean; near 0 when
    all images have one embedding (collapse)."""


def add_up(shares: Sequence[Share], positives: Sequence[Int[Tensor, "2 b"]]) -> Output:
    """Return the output of a step from the shares of its views and its parts; positives: of each part."""
    loss, probability, hits, mean = (
        torch.stack([getattr(share, name).detach() for share in shares]).sum(0) for name in Share._fields[:4]
    )
    return Output(
        loss=loss,
        positive_probability=probability,
        hit_rate=hits,
        positives=torch.cat(tuple(positives), dim=1),
        feature_spread=(1 - mean.square().sum()).clamp_min(0).sqrt(),
    )


class CaCo(nn.Module):
    """Encoder f, momentum encoder f′ and bank W.

    encoder maps a view [B, C, S, S] to an embedding [B, D] (before normalisation). A step finds the positives, then takes
    one view after another forward *and backward* (`forward`): a query needs the other view's key, not its query, so only
    one view's activations are ever held, and nothing is computed twice for it. Nothing here has a side effect but the
    batch-norm statistics; the momentum update is a call of its own after the optimizer's step.
    """

    encoder: nn.Module
    key_encoder: nn.Module
    bank: Bank

    def __init__(self, encoder: nn.Module, bank: Bank, pairs: Sequence[ViewPair]) -> None:
        super().__init__()
        self.encoder = encoder
        self.key_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.bank = bank
        self.pairs = tuple(pairs)

    @torch.no_grad()
    def find_positives(self, views: Sequence[Tensor]) -> Positives:
        """Return the slots nearest to the keys of the first two views; views: [B, C, S, S] each."""
        keys = [embed(self.key_encoder, view) for view in views[:2]]
        slots = self.bank.slots()
        return Positives(slots, self.bank.nearest(torch.cat(keys), slots).view(2, -1))

    def forward(
        self, view: Tensor, number: int, positives: Positives, others: Sequence[Pull] | None, part: float = 1.0
    ) -> Share:
        """Return what the queries of one view [B, C, S, S] add to the step; its `loss` is for backward at once.

        A forward pass of its own, so that each view is normalised with its own batch statistics. number: which view it
        is. others: with the last view of a step the pulls of all views before, with which the bank gets its gradient, once
        for all queries; None: more views follow. part: of the whole batch, that these images are.
        """
        queries = embed(self.encoder, view)
        batch = len(queries)
        weights = positives.slots.weight.detach().new_zeros(batch, 2)
        for query, key, weight in self.pairs:
            if query == number:
                weights[:, key].fill_(weight * part / batch)  # an assignment would copy from the host, and wait for it
        result = self.bank.loss(queries, positives.slots, positives.places.T, weights)
        loss = result.loss
        if others is not None:
            loss = loss + self.bank.slot_term(positives.slots, [*others, result.pull])
        if number > 1:
            zero = loss.new_zeros(())
            return Share(loss, zero, zero, torch.zeros_like(queries[0]), result.pull)
        # View 1 is judged by the slot of key 2, view 2 by the slot of key 1: half of what is measured each.
        probability, hit = result.positive_probability[:, 1 - number], result.hit[:, 1 - number].float()
        half = part / 2
        return Share(
            loss, probability.mean() * half, hit.mean() * half, queries.detach().mean(dim=0) * half, result.pull
        )

    @torch.no_grad()
    def update_key_encoder(self, momentum: float) -> None:
        """f′ ← momentum·f′ + (1 − momentum)·f, over parameters only: f′ keeps its own batch-norm statistics."""
        own: list[Tensor] = list(self.key_encoder.parameters())
        new: list[Tensor] = list(self.encoder.parameters())
        torch._foreach_lerp_(own, new, 1 - momentum)

    @torch.no_grad()
    def copy_to_key_encoder(self) -> None:
        """f′ ← f, over parameters only (the end of the warm start)."""
        for own, new in zip(self.key_encoder.parameters(), self.encoder.parameters(), strict=True):
            own.copy_(new)


class WarmStart(nn.Module):
    """Ordinary contrast, with which the bank is filled before CaCo begins (published `init_memory`)."""

    def __init__(self, model: CaCo, temperature: float = 0.2) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, views: Sequence[Tensor]) -> tuple[Tensor, Float[Tensor, "B D"]]:
        """Return the InfoNCE loss of view 1 against view 2's key and the bank, and those keys, to be stored.

        logits = [q·k, q·slotsᵀ] / temperature (published: 0.2), label 0. The bank gets no gradient.
        """
        query = embed(self.model.encoder, views[0])
        with torch.no_grad():
            key = embed(self.model.key_encoder, views[1])
            slots = self.model.bank.slots()
        with torch.autocast(query.device.type, enabled=False):
            positive = (query * key).sum(dim=1) / self.temperature
            negatives = self.model.bank.log_sum_exp(query, slots, self.temperature)
            loss = (torch.logaddexp(positive, negatives) - positive).mean()
        return loss, key


def embed(encoder: nn.Module, view: Tensor) -> Float[Tensor, "B D"]:
    """Return a view's embeddings as L2-normalised rows, in float32 at least."""
    embedding = encoder(view)
    with torch.autocast(view.device.type, enabled=False):
        working = torch.promote_types(embedding.dtype, torch.float32)
        return F.normalize(embedding.to(working), dim=1)
