"""Networks whose convolutions are Winograd's: which of them suit, and how they are exchanged and put back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from caco.compiled_code import has_numba
from caco.winograd.agreement import agrees
from caco.winograd.convolution import PLACES, convolve
from caco.winograd.residual import residual_block

DTYPES = {(torch.float32,) * 2, (torch.float64,) * 2}
"""Of maps and filters; under autocast maps may be bfloat16. (A network that is bfloat16 altogether is left to torch.)"""
BLOCKS = {("timm.models.resnet", "BasicBlock"), ("torchvision.models.resnet", "BasicBlock")}
"""Residual blocks of two 3 × 3 convolutions, each with a batch norm: module and name of their classes."""
NOTHING = (nn.Identity, type(None))
"""Types of what a block may have where it could have another layer."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where a module keeps those who want to know when it is called."""
LEAST_CHANNELS = 64
"""Channels in and out below which the transforms take longer than the products they save."""
WHOLE_VECTORS = 32
"""Of what channels must be a multiple: the widest panel there is (`products.py`)."""
MOST_PRODUCTS = {1: 0.4, 2: 0.6}
"""Of each stride: products, as a share of the direct convolution's, above which nothing is won: maps smaller than a tile."""


def computed_as(maps: Tensor) -> torch.dtype:
    """Return in what torch's convolution would compute maps of a CPU: under autocast in its type, but for float64."""
    is_cast = torch.is_autocast_enabled("cpu") and maps.is_floating_point() and maps.dtype != torch.float64
    return torch.get_autocast_dtype("cpu") if is_cast else maps.dtype


