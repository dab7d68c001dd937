"""Networks whose convolutions are Winograd's: which of them suit, and how they are exchanged and put back."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor, nn

from caco.winograd.convolution import PLACES, WinogradConvolution

LEAST_CHANNELS = 64
"""Channels in and out below which the transforms take longer than the products they save."""
WHOLE_VECTORS = 32
"""Of what channels must be a multiple: the widest panel there is (`products.py`)."""
MOST_PRODUCTS = {1: 0.4, 2: 0.6}
"""Of each stride: products, as a share of the direct convolution's, above which nothing is won: maps smaller than a tile."""


class Convolution(nn.Conv2d):
    """A convolution of 3 × 3 with stride 1 or 2 and padding 1, by Winograd's filtering where that pays."""

    def forward(self, input: Tensor) -> Tensor:
        """Return what nn.Conv2d returns, with other rounding (docs/performance.md)."""
        if not self._suits(input):
            return super().forward(input)
        output: Tensor = WinogradConvolution.apply(input, self.weight, self.stride[0])
        return output if self.bias is None else output + self.bias[:, None, None]

    def _suits(self, input: Tensor) -> bool:
        """Return whether the input is one for Winograd's filtering; of wrong ones nn.Conv2d tells best what is wrong."""
        return (
            input.device.type == "cpu"
            and input.dtype == self.weight.dtype
            and input.dtype in (torch.float32, torch.float64)
            and not torch.is_autocast_enabled("cpu")
            and input.dim() == 4
            and len(input) > 0
            and input.shape[1] == self.in_channels
            and _share_of_products(self.stride[0], *input.shape[2:]) <= MOST_PRODUCTS[self.stride[0]]
        )


def _share_of_products(stride: int, height: int, width: int) -> float:
    """Return the products of Winograd's filtering of maps as a share of those of the direct convolution."""
    height, width = -(-height // stride), -(-width // stride)
    tiles = -(-height // 4) * -(-width // 4)
    return PLACES[stride] * tiles / (9 * height * width)


def use_winograd(network: nn.Module) -> None:
    """Let the network's convolutions that can be computed by Winograd's filtering be so, in place.

    Only their class changes, so parameters, names, hooks and what an optimizer holds of them stay.
    """
    for module in network.modules():
        if _fits(module):
            module.__class__ = Convolution


def use_direct(network: nn.Module) -> None:
    """Undo `use_winograd`."""
    for module in network.modules():
        if type(module) is Convolution:
            module.__class__ = nn.Conv2d  # type: ignore[assignment]


def can_use_winograd() -> bool:
    """Return whether what it needs is installed."""
    return find_spec("numba") is not None


def suits_winograd(network: nn.Module) -> bool:
    """Return whether `use_winograd` would change, or has changed, anything in the network."""
    return any(_fits(module) or type(module) is Convolution for module in network.modules())


def _fits(module: nn.Module) -> bool:
    """Return whether a module is a convolution that suits: not narrow, and of no class that may do something else."""
    return (
        type(module) is nn.Conv2d
        and (module.kernel_size, module.dilation) == ((3, 3), (1, 1))
        and module.stride in ((1, 1), (2, 2))
        and module.padding in ((1, 1), "same")
        and (module.groups, module.padding_mode) == (1, "zeros")
        and min(module.in_channels, module.out_channels) >= LEAST_CHANNELS
        and module.in_channels % WHOLE_VECTORS == module.out_channels % WHOLE_VECTORS == 0
    )
