"""Filters transformed for Winograd's convolution, and their gradients transformed back, compiled (numba).

Python's types mean nothing to numba, hence the no_type_check.
"""

from __future__ import annotations

from typing import no_type_check

from numba import njit

from caco.winograd.products import panel_width, position
from caco.winograd.strips import aligned
from caco.winograd.transforms import FILTERS, FILTERS_BY_TWO, SIDE, filter_back, filter_there
from caco.winograd.vectors import BYTES, load, store, zeros


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def filters_to_places(stride, filters, matrices, first, last):
    """Fill the matrices [places, columns / w, rows, w], as `products.py` has them, in their rows `first` to `last`.

    filters: [rows, 3, 3, columns].
    """
    rows, columns = len(filters), filters.shape[3]
    kind = FILTERS if stride == 1 else FILTERS_BY_TWO
    side, lanes = SIDE[kind], BYTES // filters.itemsize
    source, target, half = filters.reshape(-1), matrices.reshape(-1), aligned(27 * lanes, filters)
    size, width = rows * columns, panel_width(filters.itemsize)
    for column in range(0, columns, lanes):
        for row in range(first, last):
            at = row * 9 * columns + column
            filter_there(kind, 3, source, at, columns, 3 * columns, half, 0, lanes, 3 * lanes)
            to = position(row, column, rows, width)
            filter_there(kind, side, half, 0, 3 * lanes, lanes, target, to, side * size, size)


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def places_to_filters(stride, parts, filters, first, last):
    """Fill the filters with the transpose of `filters_to_places` of the sum of parts [parts, places, columns / w, rows, w]."""
    rows, columns = len(filters), filters.shape[3]
    kind = FILTERS if stride == 1 else FILTERS_BY_TWO
    side, lanes = SIDE[kind], BYTES // filters.itemsize
    source, target = parts.reshape(-1), filters.reshape(-1)
    sums, half = aligned(side * lanes, filters), aligned(27 * lanes, filters)
    size, width = rows * columns, panel_width(filters.itemsize)
    for column in range(0, columns, lanes):
        for row in range(first, last):
            at = position(row, column, rows, width)
            for i in range(side):
                for j in range(side):
                    total = zeros(source)
                    for part in range(len(parts)):
                        total = total + load(source, at + ((part * side + i) * side + j) * size)
                    store(sums, j * lanes, total)
                filter_back(kind, 1, sums, 0, 0, lanes, half, i * 3 * lanes, 0, lanes)
            to = row * 9 * columns + column
            filter_back(kind, 3, half, 0, lanes, 3 * lanes, target, to, columns, 3 * columns)
