"""Whether an encoder that is only used, on a CPU, takes Winograd's convolutions: by its work alone, so the same each time."""

from __future__ import annotations

import torch
from torch import nn

from caco.backbone import try_size
from caco.winograd.agreement import agrees
from caco.winograd.network import can_use_winograd, suited, use_winograd

WORTHWHILE = 3e12
"""Multiplications in convolutions that suit, of all images, from which on it pays to have them compiled (20 s, once)."""


def use_fast_convolutions(
    backbone: nn.Module, size: int, images: int, device: torch.device, precision: torch.dtype
) -> None:
    """Let a backbone take Winograd's convolutions, in place, where that is faster for so many images of size × size pixels.

    In float32 only: torch's own bfloat16 is as fast where there is no gradient. Their rounding is that of float32
    (docs/performance.md).
    """
    if device.type != "cpu" or precision != torch.float32 or not can_use_winograd():
        return
    if images * _products(backbone, size) >= WORTHWHILE and agrees(precision):
        use_winograd(backbone)


def _products(backbone: nn.Module, size: int) -> float:
    """Return the multiplications of one picture in the convolutions that suit."""
    counts: list[float] = []

    def count(layer: nn.Module, given: object, result: torch.Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        counts.append(layer.weight[0].numel() * result[0].numel())

    hooks = [layer.register_forward_hook(count) for layer in suited(backbone)]
    try:
        if hooks:
            try_size(backbone, size)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(counts)
