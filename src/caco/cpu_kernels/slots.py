"""All slots against all queries, a block of slots at a time, compiled (numba): the nearest slot, softmaxes, gradients.

As in `caco/slots.py`, with exponentials, maxima and sums taken while a block's products are in the nearest caches. Queries
and slots are matrices in panels (`products.py`); widths and numbers of queries are rounded up to whole panels with zeros.
With pairs, products are of factors rounded to bfloat16 (`pairs.py`), all else is the same.
Python's types mean nothing to numba, hence the no_type_check.
"""

from __future__ import annotations

import math
from typing import no_type_check

import numpy as np

from caco.compiled_code import kept
from caco.cpu_kernels.formulas import exponential
from caco.cpu_kernels.memory import aligned, inlined
from caco.cpu_kernels.pairs import neighbours, pair_columns, pair_rows, paired
from caco.cpu_kernels.processor import BYTES
from caco.cpu_kernels.products import multiply, multiply_transposed, panel_width
from caco.cpu_kernels.vectors import greatest, load, repeated, store, zeros

SLOTS = 96
"""Slots at a time: their products with some hundred queries stay in the second nearest cache."""
ROOM = SLOTS | 1
"""Rows of a panel of so many: an odd number, lest all panels use the same few lines of a cache."""
ROOM_OF_PAIRS = (SLOTS + 1) // 2 | 1
"""The same of pairs of slots; as many numbers are half as wide a panel of ROOM rows, and there is room for these, too."""


@kept()
@no_type_check
def nearest(queries, weight, inverse_length, first, last, largest, indices):
    """Put for each query the largest cosine of slots `first` to `last`, and the first slot that has it.

    queries: unit rows, transposed in panels: [N / w, D, w]. weight: [K, D]. largest, indices: [N], filled.
    """
    wide, width = queries.shape[1:]
    count, lanes, flat = len(queries) * width, BYTES // weight.itemsize, queries.reshape(-1)
    rows, products, highest = aligned(wide * ROOM, weight), aligned(count * ROOM, weight), aligned(width, weight)
    for start in range(first, last, SLOTS):
        end = min(start + SLOTS, last)
        unit_rows(weight, inverse_length, start, end, rows, wide)
        multiply(
            rows, 0, ROOM * width, flat, 0, wide * width, products, 0, ROOM * width, end - start, count, wide, False
        )
        for panel in range(len(queries)):
            highest_of(products, panel, end - start, highest, lanes)
            for column in range(width):
                query = panel * width + column
                if highest[column] > largest[query]:
                    largest[query] = highest[column]
                    at = panel * ROOM * width + column
                    while products[at] != highest[column]:
                        at += width
                    indices[query] = start + (at - panel * ROOM * width) // width


