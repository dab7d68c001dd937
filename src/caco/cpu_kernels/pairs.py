"""Matrices of bfloat16 pairs, compiled (numba), made of float32 ones for `products.py`: with two terms of a product in each.

Python's types mean nothing to numba, hence the no_type_check.
"""

from __future__ import annotations

from typing import no_type_check

from numba.extending import intrinsic

from caco.compiled_code import kept
from caco.cpu_kernels import bfloat16
from caco.cpu_kernels.products import panel_width
from caco.cpu_kernels.vectors import load, store, zeros


@intrinsic
@no_type_check
def paired(typing, low, high):
    """Return pairs of two vectors' numbers, rounded."""
    return low(low, high), lambda context, builder, signature, given: bfloat16.pairs(builder, *given)


@intrinsic
@no_type_check
def neighbours(typing, first, second):
    """Return pairs of each two neighbouring numbers of two vectors, one after the other, rounded."""
    return first(first, second), lambda context, builder, signature, given: bfloat16.neighbours(builder, *given)


@kept()
@no_type_check
def pair_rows(matrix, at, panel_size, rows, columns, target, target_panel):
    """Fill a matrix of which each row is two of the given one's, for products along its rows; an odd last one is beside zeros.

    matrix: flat, of float32, from an index on; target: flat, of uint32; each in panels of so many numbers (`products.py`).
    """
    width = panel_width(matrix.itemsize)
    for panel in range(columns // width):
        source, into = at + panel * panel_size, panel * target_panel
        for row in range(0, rows, 2):
            for column in range(0, width, width // 2):
                low = load(matrix, source + column)
                high = load(matrix, source + width + column) if row + 1 < rows else zeros(matrix)
                store(target, into + column, paired(low, high))
            source += 2 * width
            into += width


@kept()
@no_type_check
def pair_columns(matrix, at, panel_size, rows, columns, target, target_panel):
    """Fill a matrix of which each column is two neighbouring ones, for products along them, half as wide; as `pair_rows`."""
    width = panel_width(matrix.itemsize)
    lanes = width // 2
    for panel in range(columns // width):
        source, into = at + panel * panel_size, panel * target_panel
        for _ in range(rows):
            store(target, into, neighbours(load(matrix, source), load(matrix, source + lanes)))
            source += width
            into += lanes
