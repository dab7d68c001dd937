"""Winograd's convolution of some images, forward and backward, compiled (numba): transform, multiply, transform back.

Some images at a time, whose tiles fit a cache. Python's types mean nothing to numba, hence the no_type_check.
"""

from __future__ import annotations

from typing import no_type_check

from numba import njit

from caco.cpu_kernels.memory import aligned, inlined
from caco.cpu_kernels.products import multiply, multiply_transposed, panel_width
from caco.winograd.strips import grid, strip_of
from caco.winograd.tiles import from_place_to_place, maps_to_tiles, room_for, tiles_to_maps
from caco.winograd.transforms import INPUTS, INPUTS_BY_TWO, OUTPUTS, OUTPUTS_BY_TWO

BLOCK, LARGE_BLOCK = 64, 128
"""Tiles at a time, about: as few as keep the products busy; more where each block has many filters to read."""
LARGE_FILTERS = 2**16
"""Filters from which on a block is large."""


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def forward(maps, factors, filters, results, sums, first, last, stride):
    """Fill the results [B, H', W', O] of images `first` to `last` of the maps [B, H, W, C], read with factors (`cut_out`).

    filters: [places, N], transformed: each place's [O / w, C, w] first, w numbers in a panel. sums: none, or [2, O], those of
    the results (`put_back`).
    """
    width, channels, outputs = panel_width(maps.itemsize), maps.shape[3], results.shape[3]
    inputs_kind, outputs_kind = kinds(stride)
    rows, columns = grid(outputs_kind, results)
    at_a_time, room = block_of(rows * (last - first), columns, channels * outputs)
    place, product = from_place_to_place(maps, room), from_place_to_place(results, room)
    inputs, products = aligned(len(filters) * place, maps), aligned(len(filters) * product, maps)
    maps_strip, results_strip = strip_of(inputs_kind, maps), strip_of(outputs_kind, results)
    size, flat = filters.shape[1], filters.reshape(-1)
    for begin in range(first * rows, last * rows, at_a_time):
        end = min(begin + at_a_time, last * rows)
        maps_to_tiles(inputs_kind, maps, factors, maps[:0], begin, end, maps_strip, inputs, room)
        for k in range(len(filters)):
            multiply(
                inputs, k * place, room * width,
                flat, k * size, channels * width,
                products, k * product, room * width,
                (end - begin) * columns, outputs, channels,
            )  # fmt: skip
        tiles_to_maps(outputs_kind, products, room, results, factors[:0], results[:0], sums, begin, end, results_strip)


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def backward(
    maps, factors, filters, pulls, pulls_factors, results,
    maps_gradient, factors_gradient, filters_gradient, first, last, stride, to_maps, to_filters,
):  # fmt: skip
    """Fill the maps' gradient of images `first` to `last`, and these images' part of the factors' and of the filters'.

    pulls: the results' gradient, [B, H', W', O]; with factors of their own, read with the results (`cut_out`), whose sums have
    gradients, too. filters and their gradient: [places, N], transformed: [C / w, O, w]. to_maps, to_filters: what is asked for.
    """
    width, channels, outputs = panel_width(maps.itemsize), maps.shape[3], pulls.shape[3]
    inputs_kind, outputs_kind = kinds(stride)
    rows, columns = grid(outputs_kind, pulls)
    at_a_time, room = block_of(rows * (last - first), columns, channels * outputs)
    place, product = from_place_to_place(maps, room), from_place_to_place(pulls, room)
    inputs, products = aligned(len(filters) * place, maps), aligned(len(filters) * product, maps)
    maps_strip, sums_strip, pulls_strip = (
        strip_of(inputs_kind, maps), strip_of(inputs_kind, maps), strip_of(outputs_kind, pulls),
    )  # fmt: skip
    size, flat, flat_gradient = filters.shape[1], filters.reshape(-1), filters_gradient.reshape(-1)
    others = maps[: len(maps) if len(factors) else 0]
    for begin in range(first * rows, last * rows, at_a_time):
        end = min(begin + at_a_time, last * rows)
        tiles = (end - begin) * columns
        maps_to_tiles(outputs_kind, pulls, pulls_factors, results, begin, end, pulls_strip, products, room)
        if to_filters:
            maps_to_tiles(inputs_kind, maps, factors, maps[:0], begin, end, maps_strip, inputs, room)
            for k in range(len(filters)):
                multiply_transposed(
                    products, k * product, room * width,
                    inputs, k * place, room * width,
                    flat_gradient, k * size, outputs * width,
                    outputs, channels, tiles, begin > first * rows,
                )  # fmt: skip
        if to_maps:
            for k in range(len(filters)):
                multiply(
                    products, k * product, room * width,
                    flat, k * size, outputs * width,
                    inputs, k * place, room * width,
                    tiles, channels, outputs,
                )  # fmt: skip
            tiles_to_maps(
                inputs_kind, inputs, room, maps_gradient, factors, others, factors_gradient, begin, end, sums_strip
            )


@inlined
@no_type_check
def kinds(stride):
    """Return what `transforms.py` calls the maps that go in and those that come out."""
    return (INPUTS, OUTPUTS) if stride == 1 else (INPUTS_BY_TWO, OUTPUTS_BY_TWO)


@inlined
@no_type_check
def block_of(rows, columns, filters):
    """Return how many rows of tiles to take at a time, and the room for their tiles."""
    most = LARGE_BLOCK if filters >= LARGE_FILTERS else BLOCK
    at_a_time = max(min(most // columns, rows), 1)
    return at_a_time, room_for(at_a_time * columns)
