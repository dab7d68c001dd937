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
    indices: Int[Tensor, "2 B"]
    """The slot nearest to each key of view 1 and of view 2."""


class ViewOutput(NamedTuple):
    """What the queries of one view add to their step; `step_output` adds up those of all views."""

    loss: Tensor
    """Scalar with gradients for the encoder, and with the last view for the bank."""
    positive_probability: Tensor
    hit_rate: Tensor
    """Scalars, no gradient; 0 for views without a key, which are not measured."""
    mean_embedding: Float[Tensor, " D"]
    """No gradient; as above."""
    pull: Pull
    """What these queries do to the bank."""


class StepOutput(NamedTuple):
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


def step_output(outputs: Sequence[ViewOutput], positives: Sequence[Int[Tensor, "2 b"]]) -> StepOutput:
    """Add up the outputs of all views, of all parts of a batch; positives: the indices of each part."""
    loss, probability, hits, mean = (
        torch.stack([getattr(output, name).detach() for output in outputs]).sum(0) for name in ViewOutput._fields[:4]
    )
    return StepOutput(
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

    @property
    def backbone(self) -> nn.Module:
        """The encoder without its projector: what a run is for."""
        return self.encoder.get_submodule("backbone")

    @torch.no_grad()
    def find_positives(self, views: Sequence[Tensor]) -> Positives:
        """Return the slots nearest to the keys of the first two views; views: [B, C, S, S] each."""
        keys = [embed(self.key_encoder, view) for view in views[:2]]
        slots = self.bank.slots()
        return Positives(slots, self.bank.nearest(torch.cat(keys), slots).view(2, -1))

    def forward(
        self,
        view: Tensor,
        view_index: int,
        positives: Positives,
        fraction: float = 1.0,
        earlier_pulls: Sequence[Pull] | None = None,
    ) -> ViewOutput:
        """Return what the queries of one view [B, C, S, S] add to the step; call backward on its loss before the next view.

        A forward pass of its own, so that each view is normalised with its own batch statistics.
        fraction: of the whole batch, that these images are.
        earlier_pulls: for the last view of a step only, the pulls of all views before it. The loss then holds the term
        that gives the bank its gradient, once for all queries. (Here and not in the step, since data parallelism averages
        the gradients of what its forward has used.)
        """
        queries = embed(self.encoder, view)
        weights = self._weights(view_index, len(queries), like=positives.slots.weight) * fraction
        result = self.bank.loss(queries, positives.slots, positives.indices.T, weights)
        loss = result.loss
        if earlier_pulls is not None:
            loss = loss + self.bank.slot_term(positives.slots, [*earlier_pulls, result.pull])
        if view_index > 1:
            zero = loss.new_zeros(())
            return ViewOutput(loss, zero, zero, torch.zeros_like(queries[0]), result.pull)
        # View 1 is judged by the slot of key 2, view 2 by the slot of key 1: half of what is measured each.
        half, key = fraction / 2, 1 - view_index
        return ViewOutput(
            loss,
            positive_probability=result.positive_probability[:, key].mean() * half,
            hit_rate=result.hit[:, key].float().mean() * half,
            mean_embedding=queries.detach().mean(dim=0) * half,
            pull=result.pull,
        )

    def _weights(self, view_index: int, batch: int, like: Tensor) -> Float[Tensor, "B 2"]:
        """Return how much each query of a view counts with the positive of each key: a mean over the batch."""
        weights = like.new_zeros(batch, 2)
        for query, key, weight in self.pairs:
            if query == view_index:
                weights[:, key].fill_(weight / batch)  # an assignment would copy from the host, and wait for it
        return weights

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
