"""Winograd's convolution as torch and networks see it: a function with its gradient, and the module that uses it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Result = TypeVar("Result")

FILTER = torch.tensor(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
    dtype=torch.float64,
)
"""G: a transformed filter is G g Gᵀ."""
INPUT = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
"""Bᵀ: a transformed input tile is Bᵀ d B."""
OUTPUT = np.array(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1], [0] * 6, [0] * 6]
)
"""Aᵀ: an output tile is Aᵀ m A; with two rows of zeros, for the transforms take 6 × 6."""

BLOCK, LEAST_TILES = 128, 32
"""Tiles of a thread at a time: enough for fast products, few enough for its cache; and those for which one is woken."""
LEAST_CHANNELS, LEAST_SIDE = 64, 4
"""Below so many channels or pixels a side, the transforms take longer than the products they save."""


class Convolution(nn.Conv2d):
    """A convolution of 3 × 3 with stride and padding 1, by Winograd's filtering where that pays."""

    def forward(self, input: Tensor) -> Tensor:
        """Return what nn.Conv2d returns, with other rounding (two or three times as much as its own)."""
        usable = input.dtype == self.weight.dtype and input.dtype in (torch.float32, torch.float64)
        if (
            not usable
            or input.device.type != "cpu"
            or min(input.shape[2:]) < LEAST_SIDE
            or torch.is_autocast_enabled("cpu")
        ):
            return super().forward(input)
        output: Tensor = WinogradConvolution.apply(input, self.weight)
        return output if self.bias is None else output + self.bias[:, None, None]


def use_winograd(network: nn.Module) -> None:
    """Let the network's convolutions that can be computed by Winograd's filtering be so, in place; names stay."""
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
    """Return whether `use_winograd` changes anything in the network."""
    return any(_fits(module) for module in network.modules())


def _fits(module: nn.Module) -> bool:
    """Return whether a module is a plain convolution of 3 × 3, neither a subclass nor narrow."""
    return (
        type(module) is nn.Conv2d
        and (module.kernel_size, module.stride, module.dilation) == ((3, 3), (1, 1), (1, 1))
        and module.padding in ((1, 1), 1, "same")
        and (module.groups, module.padding_mode) == (1, "zeros")
        and min(module.in_channels, module.out_channels) >= LEAST_CHANNELS
    )


