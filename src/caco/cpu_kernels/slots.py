"""All slots against all queries, a block of slots at a time, compiled (numba): the nearest slot, softmaxes, gradients.

As in `caco/slots.py`, with exponentials, maxima and sums taken while a block's products are in the nearest caches. Queries
and slots are matrices in panels (`products.py`); widths and numbers of queries are rounded up to whole panels with zeros.
Python's types mean nothing to numba, hence the no_type_check.
"""

from __future__ import annotations

import math
from typing import no_type_check

import numpy as np

from caco.compiled_code import kept
from caco.cpu_kernels.formulas import exponential
from caco.cpu_kernels.memory import aligned, inlined
from caco.cpu_kernels.processor import BYTES
from caco.cpu_kernels.products import multiply, multiply_transposed, panel_width
from caco.cpu_kernels.vectors import greatest, load, repeated, store, zeros

SLOTS = 96
"""Slots at a time: their products with some hundred queries stay in the second nearest cache."""
ROOM = SLOTS | 1
"""Rows of a panel of so many: an odd number, lest all panels use the same few lines of a cache."""


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
def softmax(queries, weight, inverse_length, first, last, largest, totals, slot_sums, with_mean):
    """Take slots `first` to `last` into each query's softmax: its largest logit, Σ exp(logit − largest), and Σ of that · slot.

    queries: over the temperature, as in `nearest`. largest, totals: [N]; slot_sums: [D / w, N, w], all filled.
    """
    wide, width = queries.shape[1:]
    count, lanes, flat, sums = (
        len(queries) * width,
        BYTES // weight.itemsize,
        queries.reshape(-1),
        slot_sums.reshape(-1),
    )
    rows, products, highest = aligned(wide * ROOM, weight), aligned(count * ROOM, weight), aligned(width, weight)
    for start in range(first, last, SLOTS):
        slots = min(SLOTS, last - start)
        unit_rows(weight, inverse_length, start, start + slots, rows, wide)
        multiply(rows, 0, ROOM * width, flat, 0, wide * width, products, 0, ROOM * width, slots, count, wide, False)
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
                most, total = load(largest, panel * width + lane), zeros(rows)
                for at in range(panel * ROOM * width + lane, (panel * ROOM + slots) * width + lane, width):
                    value = exponential(load(products, at) - most)
                    total = total + value
                    store(products, at, value)
                store(totals, panel * width + lane, load(totals, panel * width + lane) + total)
        if with_mean:
            multiply_transposed(
                products, 0, ROOM * width,
                rows, 0, ROOM * width,
                sums, 0, count * width,
                count, wide, slots, True, False,
            )  # fmt: skip


@kept()
@no_type_check
def pulls_on_slots(queries, pulls, log_normalisers, weight, inverse_length, first, last, gradient):
    """Fill the gradient [K, D] of slots `first` to `last`: Σ p · pull over the queries, p of a slot, along the sphere.

    queries: over the temperature, [parts, N / w, D, w]. pulls: [parts, D / w, N, w]. log_normalisers: [parts, N].
    """
    wide, width = queries.shape[2:]
    parts, count, lanes = len(queries), queries.shape[1] * width, BYTES // weight.itemsize
    flat, flat_pulls, normalisers = queries.reshape(-1), pulls.reshape(-1), log_normalisers.reshape(-1)
    rows, products, pulled = aligned(wide * ROOM, weight), aligned(count * ROOM, weight), aligned(wide * ROOM, weight)
    for start in range(first, last, SLOTS):
        slots = min(SLOTS, last - start)
        unit_rows(weight, inverse_length, start, start + slots, rows, wide)
        for part in range(parts):
            at = part * count * wide
            multiply(
                rows, 0, ROOM * width, flat, at, wide * width, products, 0, ROOM * width, slots, count, wide, False
            )
            for number in range(0, count, lanes):
                normaliser = load(normalisers, part * count + number)
                to = number // width * ROOM * width + number % width
                for place in range(to, to + slots * width, width):
                    store(products, place, exponential(load(products, place) - normaliser))
            multiply(
                products,
                0,
                ROOM * width,
                flat_pulls,
                at,
                count * width,
                pulled,
                0,
                ROOM * width,
                slots,
                wide,
                count,
                part > 0,
            )
        for slot in range(slots):
            along_sphere(pulled, rows, slot, wide // width, width, lanes, inverse_length[start + slot])
            for column in range(weight.shape[1]):
                gradient[start + slot, column] = pulled[(column // width * ROOM + slot) * width + column % width]


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
def along_sphere(pulled, rows, slot, panels, width, lanes, inverse_length):
    """Push the gradient of a unit row through its normalisation: what remains is tangent to the sphere."""
    product = 0.0
    for panel in range(panels):
        at = (panel * ROOM + slot) * width
        for number in range(at, at + width):
            product += pulled[number] * rows[number]
    for panel in range(panels):
        at = (panel * ROOM + slot) * width
        for number in range(at, at + width, lanes):
            value = load(pulled, number) - repeated(rows, product) * load(rows, number)
            store(pulled, number, repeated(rows, inverse_length) * value)
