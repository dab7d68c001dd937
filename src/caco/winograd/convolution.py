"""Winograd's convolution as torch sees it: a function of maps and filters, with its gradient."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

Result = TypeVar("Result")

FILTER = np.array(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ]
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

BLOCK = 128
"""Tiles that a thread takes at a time: enough for fast products, few enough for its cache."""
LEAST_TILES = 32
"""Tiles below which no further thread takes part."""
MOST_GRADIENT_BYTES = 2**28
"""Bytes that the threads' gradients of one layer's transformed filters may take: each thread has its own."""


class WinogradConvolution(torch.autograd.Function):
    """The convolution of maps [B, C, H, W] with filters [O, C, 3, 3], stride and padding 1, no bias; B > 0."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor) -> Tensor:
        maps = maps.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(maps, weight)
        filters = transform_filters(weight)
        result = _empty_maps(maps, len(weight))

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
        filters = transform_filters(weight)
        maps_gradient = _empty_maps(maps, maps.shape[1]) if ctx.needs_input_grad[0] else None
        wants_weight = ctx.needs_input_grad[1]

        def pull_back(images: slice) -> Tensor | None:
            """Fill the gradient of these images; return their part of that of the transformed filters."""
            filters_gradient = torch.zeros_like(filters) if wants_weight else None
            for block, inputs, products in _blocks(maps, images, len(weight)):
                outputs_to_tiles(outputs[block], products)
                if filters_gradient is not None:
                    inputs_to_tiles(maps[block], inputs)
                    filters_gradient.baddbmm_(products.transpose(1, 2), inputs)
                if maps_gradient is not None:
                    torch.bmm(products, filters, out=inputs)
                    tiles_to_inputs(inputs, maps_gradient[block])
            return filters_gradient

        most = MOST_GRADIENT_BYTES // (filters.numel() * filters.element_size()) if wants_weight else None
        parts = [part for part in in_threads(pull_back, maps, most) if part is not None]
        for part in parts[1:]:  # in the order of the images, whichever thread was first: the same sum every time
            parts[0] += part
        return maps_gradient, filters_back(parts[0]) if parts else None


def transform_filters(weight: Float[Tensor, "O C 3 3"]) -> Float[Tensor, "36 O C"]:
    """Return G g Gᵀ of every filter g, as one product: of G ⊗ G with the nine numbers of each."""
    pairs = torch.from_numpy(np.kron(FILTER, FILTER)).to(weight.dtype)
    return (pairs @ weight.permute(2, 3, 0, 1).reshape(9, -1)).view(36, *weight.shape[:2])


def filters_back(gradient: Float[Tensor, "36 O C"]) -> Float[Tensor, "O C 3 3"]:
    """Return Gᵀ u G: the transpose of `transform_filters`, which makes a filter's gradient of a transformed one's."""
    pairs = torch.from_numpy(np.kron(FILTER, FILTER)).to(gradient.dtype)
    return (pairs.T @ gradient.flatten(1)).view(3, 3, *gradient.shape[1:]).permute(2, 3, 0, 1)


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
    """Call a function of `tiles.py` on what torch holds; which of the two is filled is in its name."""
    from caco.winograd import tiles as compiled  # numba takes a second to import

    pixels = maps.detach().permute(0, 2, 3, 1).numpy()
    getattr(compiled, name)(pixels, tiles.numpy(), np.ascontiguousarray(matrix, pixels.dtype), side)


def _empty_maps(like: Tensor, channels: int) -> Tensor:
    shape = len(like), channels, *like.shape[2:]
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


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


def in_threads(work: Callable[[slice], Result], maps: Tensor, most: int | None = None) -> list[Result]:
    """Return what `work` makes of each part of the images: one for each of torch's threads, if there are enough tiles.

    In its thread torch computes alone: with all threads in every product they would wait for each other all the time.
    most: parts, at most (at least one).
    """
    images, (pool, threads) = len(maps), thread_pool()
    enough = images * _tiles_of(maps) // LEAST_TILES
    parts = max(min(threads, images, enough, threads if most is None else most), 1)
    bounds = [images * part // parts for part in range(parts + 1)]
    slices = [slice(begin, end) for begin, end in zip(bounds, bounds[1:], strict=False)]
    return list(pool.map(work, slices))


_POOLS: dict[int, ThreadPoolExecutor] = {}
_POOLS_LOCK = threading.Lock()


def thread_pool() -> tuple[ThreadPoolExecutor, int]:
    """Return as many threads as torch uses in this one, in each of which it computes alone; and their number."""
    with _POOLS_LOCK:  # the number is read inside, too: while threads start it is 1 for those that have none yet
        threads = torch.get_num_threads()
        if threads not in _POOLS:
            _POOLS[threads] = _start(threads)
        return _POOLS[threads], threads


def _start(threads: int) -> ThreadPoolExecutor:
    started = threading.Barrier(threads)

    def alone(_: int) -> None:
        torch.set_num_threads(1)  # of this thread for good, and of all that come until it is set again
        started.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="winograd")
    list(pool.map(alone, range(threads)))
    torch.set_num_threads(threads)
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_POOLS.clear)  # a child has no threads but its first