@kept()
@no_type_check
def softmax(queries, weight, inverse_length, first, last, largest, totals, slot_sums, with_mean, pairs):
    """Take slots `first` to `last` into each query's softmax: its largest logit, Σ exp(logit − largest), and Σ of that · slot.

    queries: over the temperature, as in `nearest`. largest, totals: [N]; slot_sums: [D / w, N, w], all filled. pairs: none, or
    of each two numbers of a query, [N / w, D / 2, w].
    """
    wide, width = queries.shape[1:]
    count, lanes, flat, sums = (
        len(queries) * width,
        BYTES // weight.itemsize,
        queries.reshape(-1),
        slot_sums.reshape(-1),
    )
    rows, products, highest = aligned(wide * ROOM, weight), aligned(count * ROOM, weight), aligned(width, weight)
    rows_in_pairs, exponentials = room_for_pairs(wide, pairs), room_for_pairs(count, pairs)
    for start in range(first, last, SLOTS):
        slots = min(SLOTS, last - start)
        unit_rows(weight, inverse_length, start, start + slots, rows, wide)
        compare(rows, slots, flat, 0, wide, count, products, pairs, rows_in_pairs)
        for panel in range(len(queries)):
            highest_of(products, panel, slots, highest, lanes)
            for column in range(width):
                query = panel * width + column
                if highest[column] > largest[query]:
                    shrink = math.exp(largest[query] - highest[column])
                    largest[query] = highest[column]
                    totals[query] *= shrink
                    if with_mean:
                        for of_width in range(wide // width):
                            scale(sums, (of_width * count + query) * width, width, shrink, lanes)
            for lane in range(0, width, lanes):
                number, place = panel * width + lane, panel * ROOM * width + lane
                most, total = load(largest, number), zeros(rows)
                if pairs is None:
                    for at in range(place, place + slots * width, width):
                        value = exponential(load(products, at) - most)
                        total = total + value
                        store(products, at, value)
                else:
                    into = panel * ROOM_OF_PAIRS * width + lane
                    for slot in range(0, slots, 2):
                        at = place + slot * width
                        value, other = exponential(load(products, at) - most), zeros(rows)
                        if slot + 1 < slots:
                            other = exponential(load(products, at + width) - most)
                        total = total + value + other
                        store(exponentials, into + slot // 2 * width, paired(value, other))
                store(totals, number, load(totals, number) + total)
        if with_mean:
            add_slots(products, exponentials, rows, rows_in_pairs, slots, count, wide, sums, pairs)


@kept()
@no_type_check
def pulls_on_slots(queries, pulls, log_normalisers, weight, inverse_length, first, last, gradient, pairs):
    """Fill the gradient [K, D] of slots `first` to `last`: Σ p · pull over the queries, p of a slot, along the sphere.

    queries: over the temperature, [parts, N / w, D, w]. pulls: [parts, D / w, N, w]. log_normalisers: [parts, N]. pairs: none, or
    of each two numbers of a query, [parts, N / w, D / 2, w], and of each two pulls, [parts, D / w, N / 2, w].
    """
    wide, width = queries.shape[2:]
    parts, count, lanes = len(queries), queries.shape[1] * width, BYTES // weight.itemsize
    flat, flat_pulls, normalisers = queries.reshape(-1), pulls.reshape(-1), log_normalisers.reshape(-1)
    rows, products, pulled = aligned(wide * ROOM, weight), aligned(count * ROOM, weight), aligned(wide * ROOM, weight)
    rows_in_pairs, probabilities = room_for_pairs(wide, pairs), room_for_pairs(count, pairs)
    queries_in_pairs, pulls_in_pairs = (None, None) if pairs is None else pairs
    numbers = aligned(lanes, weight)
    for start in range(first, last, SLOTS):
        slots = min(SLOTS, last - start)
        unit_rows(weight, inverse_length, start, start + slots, rows, wide)
        for part in range(parts):
            at = part * count * wide
            compare(rows, slots, flat, at, wide, count, products, queries_in_pairs, rows_in_pairs)
            for number in range(0, count, lanes if pairs is None else width):
                normaliser = load(normalisers, part * count + number)
                to = number // width * ROOM * width + number % width
                if pairs is None:
                    for place in range(to, to + slots * width, width):
                        store(products, place, exponential(load(products, place) - normaliser))
                else:
                    other = load(normalisers, part * count + number + lanes)
                    for place in range(to, to + slots * width, width):
                        value = exponential(load(products, place) - normaliser)
                        value = neighbours(value, exponential(load(products, place + lanes) - other))
                        store(probabilities, place // 2, value)
            if pairs is None:
                multiply(
                    products, 0, ROOM * width, flat_pulls, at, count * width, pulled, 0, ROOM * width,
                    slots, wide, count, part > 0,
                )  # fmt: skip
            else:
                multiply(
                    probabilities, 0, ROOM * width // 2, pulls_in_pairs.reshape(-1), at // 2, count // 2 * width,
                    pulled, 0, ROOM * width, slots, wide, count // 2, part > 0,
                )  # fmt: skip
        for slot in range(start, start + slots):
            put_along_sphere(pulled, rows, slot - start, wide, inverse_length[slot], gradient[slot], numbers)


@inlined
@no_type_check
def compare(rows, slots, queries, at, wide, count, products, pairs, rows_in_pairs):
    """Fill the products of unit rows and of so many queries, flat, from an index on; or of pairs of both, if there are queries'."""
    width = panel_width(rows.itemsize)
    if pairs is None:
        multiply(rows, 0, ROOM * width, queries, at, wide * width, products, 0, ROOM * width, slots, count, wide, False)
        return
    half = ROOM * width // 2
    pair_columns(rows, 0, ROOM * width, slots, wide, rows_in_pairs, half)
    multiply(
        rows_in_pairs, 0, half, pairs.reshape(-1), at // 2, wide // 2 * width, products, 0, ROOM * width,
        slots, count, wide // 2, False,
    )  # fmt: skip


@inlined
@no_type_check
def add_slots(products, exponentials, rows, rows_in_pairs, slots, count, wide, sums, pairs):
    """Add to each query's sum its exponentials' products with the unit rows: those in `products`, or pairs of them."""
    width = panel_width(rows.itemsize)
    if pairs is None:
        multiply_transposed(
            products, 0, ROOM * width, rows, 0, ROOM * width, sums, 0, count * width, count, wide, slots, True, False
        )
        return
    panel = ROOM_OF_PAIRS * width
    pair_rows(rows, 0, ROOM * width, slots, wide, rows_in_pairs, panel)
    multiply_transposed(
        exponentials, 0, panel, rows_in_pairs, 0, panel, sums, 0, count * width,
        count, wide, (slots + 1) // 2, True, False,
    )  # fmt: skip


@inlined
@no_type_check
def room_for_pairs(columns, pairs):
    """Return room for the numbers of so many columns, for each slot, as pairs; none without pairs."""
    return aligned(0 if pairs is None else columns * ROOM_OF_PAIRS, np.empty(0, np.uint32))


@inlined
@no_type_check
def unit_rows(weight, inverse_length, start, end, rows, wide):
    """Fill panels [D / w, ROOM, w] with slots of length 1."""
    width, given = panel_width(weight.itemsize), weight.shape[1]
    lanes, flat = BYTES // weight.itemsize, weight.reshape(-1)
    for slot in range(start, end):
        inverse = repeated(weight, inverse_length[slot])
        for column in range(0, wide, lanes):
            to = (column // width * ROOM + slot - start) * width + column % width
            if column + lanes <= given:
                store(rows, to, inverse * load(flat, slot * given + column))
            else:
                store(rows, to, zeros(rows))
                for number in range(column, given):
                    rows[to + number - column] = inverse_length[slot] * weight[slot, number]


@inlined
@no_type_check
def highest_of(products, panel, slots, highest, lanes):
    """Put the largest product of each query of a panel."""
    width = panel_width(products.itemsize)
    for lane in range(0, width, lanes):
        at = panel * ROOM * width + lane
        most = repeated(products, -np.inf)
        for place in range(at, at + slots * width, width):
            most = greatest(most, load(products, place))
        store(highest, lane, most)


@inlined
@no_type_check
def scale(numbers, start, count, factor, lanes):
    for at in range(start, start + count, lanes):
        store(numbers, at, repeated(numbers, factor) * load(numbers, at))


@inlined
@no_type_check
def put_along_sphere(pulled, rows, slot, wide, inverse_length, gradient, numbers):
    """Fill a slot's gradient [D]: its unit row's, pushed through the normalisation. numbers: room for a vector."""
    width, lanes = panel_width(rows.itemsize), len(numbers)
    along, product = zeros(rows), 0.0
    for column in range(0, wide, lanes):
        at = (column // width * ROOM + slot) * width + column % width
        along = along + load(pulled, at) * load(rows, at)
    store(numbers, 0, along)
    for lane in range(lanes):
        product += numbers[lane]
    for column in range(0, wide, lanes):
        at = (column // width * ROOM + slot) * width + column % width
        value = repeated(rows, inverse_length) * (load(pulled, at) - repeated(rows, product) * load(rows, at))
        if column + lanes <= len(gradient):
            store(gradient, column, value)
        else:
            store(numbers, 0, value)
            for number in range(column, len(gradient)):
                gradient[number] = numbers[number - column]
