"""The bank's loss in its plain form: one matrix of all queries and all slots. The oracle of the streamed form."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries, slots, positives, weights, temperature, slot_temperature):
        cosines = queries @ slots.T
        ctx.save_for_backward(queries, slots, positives, weights, cosines)
        ctx.temperatures = temperature, slot_temperature
        return -(weights * torch.log_softmax(cosines / temperature, dim=1).gather(1, positives)).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        queries, slots, positives, weights, cosines = ctx.saved_tensors
        temperature, slot_temperature = ctx.temperatures
        weights = weights * grad_outputs[0]
        whole = weights.sum(dim=1, keepdim=True)
        ordinary = (whole * torch.softmax(cosines / temperature, dim=1)).scatter_add_(1, positives, -weights)
        probability = torch.softmax(cosines / slot_temperature, dim=1)
        change = weights * (1 - 2 * probability.gather(1, positives))
        flipped = (whole * probability).scatter_add_(1, positives, change)
        grad_slots = -(flipped.T @ queries) / slot_temperature
        return (ordinary @ slots) / temperature, grad_slots, None, None, None, None


def dense_loss(
    queries: Tensor, slots: Tensor, positives: Tensor, weights: Tensor, temperature: float, slot_temperature: float
) -> Tensor:
    """Return the loss of queries [N, D] against raw slots [K, D]; autograd goes through their normalisation."""
    unit: Tensor = F.normalize(slots, dim=1)
    return _Dense.apply(queries, unit, positives, weights, temperature, slot_temperature)


def dense_nearest(keys: Tensor, slots: Tensor) -> Tensor:
    return (keys @ F.normalize(slots, dim=1).T).argmax(dim=1)
