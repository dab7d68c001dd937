"""Winograd's convolution of some images, forward and backward, compiled (numba): transform, multiply, transform back.

Some images at a time, whose tiles fit a cache. Python's types mean nothing to numba, hence the no_type_check.
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np
from numba import njit

from caco.winograd.products import multiply, multiply_transposed, panel_width
from caco.winograd.tiles import from_place_to_place, grid, maps_to_tiles, room_for, tiles_to_maps
from caco.winograd.transforms import INPUTS, INPUTS_BY_TWO, OUTPUTS, OUTPUTS_BY_TWO, inlined

BLOCK = 192
"""Tiles at a time, about."""


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def forward(maps, filters, results, first, last, stride):
    """Fill the results [B, H', W', O] of images `first` to `last` of the maps [B, H, W, C].

    filters: [places, O / w, C, w], transformed, w numbers in a panel.
    """
    width, channels, outputs = panel_width(maps.itemsize), maps.shape[3], results.shape[3]
    inputs_kind, outputs_kind = kinds(stride)
    images, room = block_of(results, first, last, outputs_kind)
    size, flat = channels * outputs, filters.reshape(-1)
    place, product = from_place_to_place(maps, room), from_place_to_place(results, room)
    inputs, products = np.empty(len(filters) * place, maps.dtype), np.empty(len(filters) * product, maps.dtype)
    for begin in range(first, last, images):
        end = min(begin + images, last)
        maps_to_tiles(inputs_kind, maps, begin, end, inputs, room)
        tiles = tiles_of(results, end - begin, outputs_kind)
        for k in range(len(filters)):
            multiply(
                inputs, k * place, room * width,
                flat, k * size, channels * width,
                products, k * product, room * width,
                tiles, outputs, channels,
            )  # fmt: skip
        tiles_to_maps(outputs_kind, products, room, results, begin, end)


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def backward(maps, filters, pulls, maps_gradient, filters_gradient, first, last, stride, to_maps, to_filters):
    """Fill the maps' gradient of images `first` to `last` and these images' part of the filters', each if it is asked for.

    pulls: the results' gradient, [B, H', W', O]. filters and their gradient: [places, C / w, O, w], transformed.
    """
    width, channels, outputs = panel_width(maps.itemsize), maps.shape[3], pulls.shape[3]
    inputs_kind, outputs_kind = kinds(stride)
    images, room = block_of(pulls, first, last, outputs_kind)
    size = channels * outputs
    flat, flat_gradient = filters.reshape(-1), filters_gradient.reshape(-1)
    place, product = from_place_to_place(maps, room), from_place_to_place(pulls, room)
    inputs, products = np.empty(len(filters) * place, maps.dtype), np.empty(len(filters) * product, maps.dtype)
    for begin in range(first, last, images):
        end = min(begin + images, last)
        tiles = tiles_of(pulls, end - begin, outputs_kind)
        maps_to_tiles(outputs_kind, pulls, begin, end, products, room)
        if to_filters:
            maps_to_tiles(inputs_kind, maps, begin, end, inputs, room)
            for k in range(len(filters)):
                multiply_transposed(
                    products, k * product, room * width,
                    inputs, k * place, room * width,
                    flat_gradient, k * size, outputs * width,
                    outputs, channels, tiles, begin > first,
                )  # fmt: skip
        if to_maps:
            for k in range(len(filters)):
                multiply(
                    products, k * product, room * width,
                    flat, k * size, outputs * width,
                    inputs, k * place, room * width,
                    tiles, channels, outputs,
                )  # fmt: skip
            tiles_to_maps(inputs_kind, inputs, room, maps_gradient, begin, end)


@inlined
@no_type_check
def kinds(stride):
    """Return what `transforms.py` calls the maps that go in and those that come out."""
    return (INPUTS, OUTPUTS) if stride == 1 else (INPUTS_BY_TWO, OUTPUTS_BY_TWO)


@inlined
@no_type_check
def tiles_of(results, images, outputs_kind):
    """Return the number of tiles of so many images."""
    rows, columns = grid(outputs_kind, results.shape[1], results.shape[2])
    return rows * columns * images


@inlined
@no_type_check
def block_of(results, first, last, outputs_kind):
    """Return how many images to take at a time, and the room for their tiles."""
    images = max(min(BLOCK // tiles_of(results, 1, outputs_kind), last - first), 1)
    return images, room_for(tiles_of(results, images, outputs_kind))
