"""Residual blocks of two 3 × 3 convolutions whose batch norms and ReLUs are done where the convolutions read and write.

A batch norm needs the sums of its maps and of their squares, which the convolution in front of it takes as it writes them;
then it is a factor and a constant for each channel, with which the convolution behind it reads the maps. Of what lies
between two convolutions nothing is written to memory but the maps themselves, half of what a block would write. Gradients
of mean and variance are torch's own: they are functions of [2, C] numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from caco.cpu_kernels.threads import in_threads
from caco.winograd.convolution import WinogradConvolution, empty_maps, parts_of_images, pixels


def residual_block(
    maps: Tensor,
    convolutions: tuple[nn.Conv2d, nn.Conv2d],
    norms: tuple[nn.BatchNorm2d, nn.BatchNorm2d],
    shortcut: Tensor,
) -> Tensor:
    """Return relu(norm(convolution(relu(norm(convolution(maps))))) + shortcut), maps and shortcut [B, C, H, W]."""
    factors: Tensor | None = None
    for convolution, norm in zip(convolutions, norms, strict=True):
        own = uses_own_statistics(norm)
        maps, sums = WinogradConvolution.apply(maps, convolution.weight, convolution.stride[0], factors, own)
        factors = factors_of(norm, sums, maps.numel() // maps.shape[1])
    result: Tensor = Joined.apply(maps, factors, shortcut)
    return result


def uses_own_statistics(norm: nn.BatchNorm2d) -> bool:
    """Return whether a batch norm normalises by the statistics of its batch."""
    return norm.training or norm.running_mean is None


def factors_of(norm: nn.BatchNorm2d, sums: Tensor | None, count: int) -> Tensor:
    """Return factor and constant of each channel, [2, C], float64, that are a batch norm; keep its running statistics.

    sums: those of the maps and of their squares [2, C], over so many numbers, if it uses its own statistics.
    """
    if sums is None:
        assert norm.running_mean is not None and norm.running_var is not None
        mean, variance = norm.running_mean.double(), norm.running_var.double()
    else:
        mean = sums[0] / count
        variance = (sums[1] / count - mean.square()).clamp(min=0)
        if norm.training and norm.running_mean is not None:
            _keep_statistics(norm, mean.detach(), variance.detach() * (count / max(count - 1, 1)))
    factor = torch.rsqrt(variance + norm.eps)
    constant = -mean * factor
    if norm.affine:
        factor, constant = factor * norm.weight, constant * norm.weight + norm.bias
    return torch.stack([factor, constant])


@torch.no_grad()
def _keep_statistics(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
    norm.num_batches_tracked += 1
    share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), share)


class Joined(torch.autograd.Function):
    """relu(maps · factors[0] + factors[1] + shortcut): maps and shortcut [B, C, H, W], factors [2, C], float64."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, factors: Tensor, shortcut: Tensor) -> Tensor:
        from caco.winograd import joins

        shortcut = shortcut.contiguous(memory_format=torch.channels_last)
        result = empty_maps(maps, *maps.shape[1:])
        ctx.save_for_backward(maps, factors, result)
        arrays = pixels(maps), factors.detach().to(maps.dtype).numpy(), pixels(shortcut), pixels(result)
        in_threads(lambda first, last: joins.join(*arrays, first, last), parts_of_images(result))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from caco.winograd import joins

        maps, factors, result = ctx.saved_tensors
        pull = grad_outputs[0].contiguous(memory_format=torch.channels_last)
        of_maps, of_shortcut = (empty_maps(maps, *maps.shape[1:]) for _ in range(2))
        parts = parts_of_images(result)
        sums = factors.new_zeros(len(parts), *factors.shape)
        arrays = (
            pixels(maps),
            factors.to(maps.dtype).numpy(),
            pixels(result),
            pixels(pull),
            pixels(of_maps),
            pixels(of_shortcut),
        )

        def part(first: int, last: int) -> None:
            joins.part(*arrays, sums[parts.index((first, last))].numpy(), first, last)

        in_threads(part, parts)
        return of_maps, sums.sum(0), of_shortcut
