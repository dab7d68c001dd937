"""Winograd's convolution of some images, forward and backward, compiled (numba): transform, multiply, transform back.

Some images at a time, whose tiles fit a cache. Python's types mean nothing to numba, hence the no_type_check.
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np

from caco.compiled_code import kept
from caco.cpu_kernels.memory import aligned, inlined, is_large
from caco.cpu_kernels.pairs import pair_columns, pair_rows
from caco.cpu_kernels.products import multiply, multiply_transposed, panel_width
from caco.cpu_kernels.vectors import computed_bytes
from caco.winograd.strips import grid, strip_of
from caco.winograd.tiles import from_place_to_place, maps_to_tiles, room_for, tiles_to_maps
from caco.winograd.transforms import INPUTS, INPUTS_BY_TWO, OUTPUTS, OUTPUTS_BY_TWO, SAMPLES, SIDE

BLOCK, LARGE_BLOCK = 64, 128
"""Tiles at a time, about: as few as keep the products busy; more where each block has many filters to read."""
LARGE_FILTERS = 2**16
"""Filters from which on a block is large."""


@kept()
@no_type_check
def forward(maps, factors, of_all, of_samples, first, last, stride):
    """Convolve images `first` to `last` of the maps [B, H, W, C], read with factors (`cut_out`).

    of_all: filters [places, N], transformed: of each place [O / w, C, w] first, w numbers in a panel; the results to fill,
    [B, H', W', O]; and none or [2, O], to which the sums of the results are added (`put_back`). of_samples: the same of a
    convolution of 1 × 1 with stride 2 that meets the same maps, of whose filters there is one place, or none.
    """
    width, channels, (filters, results, sums), (few, samples, samples_sums) = (
        panel_width(computed_bytes(maps)), maps.shape[3], of_all, of_samples,
    )  # fmt: skip
    outputs, (inputs_kind, outputs_kind) = results.shape[3], kinds(stride)
    rows, columns = grid(outputs_kind, results)
    at_a_time, room = block_of(rows * (last - first), columns, channels * outputs)
    place, product = from_place_to_place(maps, room), from_place_to_place(results, room)
    inputs, products = aligned(len(filters) * place, filters), aligned(len(filters) * product, filters)
    maps_strip, results_strip = strip_of(inputs_kind, maps, filters), strip_of(outputs_kind, results, filters)
    size, flat, flat_few, none = filters.shape[1], filters.reshape(-1), few.reshape(-1), factors[:0]
    for begin in range(first * rows, last * rows, at_a_time):
        end = min(begin + at_a_time, last * rows)
        tiles = (end - begin) * columns
        maps_to_tiles(inputs_kind, maps, factors, maps[:0], begin, end, maps_strip, inputs, room)
        for k in range(len(filters)):
            multiply(
                inputs, k * place, room * width,
                flat, k * size, channels * width,
                products, k * product, room * width,
                tiles, outputs, channels, False,
            )  # fmt: skip
        tiles_to_maps(
            outputs_kind, products, room, results, results[:0], none, results[:0], sums, begin, end, results_strip
        )
        if len(few):
            for k in range(SIDE[SAMPLES] ** 2):
                multiply(
                    inputs, place_of_sample(k) * place, room * width,
                    flat_few, 0, channels * width,
                    products, k * product, room * width,
                    tiles, outputs, channels, False,
                )  # fmt: skip
            tiles_to_maps(
                SAMPLES, products, room, samples, results[:0], none, results[:0], samples_sums, begin, end, results_strip,
            )  # fmt: skip


@kept()
@no_type_check
def backward(
    maps, factors, of_all, of_samples, maps_gradient, added, factors_gradient, pairs, first, last, stride, to_maps, to_filters
):  # fmt: skip
    """Fill the maps' gradient of images `first` to `last`, and these images' part of the factors' and of the filters'.

    of_all: the results' gradient, [B, H', W', O], and factors of its own, with which it is read with the results (`cut_out`),
    whose sums have gradients, too; the results; filters and their gradient, [places, N], transformed: [C / w, O, w].
    of_samples: as in `forward`. added: none, or what is added to the maps' gradient, where there are no factors. pairs: none, or
    both filters as pairs of bfloat16 (`pair_filters`), for products of such. to_maps, to_filters: what is asked for.
    """
    channels, (pulls, pulls_factors, results, filters, filters_gradient) = maps.shape[3], of_all
    sample_pulls, sample_factors, samples, few, few_gradient = of_samples
    outputs, (inputs_kind, outputs_kind) = pulls.shape[3], kinds(stride)
    rows, columns = grid(outputs_kind, pulls)
    at_a_time, room = block_of(rows * (last - first), columns, channels * outputs)
    place, product = from_place_to_place(maps, room), from_place_to_place(pulls, room)
    inputs, products = aligned(len(filters) * place, filters), aligned(len(filters) * product, filters)
    pair_room = 0 if pairs is None else (room + 1) // 2
    pulls_in_pairs, inputs_in_pairs = (
        aligned(pair_room * outputs, np.empty(0, np.uint32)),
        aligned(pair_room * channels, np.empty(0, np.uint32)),
    )
    sampled = aligned(SIDE[SAMPLES] ** 2 * product if len(few) else 0, filters)
    maps_strip, sums_strip, pulls_strip = (
        strip_of(inputs_kind, maps, filters), strip_of(inputs_kind, maps, filters), strip_of(outputs_kind, pulls, filters),
    )  # fmt: skip
    size, flat, flat_gradient = filters.shape[1], filters.reshape(-1), filters_gradient.reshape(-1)
    flat_few, flat_few_gradient = few.reshape(-1), few_gradient.reshape(-1)
    others, past = maps[: len(maps) if len(factors) else 0], is_large(filters_gradient)
    for begin in range(first * rows, last * rows, at_a_time):
        end = min(begin + at_a_time, last * rows)
        tiles, is_first = (end - begin) * columns, begin == first * rows
        maps_to_tiles(outputs_kind, pulls, pulls_factors, results, begin, end, pulls_strip, products, room)
        if len(few):
            maps_to_tiles(SAMPLES, sample_pulls, sample_factors, samples, begin, end, pulls_strip, sampled, room)
        if to_filters:
            maps_to_tiles(inputs_kind, maps, factors, maps[:0], begin, end, maps_strip, inputs, room)
            for k in range(len(filters)):
                to_filters_of_place(
                    products, k * product, inputs, k * place, room, flat_gradient, k * size,
                    outputs, channels, tiles, not is_first, past, pairs, pulls_in_pairs, inputs_in_pairs,
                )  # fmt: skip
            for k in range(SIDE[SAMPLES] ** 2 * len(few)):
                to_filters_of_place(
                    sampled, k * product, inputs, place_of_sample(k) * place, room, flat_few_gradient, 0,
                    outputs, channels, tiles, k > 0 or not is_first, False, pairs, pulls_in_pairs, inputs_in_pairs,
                )  # fmt: skip
        if to_maps:
            for k in range(len(filters)):
                to_inputs_of_place(
                    products, k * product, flat, k * size, inputs, k * place, room,
                    tiles, channels, outputs, False, pairs, 0, k, pulls_in_pairs,
                )  # fmt: skip
            for k in range(SIDE[SAMPLES] ** 2 * len(few)):
                to_inputs_of_place(
                    sampled, k * product, flat_few, 0, inputs, place_of_sample(k) * place, room,
                    tiles, channels, outputs, True, pairs, 1, 0, pulls_in_pairs,
                )  # fmt: skip
            tiles_to_maps(
                inputs_kind, inputs, room, maps_gradient, added, factors, others, factors_gradient, begin, end, sums_strip,
            )  # fmt: skip


@inlined
@no_type_check
def to_filters_of_place(
    pulls, pulls_at, inputs, inputs_at, room, gradient, at, outputs, channels, tiles, add, past,
    pairs, pulls_in_pairs, inputs_in_pairs,
):  # fmt: skip
    """Make a place's part of the filters' gradient, or add to it; if there are pairs, of pairs of tiles, with room for them."""
    width = panel_width(gradient.itemsize)
    if pairs is None:
        multiply_transposed(
            pulls, pulls_at, room * width, inputs, inputs_at, room * width, gradient, at, outputs * width,
            outputs, channels, tiles, add, past,
        )  # fmt: skip
        return
    half = (room + 1) // 2 * width
    pair_rows(pulls, pulls_at, room * width, tiles, outputs, pulls_in_pairs, half)
    pair_rows(inputs, inputs_at, room * width, tiles, channels, inputs_in_pairs, half)
    multiply_transposed(
        pulls_in_pairs, 0, half, inputs_in_pairs, 0, half, gradient, at, outputs * width,
        outputs, channels, (tiles + 1) // 2, add, past,
    )  # fmt: skip


@inlined
@no_type_check
def to_inputs_of_place(
    pulls, pulls_at, filters, at, inputs, inputs_at, room, tiles, channels, outputs, add, pairs, which, place, pulls_in_pairs
):  # fmt: skip
    """Make a place's part of the tiles' gradient, or add to it; if there are pairs, of those filters' place, with room."""
    width = panel_width(inputs.itemsize)
    if pairs is None:
        multiply(
            pulls, pulls_at, room * width, filters, at, outputs * width, inputs, inputs_at, room * width,
            tiles, channels, outputs, add,
        )  # fmt: skip
        return
    half = room * width // 2
    pair_columns(pulls, pulls_at, room * width, tiles, outputs, pulls_in_pairs, half)
    multiply(
        pulls_in_pairs, 0, half, pairs[which][place], 0, outputs // 2 * width, inputs, inputs_at, room * width,
        tiles, channels, outputs // 2, add,
    )  # fmt: skip


@kept()
@no_type_check
def pair_filters(filters, outputs, channels, pairs, first, last):
    """Fill pairs of each two outputs of the filters [places, N], [C / w, O, w] of each place, of places `first` to `last`."""
    width = panel_width(filters.itemsize)
    for place in range(first, last):
        pair_rows(filters[place], 0, outputs * width, outputs, channels, pairs[place], outputs // 2 * width)


@inlined
@no_type_check
def place_of_sample(k):
    """Return which place of a tile with stride 2 holds the pixel that a filter of 1 × 1 meets for its output number k."""
    side = SIDE[SAMPLES]
    rest = SIDE[INPUTS_BY_TWO] - side
    return (rest + k // side) * SIDE[INPUTS_BY_TWO] + rest + k % side


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
