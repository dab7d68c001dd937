"""Winograd's convolution as torch sees it: a function of maps and filters, with its gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from caco.cpu_kernels.threads import in_threads, parts_of

PLACES = {1: 36, 2: 81}
"""Products of a tile of 4 × 4 outputs, for each stride; the direct convolution has 144."""
LEAST_TILES, LEAST_WEIGHTS = 32, 2**15
"""Tiles, and numbers of filters, below which no further thread takes part."""
MOST_GRADIENT_BYTES = 2**28
"""Bytes that the threads' gradients of one layer's transformed filters may take: each thread has its own."""


def convolve(maps: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """Return the convolution of maps [B, C, H, W] with filters [O, C, 3, 3], padding 1, stride 1 or 2, no bias; B > 0.

    C and O are multiples of `panel_width`; ValueError if they are not.
    """
    result: Tensor = WinogradConvolution.apply(maps, weight, stride)[0]
    return result


class WinogradConvolution(torch.autograd.Function):
    """`convolve` between two batch norms: of maps · factors[0] + factors[1], rectified, with the sums of what comes out.

    factors: none, or two of each channel, [2, C], float64. Returns the result and, if with_sums, the sums of it and of its squares
    over images and pixels, [2, O], float64 (else None).
    """

    @staticmethod
    def forward(
        ctx: Any, maps: Tensor, weight: Tensor, stride: int = 1, factors: Tensor | None = None, with_sums: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        from caco.winograd import passes  # numba takes a second to import

        maps = maps.contiguous(memory_format=torch.channels_last)
        height, width = (-(-side // stride) for side in maps.shape[2:])
        result = empty_maps(maps, len(weight), height, width)
        ctx.save_for_backward(maps, weight, factors, result if with_sums else None)
        ctx.stride = stride
        ctx.set_materialize_grads(False)
        parts = parts_of_images(result)
        sums = _empty_sums(len(parts), len(weight) if with_sums else 0)
        arrays = (
            pixels(maps),
            _numpy(factors, maps),
            transform_filters(weight, stride, transposed=True).numpy(),
            pixels(result),
        )

        def convolve_part(first: int, last: int) -> None:
            passes.forward(*arrays, sums[parts.index((first, last))], first, last, stride)

        in_threads(convolve_part, parts)
        return result, torch.from_numpy(sums.sum(0)) if with_sums else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        from caco.winograd import passes

        maps, weight, factors, result = ctx.saved_tensors
        pull, sums_pull = grad_outputs
        stride, (to_maps, to_filters) = ctx.stride, ctx.needs_input_grad[:2]
        to_factors = factors is not None and ctx.needs_input_grad[3]
        if pull is None and sums_pull is None:
            return None, None, None, None, None
        pull = torch.zeros_like(result) if pull is None else pull.contiguous(memory_format=torch.channels_last)
        of_result = None
        if sums_pull is not None:  # of the sum and of the sum of squares, for each number
            of_result = torch.stack([2 * sums_pull[1], sums_pull[0]]).to(maps.dtype)
        filters = transform_filters(weight, stride)
        parts = parts_of_images(pull)
        if to_filters:
            parts = parts_of(len(maps), min(len(parts), MOST_GRADIENT_BYTES // filters.nbytes))
        of_maps = empty_maps(maps, *maps.shape[1:]) if to_maps or to_factors else maps[:0]
        of_filters = filters.new_empty(len(parts) if to_filters else 0, *filters.shape)
        of_factors = _empty_sums(len(parts), maps.shape[1] if factors is not None else 0)
        inputs = pixels(maps), _numpy(factors, maps), filters.numpy()
        pulled = pixels(pull), _numpy(of_result, pull), pixels(pull[:0] if of_result is None else result)

        def pull_back(first: int, last: int) -> None:
            number = parts.index((first, last))
            part = of_filters[number].numpy() if to_filters else inputs[2][:0]
            asked = to_maps or to_factors, to_filters
            gradients = pixels(of_maps), of_factors[number], part
            passes.backward(*inputs, *pulled, *gradients, first, last, stride, *asked)

        in_threads(pull_back, parts)
        return (
            of_maps if to_maps else None,
            filters_back(of_filters, stride, *weight.shape[:2]) if to_filters else None,
            None,
            torch.from_numpy(of_factors.sum(0)) if to_factors else None,
            None,
        )


def transform_filters(weight: Float[Tensor, "outputs inputs 3 3"], stride: int, transposed: bool = False) -> Tensor:
    """Return G g Gᵀ of every filter g: for each place a matrix of outputs and inputs, as `products.py` has them, in a row.

    transposed: of inputs and outputs.
    """
    from caco.cpu_kernels.memory import CACHE_LINE
    from caco.cpu_kernels.products import panel_width
    from caco.winograd import filters

    width = panel_width(weight.element_size())
    if any(channels % width for channels in weight.shape[:2]):  # nothing that follows checks where it writes
        raise ValueError(f"filters of {tuple(weight.shape)}: channels must be multiples of {width}")
    lines = weight[:, :, 0, 0].numel() * weight.element_size() // CACHE_LINE
    result = weight.new_empty(
        PLACES[stride], (lines | 1) * CACHE_LINE // weight.element_size()
    )  # odd, as tiles are apart
    arrays = weight.detach().permute(0, 2, 3, 1).contiguous().numpy(), transposed, result.detach().numpy()
    parts = parts_of(weight.shape[1 if transposed else 0], weight.numel() // LEAST_WEIGHTS)
    in_threads(lambda first, last: filters.filters_to_places(stride, *arrays, first, last), parts)
    return result.detach()


def filters_back(parts: Tensor, stride: int, rows: int, columns: int) -> Float[Tensor, "rows columns 3 3"]:
    """Return Gᵀ u G of the sum of parts: the transpose of `transform_filters`."""
    from caco.winograd import filters

    result = parts.new_empty(rows, 3, 3, columns)
    arrays = parts.numpy(), result.numpy()
    in_threads(
        lambda first, last: filters.places_to_filters(stride, *arrays, first, last),
        parts_of(rows, result.numel() // LEAST_WEIGHTS),
    )
    return result.permute(0, 3, 1, 2)


def pixels(maps: Tensor) -> np.ndarray:
    """Return maps that are channels_last as [B, H, W, C]."""
    return maps.detach().permute(0, 2, 3, 1).numpy()


def empty_maps(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Return maps to be filled, channels_last. numpy's memory: of glibc it asks for the bytes alone, so that they fit where
    others of their size were, while torch wants a multiple of 64 for their address and so some bytes more."""
    numbers = np.empty((len(like), height, width, channels), pixels(like[:0]).dtype)
    return torch.from_numpy(numbers).permute(0, 3, 1, 2)


def _numpy(factors: Tensor | None, maps: Tensor) -> np.ndarray:
    return pixels(maps[:0]).reshape(0, 0) if factors is None else factors.detach().to(maps.dtype).contiguous().numpy()


def _empty_sums(parts: int, channels: int) -> np.ndarray:
    return np.zeros((parts, 2 if channels else 0, channels))


def parts_of_images(results: Tensor) -> list[tuple[int, int]]:
    """Return which images each thread takes."""
    tiles = len(results) * -(-results.shape[2] // 4) * -(-results.shape[3] // 4)
    return parts_of(len(results), tiles // LEAST_TILES)
