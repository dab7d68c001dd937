"""Winograd's convolution as torch sees it: a function of maps and filters, with its gradient.

Of maps in bfloat16 only what lies in memory is rounded: transforms, products and sums are float32's. The products backward are
of numbers rounded to bfloat16, where the processor has an instruction for them; forward that would cost what the transforms
multiply the rounding by, six times the error of the encoder.
"""

from __future__ import annotations

import math
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

    Maps may be bfloat16 where the filters are float32; so is the result. C and O are multiples of `panel_width`; ValueError if
    they are not.
    """
    result: Tensor = WinogradConvolution.apply(maps, weight, stride)[0]
    return result


class WinogradConvolution(torch.autograd.Function):
    """`convolve` between two batch norms: of maps · factors[0] + factors[1], rectified, with the sums of what comes out.

    factors: none, or two of each channel, [2, C], float64. samples_weight: none, or filters [O, C, 1, 1] of a convolution with
    stride 2 of the same maps, when that is this one's stride, too. Returns the result and, if with_sums, the sums of it and of
    its squares over images and pixels, [2, O], float64 (else None); then the same two of the other convolution, None without;
    then, if it carries (not with factors), the maps themselves for whoever else wants them, so that both gradients are added as
    the maps' one is written.
    """

    @staticmethod
    def forward(
        ctx: Any,
        maps: Tensor,
        weight: Tensor,
        stride: int = 1,
        factors: Tensor | None = None,
        with_sums: bool = False,
        samples_weight: Tensor | None = None,
        carries: bool = False,
    ) -> tuple[Tensor | None, ...]:
        from caco.winograd import passes  # numba takes a second to import

        assert factors is None or not carries  # the gradient of what factors read is another one
        maps = maps.contiguous(memory_format=torch.channels_last)
        size = [-(-side // stride) for side in maps.shape[2:]]
        result = empty_maps(maps, len(weight), *size)
        samples = None if samples_weight is None else empty_maps(maps, len(weight), *size)
        kept = (result, samples) if with_sums else (None, None)
        ctx.save_for_backward(maps, weight, factors, samples_weight, *kept)
        ctx.stride = stride
        ctx.set_materialize_grads(False)
        parts = parts_of_images(result)
        sums, samples_sums = (np.zeros((len(parts), 2 if with_sums else 0, len(weight))) for _ in range(2))
        of_all = transform_filters(weight, stride, transposed=True).numpy(), pixels(result)
        of_samples = (
            _in_panels(samples_weight, maps, transposed=True),
            pixels(result[:0] if samples is None else samples),
        )

        def convolve_part(first: int, last: int) -> None:
            number = parts.index((first, last))
            outputs = (*of_all, sums[number]), (*of_samples, samples_sums[number])
            passes.forward(pixels(maps), as_array(factors, maps), *outputs, first, last, stride)

        in_threads(convolve_part, parts)
        summed = [torch.from_numpy(each.sum(0)) if with_sums else None for each in (sums, samples_sums)]
        carried = maps.detach() if carries else None
        return result, summed[0], samples, None if samples is None else summed[1], carried

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        from caco.winograd import passes

        maps, weight, factors, samples_weight, result, samples = ctx.saved_tensors
        pull, sums_pull, samples_pull, samples_sums_pull, carried_pull = grad_outputs
        if all(gradient is None for gradient in grad_outputs[:4]):
            return carried_pull, *(None,) * 6
        stride, (to_maps, to_filters) = ctx.stride, ctx.needs_input_grad[:2]
        to_factors = factors is not None and ctx.needs_input_grad[3]
        to_samples = samples_weight is not None and ctx.needs_input_grad[5]
        size = [len(maps), len(weight), *(-(-side // stride) for side in maps.shape[2:])]
        pulled = _pulled(maps, size, pull, sums_pull, result)
        samples_size = size if samples_weight is not None else [0, *size[1:]]
        samples_pulled = _pulled(maps, samples_size, samples_pull, samples_sums_pull, samples)
        filters = transform_filters(weight, stride)
        parts = parts_of(len(maps), _most_parts(*size))
        if to_filters or to_samples:
            parts = parts_of(len(maps), min(_most_parts(*size), MOST_GRADIENT_BYTES // filters.nbytes))
        of_maps = empty_maps(maps, *maps.shape[1:]) if to_maps or to_factors else maps[:0]
        of_filters = filters.new_empty(len(parts) if to_filters or to_samples else 0, *filters.shape)
        few = _in_panels(samples_weight, maps)
        pairs = _in_pairs(weight, filters.numpy(), few) if _multiplies_pairs(maps) else None
        of_few = filters.new_empty(len(parts), *few.shape)
        added = maps[:0] if carried_pull is None else carried_pull.contiguous(memory_format=torch.channels_last)
        of_factors = np.zeros((len(parts), 2 if factors is not None else 0, maps.shape[1]))

        def pull_back(first: int, last: int) -> None:
            number = parts.index((first, last))
            part = of_filters[number] if len(of_filters) else of_few[0, :0]
            of_all = *pulled, filters.numpy(), part.numpy()
            of_samples = *samples_pulled, few, of_few[number].numpy()
            gradients = pixels(of_maps), pixels(added), of_factors[number], pairs
            asked = to_maps or to_factors, to_filters or to_samples
            passes.backward(
                pixels(maps), as_array(factors, maps), of_all, of_samples, *gradients, first, last, stride, *asked
            )

        in_threads(pull_back, parts)
        return (
            of_maps if to_maps else None,
            filters_back(of_filters, stride, *weight.shape[:2]) if to_filters else None,
            None,
            torch.from_numpy(of_factors.sum(0)) if to_factors else None,
            None,
            _out_of_panels(of_few.sum(0), samples_weight) if to_samples else None,
            None,
        )


def _pulled(
    maps: Tensor, size: list[int], pull: Tensor | None, sums_pull: Tensor | None, result: Tensor | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the gradient of a result of that size, the factors with which it is read, and the result, if its sums have one."""
    if pull is None:
        pull = maps.new_zeros(size)
    pull = pull.contiguous(memory_format=torch.channels_last)
    if sums_pull is None or result is None:
        return pixels(pull), as_array(None, maps), pixels(pull[:0])
    of_numbers = torch.stack([2 * sums_pull[1], sums_pull[0]])  # of the sum of squares, and of the sum
    return pixels(pull), as_array(of_numbers, maps), pixels(result)