class WinogradConvolution(torch.autograd.Function):
    """The convolution of maps [B, C, H, W] with filters [O, C, 3, 3], stride and padding 1, no bias."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor) -> Tensor:
        maps = maps.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(maps, weight)
        filters = transform_filters(weight)
        shape = len(maps), len(weight), *maps.shape[2:]
        result = torch.empty(shape, dtype=maps.dtype, memory_format=torch.channels_last)

        def convolve(images: slice) -> None:
            for block, inputs, products in _blocks(maps, images, len(weight)):
                inputs_to_tiles(maps[block], inputs)
                torch.bmm(inputs, filters.transpose(1, 2), out=products)
                tiles_to_outputs(products, result[block])

        in_threads(convolve, maps)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        maps, weight = ctx.saved_tensors
        outputs = grad_outputs[0].contiguous(memory_format=torch.channels_last)
        wants_maps, wants_weight = ctx.needs_input_grad
        filters = transform_filters(weight)
        result = torch.empty_like(maps)

        def pull_back(images: slice) -> Tensor:
            pull = torch.zeros_like(filters)
            for block, inputs, products in _blocks(maps, images, len(weight)):
                outputs_to_tiles(outputs[block], products)
                if wants_weight:
                    inputs_to_tiles(maps[block], inputs)
                    pull.baddbmm_(products.transpose(1, 2), inputs)
                if wants_maps:
                    torch.bmm(products, filters, out=inputs)
                    tiles_to_inputs(inputs, result[block])
            return pull

        pulls = in_threads(pull_back, maps)
        for other in pulls[1:]:
            pulls[0].add_(other)
        return result if wants_maps else None, filters_back(pulls[0]) if wants_weight else None


def transform_filters(weight: Float[Tensor, "O C 3 3"]) -> Float[Tensor, "36 O C"]:
    """Return G g Gᵀ of every filter g."""
    both = torch.kron(FILTER, FILTER).to(weight.dtype)
    return (both @ weight.permute(2, 3, 0, 1).reshape(9, -1)).view(36, *weight.shape[:2])


def filters_back(pull: Float[Tensor, "36 O C"]) -> Float[Tensor, "O C 3 3"]:
    """Return Gᵀ u G: the transpose of `transform_filters`, which makes a filter's gradient of a transformed one's."""
    both = torch.kron(FILTER, FILTER).to(pull.dtype)
    return (both.T @ pull.flatten(1)).view(3, 3, *pull.shape[1:]).permute(2, 3, 0, 1)


def inputs_to_tiles(maps: Tensor, tiles: Tensor) -> None:
    """Fill the tiles [36, T, C] with Bᵀ d B of the maps [B, C, H, W], which are channels_last."""
    _transform("maps_to_tiles", maps, tiles, INPUT, 6)


def tiles_to_inputs(tiles: Tensor, maps: Tensor) -> None:
    """Fill the maps by the transpose of `inputs_to_tiles`."""
    _transform("tiles_to_maps", maps, tiles, INPUT.T, 6)


def tiles_to_outputs(tiles: Tensor, maps: Tensor) -> None:
    """Fill the maps [B, C, H, W], which are channels_last, with Aᵀ m A of the tiles [36, T, C]."""
    _transform("tiles_to_maps", maps, tiles, OUTPUT, 4)


def outputs_to_tiles(maps: Tensor, tiles: Tensor) -> None:
    """Fill the tiles by the transpose of `tiles_to_outputs`."""
    _transform("maps_to_tiles", maps, tiles, OUTPUT.T, 4)


def _transform(name: str, maps: Tensor, tiles: Tensor, matrix: np.ndarray, side: int) -> None:
    from caco.winograd import tiles as compiled  # numba takes a second to import

    pixels = maps.detach().permute(0, 2, 3, 1).numpy()
    getattr(compiled, name)(pixels, tiles.numpy(), np.ascontiguousarray(matrix, pixels.dtype), side)


def _tiles_of(maps: Tensor) -> int:
    """Return the number of tiles of an image."""
    return -(-maps.shape[2] // 4) * -(-maps.shape[3] // 4)


def _blocks(maps: Tensor, images: slice, outputs: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield some of the images at a time, with room for their transformed inputs [36, T, C] and products [36, T, outputs]."""
    tiles, channels = _tiles_of(maps), maps.shape[1]
    size = min(max(BLOCK // tiles, 1), images.stop - images.start)
    inputs, products = maps.new_empty(36 * size * tiles * channels), maps.new_empty(36 * size * tiles * outputs)
    for first in range(images.start, images.stop, size):
        block = slice(first, min(first + size, images.stop))
        count = (block.stop - first) * tiles
        yield (
            block,
            inputs[: 36 * count * channels].view(36, count, channels),
            products[: 36 * count * outputs].view(36, count, outputs),
        )


def in_threads(work: Callable[[slice], Result], maps: Tensor) -> list[Result]:
    """Return what `work` makes of each part of the images: one for each of torch's threads, if there are enough tiles.

    In its thread torch computes alone: with all threads in every product they would wait for each other all the time.
    """
    images, threads = len(maps), torch.get_num_threads()
    parts = max(min(threads, images, images * _tiles_of(maps) // LEAST_TILES), 1)
    bounds = [images * part // parts for part in range(parts + 1)]
    slices = [slice(begin, end) for begin, end in zip(bounds, bounds[1:], strict=False)]
    return list(_pool(threads).map(work, slices))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return threads in each of which torch computes alone."""
    started = threading.Barrier(threads)

    def start(_: int) -> None:
        torch.set_num_threads(1)  # of this thread, but also of all that are yet to come
        started.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="winograd")
    list(pool.map(start, range(threads)))
    torch.set_num_threads(threads)
    return pool
