"""Filters transformed for Winograd's convolution, and their gradients transformed back, compiled (numba).

Python's types mean nothing to numba, hence the no_type_check.
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np
from numba import njit

from caco.winograd import transforms
from caco.winograd.vectors import BYTES, load, load_all, store, store_all, zeros


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def filters_to_places(stride, filters, matrices, first, last):
    """Fill the matrices [places, columns / w, rows, w], as `products.py` has them, in their rows `first` to `last`.

    filters: [rows, 3, 3, columns].
    """
    rows, columns = len(filters), filters.shape[3]
    side, lanes = 6 if stride == 1 else 9, BYTES // filters.itemsize
    source, target, half = filters.reshape(-1), matrices.reshape(-1), np.empty(27 * lanes, filters.dtype)
    size, width = rows * columns, 2 * lanes
    for column in range(0, columns, lanes):
        for row in range(first, last):
            at = row * 9 * columns + column
            for j in range(3):
                _there(stride, source, at + j * columns, 3 * columns, half, j * lanes, 3 * lanes)
            to = (column // width * rows + row) * width + column % width
            for i in range(side):
                _there(stride, half, i * 3 * lanes, lanes, target, to + i * side * size, size)


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def places_to_filters(stride, parts, filters, first, last):
    """Fill the filters with the transpose of `filters_to_places` of the sum of parts [parts, places, columns / w, rows, w]."""
    rows, columns = len(filters), filters.shape[3]
    side, lanes = 6 if stride == 1 else 9, BYTES // filters.itemsize
    source, target = parts.reshape(-1), filters.reshape(-1)
    sums, half = np.empty(side * lanes, filters.dtype), np.empty(27 * lanes, filters.dtype)
    size, width = rows * columns, 2 * lanes
    for column in range(0, columns, lanes):
        for row in range(first, last):
            at = (column // width * rows + row) * width + column % width
            for i in range(side):
                for j in range(side):
                    total = zeros(source)
                    for part in range(len(parts)):
                        total = total + load(source, at + ((part * side + i) * side + j) * size)
                    store(sums, j * lanes, total)
                _back(stride, sums, 0, lanes, half, i * 3 * lanes, lanes)
            to = row * 9 * columns + column
            for j in range(3):
                _back(stride, half, j * lanes, 3 * lanes, target, to + j * columns, 3 * columns)


@transforms.inlined
@no_type_check
def _there(stride, source, at, step, target, to, by):
    if stride == 1:
        store_all(target, to, by, transforms.filters(load_all(source, at, step, 3)))
    else:
        store_all(target, to, by, transforms.filters_by_two(load_all(source, at, step, 3)))


@transforms.inlined
@no_type_check
def _back(stride, source, at, step, target, to, by):
    if stride == 1:
        store_all(target, to, by, transforms.filters_back(load_all(source, at, step, 6)))
    else:
        store_all(target, to, by, transforms.filters_by_two_back(load_all(source, at, step, 9)))
