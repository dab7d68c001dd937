"""Whether Winograd's convolutions give here what torch's own give, seen before they are used: a compiler may be wrong, too."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from caco.own_kernels import works
from caco.winograd.residual import residual_block

LARGEST_DEVIATION = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 0.15}
"""Relative deviation of results and gradients of two blocks from torch's float64 that rounding explains, for each type of maps."""


def agrees(dtype: torch.dtype) -> bool:
    """Return whether residual blocks of maps of a type, forward and backward, are here what torch makes of them.

    Looked at once. (Not where torch.compile reads this: it would write the trial into its program.)
    """
    return torch.compiler.is_compiling() or _agrees(dtype)


@lru_cache
def _agrees(dtype: torch.dtype) -> bool:
    # In a thread of its own, which has none of the caller's modes: autocast, no gradient, a checkpoint's hooks.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(works, f"Winograd's convolutions of {dtype}", partial(_problem, dtype)).result()


def _problem(dtype: torch.dtype, channels: int = 64) -> str:
    """Return how far two blocks, with stride 2 and 1, deviate from torch's in float64, "" where that is rounding."""
    generator = torch.Generator().manual_seed(0)
    layers = _layers(channels, generator).to(torch.float64 if dtype == torch.float64 else torch.float32)
    exact = copy.deepcopy(layers).double()
    maps = torch.randn(16, channels, 16, 16, generator=generator).to(dtype)
    found = maps.contiguous(memory_format=torch.channels_last).requires_grad_()
    true = maps.double().requires_grad_()
    pairs = zip(
        _results(_by_winograd(found, layers), found, layers),
        _results(_plain(true, exact), true, exact),
        strict=True,
    )
    deviation = (
        torch.stack([(ours.double() - plain).norm() / plain.norm() for ours, plain in pairs]).amax().item()
    )  # or NaN
    return "" if deviation < LARGEST_DEVIATION[dtype] else f"they deviate by {deviation:.2g} from torch's own"


def _layers(channels: int, generator: torch.Generator) -> nn.ModuleList:
    """Return convolutions, each with its batch norm: of a block with stride 2, of its shortcut, of one with stride 1."""
    layers = nn.ModuleList()
    for size, stride in ((3, 2), (3, 1), (1, 2), (3, 1), (3, 1)):
        with torch.device("meta"):  # else torch would draw filters, which moves the caller's random numbers
            convolution = nn.Conv2d(channels, channels, size, stride, padding=size // 2, bias=False)
        filters = torch.randn(convolution.weight.shape, generator=generator) / (size * channels**0.5)
        convolution.weight = nn.Parameter(filters)
        layers.extend([convolution, nn.BatchNorm2d(channels)])
    return layers


def _by_winograd(maps: Tensor, layers: nn.ModuleList) -> Tensor:
    first, second, beside, third, fourth = zip(layers[::2], layers[1::2], strict=True)
    maps = residual_block(maps, (first, second), beside)  # type: ignore[arg-type]
    return residual_block(maps, (third, fourth), maps)  # type: ignore[arg-type]


def _plain(maps: Tensor, layers: nn.ModuleList) -> Tensor:
    first, second, beside, third, fourth = (nn.Sequential(*layers[at : at + 2]) for at in range(0, len(layers), 2))
    maps = (second(first(maps).relu()) + beside(maps)).relu()
    result: Tensor = (fourth(third(maps).relu()) + maps).relu()
    return result


def _results(result: Tensor, maps: Tensor, layers: nn.ModuleList) -> list[Tensor]:
    """Return the result and the gradients of maps and filters."""
    pull = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)
    filters = [parameter for parameter in layers.parameters() if parameter.dim() == 4]
    return [result.detach(), *torch.autograd.grad(result, [maps, *filters], pull)]
