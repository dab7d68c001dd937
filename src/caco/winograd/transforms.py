"""Winograd's transforms in one dimension, compiled (numba): what is read, computed, and written, a vector of channels at a time.

Four outputs in a row. F(4, 3): six inputs, six products. With stride 2, the filter's outer taps meet the inputs at even
places, F(4, 2) with five products, and its middle tap those at odd places, four products: nine inputs, nine products.
In each case what is transposed makes the gradients.

Each formula takes and returns a tuple of vectors; `there` and `back` choose it by what is transformed, and read and write.
Python's types mean nothing to numba, hence the no_type_check.
"""

from __future__ import annotations

from typing import no_type_check

from numba import njit

from caco.winograd.vectors import load_all, store_all

inlined = njit(forceinline=True, error_model="numpy")

INPUTS, OUTPUTS, FILTERS, INPUTS_BY_TWO, OUTPUTS_BY_TWO, FILTERS_BY_TWO = range(6)
"""What is transformed: what goes into a convolution, what comes out of it, its filters; with stride 1 or 2."""
SIDE = (6, 6, 6, 9, 9, 9)
"""Of each: numbers in a row of what is multiplied."""


@inlined
@no_type_check
def inputs(d):
    """Bᵀ d of F(4, 3)."""
    a, b = d[4] - 4 * d[2], d[3] - 4 * d[1]
    e, f = d[4] - d[2], 2 * (d[3] - d[1])
    return 4 * d[0] - 5 * d[2] + d[4], a + b, a - b, e + f, e - f, 4 * d[1] - 5 * d[3] + d[5]


@inlined
@no_type_check
def inputs_back(t):
    """B t of F(4, 3)."""
    a, b = t[1] + t[2], t[3] + t[4]
    e = 4 * (t[2] - t[1]) + 2 * (t[4] - t[3])
    f = t[1] - t[2] + 2 * (t[3] - t[4])
    return 4 * t[0], e + 4 * t[5], -5 * t[0] - 4 * a - b, f - 5 * t[5], t[0] + a + b, t[5]


@inlined
@no_type_check
def outputs(m):
    """Aᵀ m of F(4, 3)."""
    a, b, e, f = m[1] + m[2], m[1] - m[2], m[3] + m[4], m[3] - m[4]
    return m[0] + a + e, b + 2 * f, a + 4 * e, b + 8 * f + m[5]


@inlined
@no_type_check
def outputs_back(y):
    """A y of F(4, 3)."""
    a, b, e, f = y[0] + y[2], y[1] + y[3], y[0] + 4 * y[2], 2 * y[1] + 8 * y[3]
    return y[0], a + b, a - b, e + f, e - f, y[3]


@inlined
@no_type_check
def inputs_by_two(d):
    """Bᵀ d of stride 2: F(4, 2) of the even places, then the odd ones."""
    a, b = d[6] - d[2], d[6] - d[4]
    return (
        2 * (d[0] - d[4]) + a,
        b - 2 * d[2],
        2 * d[2] - 3 * d[4] + d[6],
        a,
        d[8] - d[4] - 2 * a,
        d[1],
        d[3],
        d[5],
        d[7],
    )


@inlined
@no_type_check
def inputs_by_two_back(t):
    """B t of stride 2."""
    a = t[3] - 2 * t[4]
    return (
        2 * t[0],
        t[5],
        2 * (t[2] - t[1]) - t[0] - a,
        t[6],
        -2 * t[0] - t[1] - 3 * t[2] - t[4],
        t[7],
        t[0] + t[1] + t[2] + a,
        t[8],
        t[4],
    )


@inlined
@no_type_check
def outputs_by_two(m):
    """Aᵀ m of stride 2."""
    a, b = m[1] + m[2], m[1] - m[2]
    return m[0] + a + m[3] + m[5], b + 2 * m[3] + m[6], a + 4 * m[3] + m[7], b + 8 * m[3] + m[4] + m[8]


@inlined
@no_type_check
def outputs_by_two_back(y):
    """A y of stride 2."""
    a, b = y[0] + y[2], y[1] + y[3]
    return y[0], a + b, a - b, y[0] + 2 * y[1] + 4 * y[2] + 8 * y[3], y[3], y[0], y[1], y[2], y[3]


@inlined
@no_type_check
def filters(g):
    """G g of F(4, 3)."""
    a, b = (-1 / 6) * (g[0] + g[2]), (1 / 6) * g[1]
    e, f = (1 / 24) * (g[0] + 4 * g[2]), (1 / 12) * g[1]
    return (1 / 4) * g[0], a - b, a + b, e + f, e - f, g[2]


@inlined
@no_type_check
def filters_back(u):
    """Gᵀ u of F(4, 3)."""
    a, b = (-1 / 6) * (u[1] + u[2]), (1 / 24) * (u[3] + u[4])
    return (1 / 4) * u[0] + a + b, (1 / 6) * (u[2] - u[1]) + (1 / 12) * (u[3] - u[4]), a + 4 * b + u[5]


@inlined
@no_type_check
def filters_by_two(g):
    """G g of stride 2."""
    a, b = (1 / 6) * g[0], (1 / 6) * g[2]
    return (1 / 2) * g[0], -3 * (a + b), b - a, a + 2 * b, g[2], g[1], g[1], g[1], g[1]


@inlined
@no_type_check
def filters_by_two_back(u):
    """Gᵀ u of stride 2."""
    a, b = (1 / 2) * u[1], (1 / 6) * u[2]
    return (
        (1 / 2) * u[0] - a - b + (1 / 6) * u[3],
        u[5] + u[6] + u[7] + u[8],
        b - a + (1 / 3) * u[3] + u[4],
    )


@inlined
@no_type_check
def there(kind, source, at, step, target, to, by):
    """Transform a row or column: one vector every `step` numbers of the source, one every `by` of the target."""
    if kind == INPUTS:
        store_all(target, to, by, inputs(load_all(source, at, step, 6)))
    elif kind == OUTPUTS:
        store_all(target, to, by, outputs_back(load_all(source, at, step, 4)))
    elif kind == FILTERS:
        store_all(target, to, by, filters(load_all(source, at, step, 3)))
    elif kind == INPUTS_BY_TWO:
        store_all(target, to, by, inputs_by_two(load_all(source, at, step, 9)))
    elif kind == OUTPUTS_BY_TWO:
        store_all(target, to, by, outputs_by_two_back(load_all(source, at, step, 4)))
    else:
        store_all(target, to, by, filters_by_two(load_all(source, at, step, 3)))


@inlined
@no_type_check
def back(kind, source, at, step, target, to, by):
    """The transpose of `there`."""
    if kind == INPUTS:
        store_all(target, to, by, inputs_back(load_all(source, at, step, 6)))
    elif kind == OUTPUTS:
        store_all(target, to, by, outputs(load_all(source, at, step, 6)))
    elif kind == FILTERS:
        store_all(target, to, by, filters_back(load_all(source, at, step, 6)))
    elif kind == INPUTS_BY_TWO:
        store_all(target, to, by, inputs_by_two_back(load_all(source, at, step, 9)))
    elif kind == OUTPUTS_BY_TWO:
        store_all(target, to, by, outputs_by_two(load_all(source, at, step, 9)))
    else:
        store_all(target, to, by, filters_by_two_back(load_all(source, at, step, 9)))
