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
from caco.winograd.convolution import WinogradConvolution, as_array, empty_maps, parts_of_images, pixels

Layer = tuple[nn.Conv2d, nn.BatchNorm2d]


def residual_block(maps: Tensor, layers: tuple[Layer, Layer], shortcut: Tensor | Layer) -> Tensor:
    """Return relu(norm(convolution(relu(norm(convolution(maps))))) + shortcut), maps [B, C, H, W].

    shortcut: maps of the result's size, or the convolution of 1 × 1 with stride 2, as the first layer's, and norm that make it.
    """
    (first, first_norm), (second, second_norm) = layers
    beside, beside_norm = (None, None) if isinstance(shortcut, Tensor) else shortcut
    with_sums = any(uses_own_statistics(norm) for norm in (first_norm, beside_norm) if norm is not None)
    beside_weight, is_own = None if beside is None else beside.weight, shortcut is maps
    maps, sums, shortcut_maps, shortcut_sums, carried = WinogradConvolution.apply(
        maps, first.weight, first.stride[0], None, with_sums, beside_weight, is_own
    )
    factors, shortcut_factors = factors_of(first_norm, sums, maps), None
    if beside_norm is not None:
        shortcut_factors = factors_of(beside_norm, shortcut_sums, shortcut_maps)
    own = uses_own_statistics(second_norm)
    maps, sums, *_ = WinogradConvolution.apply(maps, second.weight, second.stride[0], factors, own)
    if isinstance(shortcut, Tensor):
        shortcut_maps = carried if is_own else shortcut
        shortcut_maps = shortcut_maps.to(maps.dtype).expand_as(maps)  # the compiled code relies on it
    result: Tensor = Joined.apply(maps, factors_of(second_norm, sums, maps), shortcut_maps, shortcut_factors)
    return result


def uses_own_statistics(norm: nn.BatchNorm2d) -> bool:
    """Return whether a batch norm normalises by the statistics of its batch."""
    return norm.training or norm.running_mean is None


def factors_of(norm: nn.BatchNorm2d, sums: Tensor | None, maps: Tensor) -> Tensor:
    """Return factor and constant of each channel, [2, C], float64, that are a batch norm of maps; keep its running statistics.

    sums: those of the maps [B, C, H, W] and of their squares, [2, C], for one that uses its own statistics.
    """
    count = maps.numel() // maps.shape[1]
    if sums is None or not uses_own_statistics(norm):
        assert norm.running_mean is not None and norm.running_var is not None
        mean, variance = norm.running_mean.double(), norm.running_var.double()
    else:
        mean = sums[0] / count
        variance = (sums[1] / count - mean.square()).clamp(min=0)
        if norm.training and norm.track_running_stats and norm.running_mean is not None:
            _keep_statistics(norm, mean.detach(), variance.detach() * (count / max(count - 1, 1)))
    factor = torch.rsqrt(variance + norm.eps)
    constant = -mean * factor
    if norm.affine:
        factor, constant = factor * norm.weight, constant * norm.weight + norm.bias
    return torch.stack([factor, constant])


@torch.no_grad()
def _keep_statistics(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    share = norm.momentum or 0.0
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked += 1
        share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), share)


class Joined(torch.autograd.Function):
    """relu(maps · factors[0] + factors[1] + shortcut): maps and shortcut [B, C, H, W], factors [2, C], float64.

    shortcut_factors: none, or two with which the shortcut is read, too.
    """

    @staticmethod
    def forward(
        ctx: Any, maps: Tensor, factors: Tensor, shortcut: Tensor, shortcut_factors: Tensor | None = None
    ) -> Tensor:
        from caco.winograd import joins

        shortcut = shortcut.contiguous(memory_format=torch.channels_last)
        result = empty_maps(maps, *maps.shape[1:])
        ctx.save_for_backward(maps, factors, None if shortcut_factors is None else shortcut, shortcut_factors, result)
        given = (
            pixels(maps),
            as_array(factors, maps),
            pixels(shortcut),
            as_array(shortcut_factors, maps),
            pixels(result),
        )
        in_threads(lambda first, last: joins.join(*given, first, last), parts_of_images(result))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        from caco.winograd import joins

        maps, factors, shortcut, shortcut_factors, result = ctx.saved_tensors
        pull = grad_outputs[0].contiguous(memory_format=torch.channels_last)
        of_maps, of_shortcut = (empty_maps(maps, *maps.shape[1:]) for _ in range(2))
        parts = parts_of_images(result)
        sums = factors.new_zeros(len(parts), 3, maps.shape[1])
        given = pixels(maps), as_array(factors, maps), pixels(maps[:0] if shortcut is None else shortcut)
        arrays = as_array(shortcut_factors, maps), pixels(result), pixels(pull), pixels(of_maps), pixels(of_shortcut)

        def part(first: int, last: int) -> None:
            joins.part(*given, *arrays, sums[parts.index((first, last))].numpy(), first, last)

        in_threads(part, parts)
        total = sums.sum(0)
        return of_maps, total[:2], of_shortcut, None if shortcut is None else total[[2, 1]]
