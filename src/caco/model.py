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


class Output(NamedTuple):
    """The loss of one batch and what was measured on the way (no gradient; still on the device)."""

    loss: Tensor
    """Scalar with gradients for the encoder and, cooperative-adversarially, for the bank."""
    positive_probability: Tensor
    """Scalar: mean probability that a query gives to its positive, over the two pairs of large views."""
    hit_rate: Tensor
    """Scalar: share of those queries whose nearest slot is their positive."""
    positives: Int[Tensor, "2 B"]
    """The slot chosen by each key."""
    feature_spread: Tensor
    """Scalar in 0-1: √(1 − ‖mean embedding‖²), the embeddings' root mean square distance from their mean; near 0 when
    all images have one embedding (collapse)."""


def mean_output(outputs: Sequence[Output]) -> Output:
    """Return the output of a batch that went through in equal parts."""
    means = {
        name: torch.stack([getattr(part, name).detach() for part in outputs]).mean(0) for name in Output._fields[:3]
    }
    positives = torch.cat([part.positives for part in outputs], dim=1)
    spread = torch.stack([part.feature_spread for part in outputs]).mean()
    return Output(**means, positives=positives, feature_spread=spread)


class CaCo(nn.Module):
    """Encoder f, momentum encoder f′ and bank W.

    encoder maps a view [B, C, S, S] to an embedding [B, D] (before normalisation). `forward` has no side effect but the
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

    def forward(self, views: Sequence[Tensor]) -> Output:
        """Return the loss of a batch; views: one [B, C, S, S] for each view, the two with keys first.

        Each view is a forward pass of its own, so each is normalised with its own batch statistics.
        """
        queries = [embed(self.encoder, view) for view in views]
        with torch.no_grad():
            keys = [embed(self.key_encoder, view) for view in views[:2]]
        slots = self.bank.slots()
        positives = self.bank.nearest(torch.cat(keys), slots).view(2, -1)
        return self.contrast(queries, slots, positives)

    def contrast(
        self,
        queries: Sequence[Float[Tensor, "B D"]],
        slots: Slots,
        positives: Int[Tensor, "2 B"],
    ) -> Output:
        """Return the loss of normalised queries (one entry a view) against the slots; positives[i]: chosen by key i."""
        batch = len(queries[0])
        weights = slots.weight.detach().new_zeros(len(queries), 2)
        for query, key, weight in self.pairs:
            weights[query, key].fill_(weight / batch)  # an assignment would copy from the host, and wait for it
        result = self.bank.loss(
            torch.cat(tuple(queries)),
            slots,
            positives.T.repeat(len(queries), 1),
            weights.repeat_interleave(batch, dim=0),
        )
        # Rows 0..B-1 are view 1, judged by the slot of key 2; rows B..2B-1 are view 2, judged by the slot of key 1.
        probability = result.positive_probability.view(-1, batch, 2)
        hit = result.hit.view(-1, batch, 2)
        mean = torch.cat(tuple(queries[:2])).detach().mean(dim=0)
        return Output(
            loss=result.loss,
            positive_probability=(probability[0, :, 1].mean() + probability[1, :, 0].mean()) / 2,
            hit_rate=(hit[0, :, 1].float().mean() + hit[1, :, 0].float().mean()) / 2,
            positives=positives,
            feature_spread=(1 - mean.square().sum()).clamp_min(0).sqrt(),
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