def _in_panels(weight: Tensor | None, maps: Tensor, transposed: bool = False) -> np.ndarray:
    """Return filters of 1 × 1 as one place's matrix of outputs and inputs, [1, N] (transposed: of inputs and outputs), or none."""
    from caco.cpu_kernels.products import panel_width

    if weight is None:
        return as_array(None, maps)
    matrix = weight.detach()[:, :, 0, 0]
    panels = (matrix.T if transposed else matrix).unflatten(1, (-1, panel_width(weight.element_size())))
    result: np.ndarray = panels.transpose(0, 1).reshape(1, -1).contiguous().numpy()
    return result


def _multiplies_pairs(maps: Tensor) -> bool:
    """Return whether products backward are of pairs of bfloat16."""
    from caco.cpu_kernels import processor

    return maps.dtype == torch.bfloat16 and processor.MULTIPLIES_PAIRS


def _in_pairs(weight: Tensor, *transformed: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return transformed filters, each [places, N], as pairs of two outputs, [places, N'], whole cache lines; none as one place."""
    from caco.cpu_kernels.memory import CACHE_LINE
    from caco.winograd import passes

    outputs, channels = weight.shape[:2]
    lines = 2 * outputs * channels // CACHE_LINE | 1  # an odd number, as of what is not in pairs

    def paired(filters: np.ndarray) -> np.ndarray:
        pairs = _empty((max(len(filters), 1), lines * CACHE_LINE // 4), np.dtype(np.uint32))
        if len(filters):
            parts = parts_of(len(filters), filters.size // LEAST_WEIGHTS)
            in_threads(lambda first, last: passes.pair_filters(filters, outputs, channels, pairs, first, last), parts)
        return pairs

    return tuple(map(paired, transformed))


def _out_of_panels(panels: Tensor, weight: Tensor) -> Tensor:
    """Return what `_in_panels` makes of filters as filters."""
    from caco.cpu_kernels.products import panel_width

    outputs, inputs = weight.shape[:2]
    matrix = panels.view(-1, outputs, panel_width(weight.element_size())).transpose(0, 1).reshape(outputs, inputs)
    return matrix[:, :, None, None]


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
    """Return maps that are channels_last as [B, H, W, C]; bfloat16, which numpy has none of, as uint16."""
    maps = maps.detach().permute(0, 2, 3, 1)
    return (maps.view(torch.uint16) if maps.dtype == torch.bfloat16 else maps).numpy()


def empty_maps(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Return maps to be filled, channels_last, that begin with a line of the cache. numpy's memory: of glibc it asks for as many
    bytes for all of a size, which so fit where others were, while torch wants a multiple of 64 for their address, and glibc
    keeps apart what is left in front of it."""
    numbers = _empty((len(like), height, width, channels), pixels(like[:0]).dtype)
    return torch.from_numpy(numbers).view(like.dtype).permute(0, 3, 1, 2)


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return numpy's memory that begins with a line of the cache."""
    from caco.cpu_kernels.memory import CACHE_LINE

    count, line = math.prod(shape), CACHE_LINE // dtype.itemsize
    numbers = np.empty(count + line, dtype)
    start = -(numbers.ctypes.data // dtype.itemsize) % line
    result: np.ndarray = numbers[start : start + count].reshape(shape)
    return result


def as_array(factors: Tensor | None, maps: Tensor) -> np.ndarray:
    """Return factors of each channel as compiled code takes them with such maps, of no size if there are none."""
    dtype = computed_dtype(maps)
    return (maps.new_empty(0, 0, dtype=dtype) if factors is None else factors.detach().to(dtype).contiguous()).numpy()


def computed_dtype(maps: Tensor) -> torch.dtype:
    """Return in what maps are computed: bfloat16 only lies in memory."""
    return torch.float32 if maps.dtype == torch.bfloat16 else maps.dtype


def parts_of_images(results: Tensor) -> list[tuple[int, int]]:
    """Return which images each thread takes."""
    return parts_of(len(results), _most_parts(*results.shape))


def _most_parts(images: int, channels: int, height: int, width: int) -> int:
    return images * -(-height // 4) * -(-width // 4) // LEAST_TILES
