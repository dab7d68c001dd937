"""Products of matrices, compiled (numba), for many small ones: what a library needs to start is long against them.

Python's types mean nothing to numba, hence the no_type_check.
"""

from __future__ import annotations

from typing import no_type_check

from numba import njit
from numba.extending import register_jitable

from caco.compiled_code import kept
from caco.cpu_kernels.processor import BYTES
from caco.cpu_kernels.vectors import (
    add_all,
    add_products,
    numbers_in,
    store_all,
    store_all_past_caches,
    zeros_all,
)

ROWS = 6
"""Rows of a result that are computed together: with two vectors of columns, their sums fill the registers."""
DEPTH = 256
"""Terms that are added up at a time: so many rows of the right matrix, of two vectors, stay in the nearest cache."""


@register_jitable
def panel_width(itemsize: int) -> int:
    """Return the columns of a panel, two vectors, for numbers of so many bytes."""
    return 2 * BYTES // itemsize


@njit(forceinline=True, error_model="numpy")
@no_type_check
def position(row, column, rows, width):
    """Return where a number is in a matrix whose panels of so many rows follow each other."""
    return (column // width * rows + row) * width + column % width


@kept()
@no_type_check
def multiply(
    left, left_at, left_panel,
    right, right_at, right_panel,
    result, result_at, result_panel,
    rows, columns, depth, add,
):  # fmt: skip
    """result[rows, columns] = left[rows, depth] · right[depth, columns], or that is added to the result.

    Each matrix is a part of a contiguous array of one dimension, from an index on: panels of `panel_width` columns, row
    by row, one every `*_panel` numbers. Columns are whole panels, as terms are; rows are rounded up to ROWS, for which
    there must be room. Left and right may be pairs of bfloat16 (`pairs.py`): then depth counts pairs, and a panel on the left
    is half as wide.
    """
    width = panel_width(result.itemsize)
    lanes, terms = width // 2, width // numbers_in(left)
    for start in range(0, depth, DEPTH):
        end = min(depth, start + DEPTH)
        for panel in range(columns // width):
            for first in range(0, rows, ROWS):
                b = right_at + panel * right_panel + start * width
                sums = zeros_all(result, 12)  # two for each of ROWS
                for term in range(start, end, terms):
                    a = left_at + term // terms * left_panel + first * terms
                    for _ in range(terms):
                        sums = add_products(sums, left, a, terms, right, b)
                        a += 1
                        b += width
                c = result_at + panel * result_panel + first * width
                if start or add:
                    add_all(result, c, lanes, sums)
                else:
                    store_all(result, c, lanes, sums)


@kept()
@no_type_check
def multiply_transposed(
    left, left_at, left_panel,
    right, right_at, right_panel,
    result, result_at, result_panel,
    rows, columns, depth, add, past,
):  # fmt: skip
    """result[rows, columns] = leftᵀ[rows, depth] · right[depth, columns], or that is added to the result.

    past: the result, which is not added to then, is written past the caches and begins with a line of them. Matrices as in
    `multiply`; `left` has `depth` rows and `rows` columns, which are whole panels.
    """
    width = panel_width(result.itemsize)
    lanes = width // 2
    for left_columns in range(0, rows, width):
        for panel in range(columns // width):
            for first in range(0, width, 4):
                a = left_at + left_columns // width * left_panel + first
                b = right_at + panel * right_panel
                sums = zeros_all(result, 8)  # two for each of four rows, which a panel is a multiple of
                for _ in range(depth):
                    sums = add_products(sums, left, a, 1, right, b)
                    a += width
                    b += width
                c = result_at + panel * result_panel + (left_columns + first) * width
                if add:
                    add_all(result, c, lanes, sums)
                elif past:
                    store_all_past_caches(result, c, lanes, sums)
                else:
                    store_all(result, c, lanes, sums)
