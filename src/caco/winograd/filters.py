"""Filters transformed for Winograd's convolution, and their gradients transformed back, compiled (numba).

Python's types mean nothing to numba, hence the no_type_check.
"""

from __future__ import annotations

from typing import no_type_check

from caco.compiled_code import kept
from caco.cpu_kernels.memory import aligned, is_large, write
from caco.cpu_kernels.processor import BYTES
from caco.cpu_kernels.products import panel_width, position
from caco.cpu_kernels.vectors import load, store, zeros
from caco.winograd.transforms import FILTERS, FILTERS_BY_TWO, SIDE, filter_back, filter_there

ROWS_AT_A_TIME = 16
"""Rows of a panel that are read or written in one go at each place: memory is fast where neighbours follow each other."""


@kept()
@no_type_check
def filters_to_places(stride, filters, transposed, matrices, first, last):
    """Fill each place's matrix, [columns / w, rows, w] as `products.py` has it, in its rows `first` to `last`.

    filters: [rows, 3, 3, columns]; transposed, [columns, 3, 3, rows]. matrices: [places, N], of which those numbers are the first.
    """
    rows, columns = (filters.shape[3], len(filters)) if transposed else (len(filters), filters.shape[3])
    kind = FILTERS if stride == 1 else FILTERS_BY_TWO
    side, lanes, width = SIDE[kind], BYTES // filters.itemsize, panel_width(filters.itemsize)
    source, target, distance = filters.reshape(-1), matrices.reshape(-1), matrices.shape[1]
    room = (ROWS_AT_A_TIME | 1) * width
    half, some = aligned(27 * lanes, filters), aligned(side * side * room, filters)
    taps, past = aligned(9 * room, filters), is_large(matrices)
    for panel in range(0, columns, width):
        for begin in range(first, last, ROWS_AT_A_TIME):
            end = min(begin + ROWS_AT_A_TIME, last)
            for tap in range(9):
                for row in range(begin, end):
                    to = tap * room + (row - begin) * width
                    if transposed:
                        for column in range(width):
                            taps[to + column] = source[((panel + column) * 9 + tap) * rows + row]
                    else:
                        for column in range(0, width, lanes):
                            store(taps, to + column, load(source, (row * 9 + tap) * columns + panel + column))
            for row in range(end - begin):
                for column in range(0, width, lanes):
                    at = to = row * width + column
                    filter_there(kind, 3, taps, at, room, 3 * room, half, 0, lanes, 3 * lanes)
                    filter_there(kind, side, half, 0, 3 * lanes, lanes, some, to, side * room, room)
            start = position(begin, panel, rows, width)
            for place in range(side * side):
                for number in range(0, (end - begin) * width, lanes):
                    write(target, place * distance + start + number, load(some, place * room + number), past)


@kept()
@no_type_check
def places_to_filters(stride, parts, filters, first, last):
    """Fill the filters with the transpose of `filters_to_places` of the sum of parts [parts, places, N]."""
    rows, columns = len(filters), filters.shape[3]
    kind = FILTERS if stride == 1 else FILTERS_BY_TWO
    side, lanes, width = SIDE[kind], BYTES // filters.itemsize, panel_width(filters.itemsize)
    source, target, (places, distance) = parts.reshape(-1), filters.reshape(-1), parts.shape[1:]
    room = (ROWS_AT_A_TIME | 1) * width
    half, some = aligned(27 * lanes, filters), aligned(side * side * room, filters)
    for panel in range(0, columns, width):
        for begin in range(first, last, ROWS_AT_A_TIME):
            end = min(begin + ROWS_AT_A_TIME, last)
            start = position(begin, panel, rows, width)
            for place in range(places):
                for number in range(0, (end - begin) * width, lanes):
                    total = zeros(source)
                    for part in range(len(parts)):
                        total = total + load(source, (part * places + place) * distance + start + number)
                    store(some, place * room + number, total)
            for row in range(begin, end):
                for column in range(0, width, lanes):
                    at, to = (row - begin) * width + column, row * 9 * columns + panel + column
                    filter_back(kind, side, some, at, side * room, room, half, 0, 3 * lanes, lanes)
                    filter_back(kind, 3, half, 0, lanes, 3 * lanes, target, to, columns, 3 * columns)
