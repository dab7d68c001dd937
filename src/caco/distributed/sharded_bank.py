"""A bank of which each process keeps its share of the slots: K/N rows, their gradient and their velocity.

Queries and keys are gathered; log-sum-exp and arg-max are reduced over the processes. What is exchanged in a step does
not depend on K, so a bank of millions of slots grows with the number of machines.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from caco.bank import Bank, BankLoss, random_rows
from caco.distributed.world import World


class ShardedBank(Bank):
    """Slots rank·K/N … (rank + 1)·K/N − 1 of a bank; everything else as `Bank`, to rounding.

    Indices of slots are those of the whole bank. Its gradient is complete: no averaging over processes follows.
    """

    def __init__(
        self, size: int, width: int, temperature: float = 0.08, slot_temperature: float = 0.08, *, world: World
    ) -> None:
        if size % world.size:
            raise ValueError(f"{size} slots cannot be divided among {world.size} processes")
        self.world, self.share = world, size // world.size
        self.first = world.rank * self.share
        super().__init__(size, width, temperature, slot_temperature)

    def own_random_rows(self, width: int) -> Float[Tensor, "k D"]:
        parts, begin = [], 0
        for block in random_rows(self.size, width):
            low, high = max(self.first - begin, 0), max(self.first + self.share - begin, 0)
            parts.append(block[low:high].clone())
            begin += len(block)
        return torch.cat(parts)

    def own(self, rows: Tensor) -> Tensor:
        return rows[self.first : self.first + self.share]

    def whole(self, rows: Tensor) -> Tensor:
        """Return all rows in the main process; in others an empty tensor (only the main one writes checkpoints)."""
        if self.world.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.world.size)] if self.world.is_main else None
        dist.gather(rows.contiguous(), parts, dst=0)
        return torch.cat(parts) if parts is not None else rows.new_empty(0, *rows.shape[1:])

    def log_sum_exp(
        self, queries: Float[Tensor, "N D"], slots: Float[Tensor, "k D"], temperature: float
    ) -> Float[Tensor, " N"]:
        result: Tensor = _ShardedLogSumExp.apply(queries, slots, temperature, self.world)
        return result

    @torch.no_grad()
    def nearest(self, keys: Float[Tensor, "N D"], slots: Float[Tensor, "k D"]) -> Int[Tensor, " N"]:
        with torch.autocast(keys.device.type, enabled=False):
            best, place = (self.world.gather(keys.to(slots.dtype)) @ slots.T).max(dim=1)
        all_best = self.world.gather(best[None])
        all_places = self.world.gather(place[None] + self.first)
        winner = all_best.argmax(dim=0, keepdim=True)
        return _rows_of(self.world, all_places.gather(0, winner)[0])

    def loss(
        self,
        queries: Float[Tensor, "N D"],
        slots: Float[Tensor, "k D"],
        positives: Int[Tensor, "N P"],
        weights: Float[Tensor, "N P"],
    ) -> BankLoss:
        with torch.autocast(queries.device.type, enabled=False):
            temperatures = self.temperature, self.slot_temperature
            world = self.world
            return BankLoss(*_ShardedLoss.apply(queries, slots, positives, weights, *temperatures, self.first, world))

    def _store(self, rows: Tensor, first: int) -> None:
        low, high = max(first, self.first), min(first + len(rows), self.first + self.share)
        if low < high:
            self.weight[low - self.first : high - self.first] = rows[low - first : high - first]


class _ShardedLoss(torch.autograd.Function):
    """`caco.bank._CooperativeAdversarial` with the slots spread over processes; see there for the mathematics."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        slots: Tensor,
        positives: Tensor,
        weights: Tensor,
        temperature: float,
        slot_temperature: float,
        first: int,
        world: World,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        all_queries, all_weights = world.gather(queries), world.gather(weights)
        places = world.gather(positives) - first
        here = (places >= 0) & (places < len(slots))
        places = places.clamp(0, len(slots) - 1)
        cosines = all_queries @ slots.T
        positive_cosines = world.sum(torch.where(here, cosines.gather(1, places), 0))
        largest = world.maximum(cosines.amax(dim=1, keepdim=True))
        log_normaliser = _log_sum_exp(cosines / temperature, world)
        log_probability = positive_cosines / temperature - log_normaliser
        query_loss = -(all_weights * log_probability).sum(dim=1)
        ctx.save_for_backward(all_queries, slots, places, here, all_weights, positive_cosines, cosines, log_normaliser)
        ctx.temperatures, ctx.world = (temperature, slot_temperature), world
        measured = query_loss, log_probability.exp(), positive_cosines >= largest
        own_loss, probability, hit = (_rows_of(world, values) for values in measured)
        ctx.mark_non_differentiable(own_loss, probability, hit)
        return own_loss.sum(), own_loss, probability, hit

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        queries, slots, places, here, weights, positive_cosines, cosines, log_normaliser = ctx.saved_tensors
        (temperature, slot_temperature), world = ctx.temperatures, ctx.world
        positive_weights = weights * grad_outputs[0]  # the same in every process: all compute the same mean
        weight = positive_weights.sum(dim=1, keepdim=True)

        probability = torch.exp(cosines / temperature - log_normaliser)
        pull = (weight * probability).scatter_add_(1, places, torch.where(here, -positive_weights, 0))
        grad_queries = _rows_of(world, world.sum(pull @ slots)) / temperature

        if slot_temperature != temperature:
            log_normaliser = _log_sum_exp(cosines / slot_temperature, world)
            probability = torch.exp(cosines / slot_temperature - log_normaliser)
        positive_probability = torch.exp(positive_cosines / slot_temperature - log_normaliser)
        change = torch.where(here, positive_weights * (1 - 2 * positive_probability), 0)
        flipped = (weight * probability).scatter_add_(1, places, change)
        # Each process has weighed by its own batch: the mean over all batches is the sum divided by their number.
        grad_slots = -(flipped.T @ queries) / (slot_temperature * world.size)
        return grad_queries, grad_slots, None, None, None, None, None, None


class _ShardedLogSumExp(torch.autograd.Function):
    """log Σ exp(cosine / temperature) over the slots of all processes, with the gradient for the queries alone."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, slots: Tensor, temperature: float, world: World) -> Tensor:
        logits = world.gather(queries) @ slots.T / temperature
        result = _log_sum_exp(logits, world)
        ctx.save_for_backward(slots, torch.exp(logits - result))
        ctx.temperature, ctx.world = temperature, world
        return _rows_of(world, result[:, 0])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        slots, probability = ctx.saved_tensors
        weight = ctx.world.gather(grad_outputs[0])[:, None]
        grad_queries = ctx.world.sum((weight * probability) @ slots) / ctx.temperature
        return _rows_of(ctx.world, grad_queries), None, None, None


def _log_sum_exp(logits: Tensor, world: World) -> Tensor:
    """Return log Σ exp over the columns of all processes, [N, 1]."""
    return torch.logsumexp(world.gather(torch.logsumexp(logits, dim=1)[None]), dim=0)[:, None]


def _rows_of(world: World, rows: Tensor) -> Tensor:
    """Return this process's part of gathered rows."""
    count = len(rows) // world.size
    return rows[world.rank * count : (world.rank + 1) * count]