class Convolution(nn.Conv2d):
    """A convolution of 3 × 3 with stride 1 or 2 and padding 1, by Winograd's filtering where that pays."""

    def forward(self, input: Tensor) -> Tensor:
        """Return what nn.Conv2d returns, with other rounding (docs/performance.md)."""
        if not (self.suits(input) and self.pays(*input.shape[2:]) and agrees(computed_as(input))):
            return super().forward(input)
        output = convolve(input.to(computed_as(input)), self.weight, self.stride[0])
        return output if self.bias is None else output + self.bias[:, None, None].to(output.dtype)

    def suits(self, input: Tensor) -> bool:
        """Return whether the input is one for Winograd's filtering; of wrong ones nn.Conv2d tells best what is wrong."""
        return (
            input.device.type == "cpu"
            and self._suit_types(input)
            and input.dim() == 4
            and len(input) > 0
            and input.shape[1] == self.in_channels
        )

    def _suit_types(self, input: Tensor) -> bool:
        dtypes = computed_as(input), self.weight.dtype
        return dtypes in DTYPES or (torch.is_autocast_enabled("cpu") and dtypes == (torch.bfloat16, torch.float32))

    def pays(self, height: int, width: int) -> bool:
        """Return whether maps of so many pixels are large enough for its tiles."""
        stride = self.stride[0]
        height, width = -(-height // stride), -(-width // stride)
        tiles = -(-height // 4) * -(-width // 4)
        return PLACES[stride] * tiles <= MOST_PRODUCTS[stride] * 9 * height * width


class Block(nn.Module):
    """A residual block of two such convolutions, mixed into its class: computed as one where it can be (`residual.py`)."""

    def forward(self, x: Tensor, *others: Any, **options: Any) -> Tensor:
        """Return what the block returns, with other rounding."""
        block: Any = self
        if others or options or not _is_plain(block) or not _suits_block(block, x):
            return super().forward(x, *others, **options)  # type: ignore[no-any-return]
        layers = (block.conv1, block.bn1), (block.conv2, block.bn2)
        if block.downsample is None:
            return residual_block(x, layers, x)
        beside: tuple[Any, ...] = tuple(block.downsample.children())
        return residual_block(x, layers, beside if _rides_along(block, beside) else block.downsample(x))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Be pickled and copied without a class that no module has."""
        return _blank, (type(self).__mro__[2],), vars(self)


def _is_plain(block: Any) -> bool:
    """Return whether a block is two convolutions with batch norms and ReLUs and nothing else, which nobody listens to."""
    kinds = {"conv1": Convolution, "bn1": nn.BatchNorm2d, "conv2": Convolution, "bn2": nn.BatchNorm2d}
    return (
        all(type(getattr(block, name)) is kind for name, kind in kinds.items())
        and all(type(getattr(block, name, None)) in NOTHING for name in ("drop_block", "aa", "se", "drop_path"))
        and all(type(getattr(block, name, None)) in (nn.ReLU, type(None)) for name in ("act1", "act2", "relu"))
        and block.conv1.bias is None
        and block.conv2.bias is None
        and (block.bn1.num_features, block.bn2.num_features) == (block.conv1.out_channels, block.conv2.out_channels)
        and block.conv1.out_channels == block.conv2.in_channels
        and block.conv1.weight.dtype == block.conv2.weight.dtype
        and not any(map(_is_watched, block.children()))
        and not any(getattr(nn.modules.module, f"_global{hooks}") for hooks in HOOKS)
    )


def _rides_along(block: Any, beside: tuple[Any, ...]) -> bool:
    """Return whether a shortcut's layers are a convolution of 1 × 1 that meets pixels which the first one's tiles have, too."""
    return (
        type(block.downsample) is nn.Sequential
        and [type(layer) for layer in beside] == [nn.Conv2d, nn.BatchNorm2d]
        and not any(map(_is_watched, beside))
        and _geometry(beside[0]) == ((1, 1), (2, 2), 1)
        and beside[0].padding in ((0, 0), "valid")
        and beside[0].bias is None
        and block.conv1.stride == (2, 2)
        and beside[0].weight.shape[:2] == block.conv1.weight.shape[:2]
    )


def _geometry(convolution: Any) -> tuple[Any, ...]:
    return convolution.kernel_size, convolution.stride, convolution.groups


def _is_watched(layer: nn.Module) -> bool:
    """Return whether somebody wants to know when a layer is called, or has changed what it does."""
    return "forward" in vars(layer) or any(vars(layer)[hooks] for hooks in HOOKS)


def _suits_block(block: Any, maps: Tensor) -> bool:
    """Return whether both convolutions of a block are Winograd's for these maps."""
    stride = block.conv1.stride[0]
    return bool(
        block.conv1.suits(maps)
        and computed_as(maps) == maps.dtype  # else torch adds the shortcut in float32
        and block.conv1.pays(*maps.shape[2:])
        and block.conv2.pays(*(-(-side // stride) for side in maps.shape[2:]))
        and agrees(maps.dtype)
    )


def _blank(kind: type) -> Any:
    return nn.Module.__new__(_with_block(kind))


_MIXED: dict[type, type] = {}


def _with_block(kind: type) -> type:
    """Return a block's class with `Block` mixed in, the same one each time."""
    return _MIXED.setdefault(kind, type(kind.__name__, (Block, kind), {}))


def use_winograd(network: nn.Module) -> None:
    """Let the network's convolutions that can be computed by Winograd's filtering be so, and its residual blocks as one, in place.

    Only classes change, so parameters, names, hooks and what an optimizer holds of them stay.
    """
    for module in suited(network):
        module.__class__ = Convolution
    for module in network.modules():
        if (type(module).__module__, type(module).__name__) in BLOCKS:
            module.__class__ = _with_block(type(module))


def use_direct(network: nn.Module) -> None:
    """Undo `use_winograd`."""
    for module in network.modules():
        if type(module) is Convolution:
            module.__class__ = nn.Conv2d  # type: ignore[assignment]
        elif isinstance(module, Block):
            module.__class__ = type(module).__mro__[2]


def can_use_winograd() -> bool:
    """Return whether it has what it needs."""
    return has_numba()


def suits_winograd(network: nn.Module) -> bool:
    """Return whether `use_winograd` would change, or has changed, anything in the network."""
    return uses_winograd(network) or bool(suited(network))


def uses_winograd(network: nn.Module) -> bool:
    """Return whether `use_winograd` has changed anything in the network."""
    return any(type(module) is Convolution for module in network.modules())


def suited(network: nn.Module) -> list[nn.Module]:
    """Return the convolutions that `use_winograd` would change."""
    return [module for module in network.modules() if _fits(module)]


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
