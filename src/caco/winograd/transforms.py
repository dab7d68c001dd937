"""Winograd's transforms in one dimension, compiled (numba): what is read, computed, and written, a vector of channels at a time.

Four outputs in a row. F(4, 3): six inputs, six products. With stride 2, the filter's outer taps meet the inputs at even
places, F(4, 2) with five products, and its middle tap those at odd places, four products: nine inputs, nine products.
In each case what is transposed makes the gradients.

Each formula takes and returns a tuple of vectors, or of numbers; `there` and `back` are for compiled code (`formulas.py:
compiled`), choose it by what is transformed, and read and write.
"""

from __future__ import annotations

from typing import Any

from caco.cpu_kernels.formulas import compiled

Vectors = tuple[Any, ...]

INPUTS, OUTPUTS, FILTERS, INPUTS_BY_TWO, OUTPUTS_BY_TWO, FILTERS_BY_TWO, SAMPLES = range(7)
"""What is transformed: what goes into a convolution, what comes out of it, its filters; with stride 1 or 2; or nothing is done."""
SIDE = (6, 6, 6, 9, 9, 9, 4)
"""Of each: numbers in a row of what is multiplied."""


def inputs(d: Vectors) -> Vectors:
    """Bᵀ d of F(4, 3)."""
    a, b = d[4] - 4 * d[2], d[3] - 4 * d[1]
    e, f = d[4] - d[2], 2 * (d[3] - d[1])
    return 4 * d[0] - 5 * d[2] + d[4], a + b, a - b, e + f, e - f, 4 * d[1] - 5 * d[3] + d[5]


def inputs_back(t: Vectors) -> Vectors:
    """B t of F(4, 3)."""
    a, b = t[1] + t[2], t[3] + t[4]
    e = 4 * (t[2] - t[1]) + 2 * (t[4] - t[3])
    f = t[1] - t[2] + 2 * (t[3] - t[4])
    return 4 * t[0], e + 4 * t[5], -5 * t[0] - 4 * a - b, f - 5 * t[5], t[0] + a + b, t[5]


def outputs(m: Vectors) -> Vectors:
    """Aᵀ m of F(4, 3)."""
    a, b, e, f = m[1] + m[2], m[1] - m[2], m[3] + m[4], m[3] - m[4]
    return m[0] + a + e, b + 2 * f, a + 4 * e, b + 8 * f + m[5]


def outputs_back(y: Vectors) -> Vectors:
    """A y of F(4, 3)."""
    a, b, e, f = y[0] + y[2], y[1] + y[3], y[0] + 4 * y[2], 2 * y[1] + 8 * y[3]
    return y[0], a + b, a - b, e + f, e - f, y[3]


def inputs_by_two(d: Vectors) -> Vectors:
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


def inputs_by_two_back(t: Vectors) -> Vectors:
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


def outputs_by_two(m: Vectors) -> Vectors:
    """Aᵀ m of stride 2."""
    a, b = m[1] + m[2], m[1] - m[2]
    return m[0] + a + m[3] + m[5], b + 2 * m[3] + m[6], a + 4 * m[3] + m[7], b + 8 * m[3] + m[4] + m[8]


def outputs_by_two_back(y: Vectors) -> Vectors:
    """A y of stride 2."""
    a, b = y[0] + y[2], y[1] + y[3]
    return y[0], a + b, a - b, y[0] + 2 * y[1] + 4 * y[2] + 8 * y[3], y[3], y[0], y[1], y[2], y[3]


def filters(g: Vectors) -> Vectors:
    """G g of F(4, 3)."""
    a, b = (-1 / 6) * (g[0] + g[2]), (1 / 6) * g[1]
    e, f = (1 / 24) * (g[0] + 4 * g[2]), (1 / 12) * g[1]
    return (1 / 4) * g[0], a - b, a + b, e + f, e - f, g[2]


def filters_back(u: Vectors) -> Vectors:
    """Gᵀ u of F(4, 3)."""
    a, b = (-1 / 6) * (u[1] + u[2]), (1 / 24) * (u[3] + u[4])
    return (1 / 4) * u[0] + a + b, (1 / 6) * (u[2] - u[1]) + (1 / 12) * (u[3] - u[4]), a + 4 * b + u[5]


def filters_by_two(g: Vectors) -> Vectors:
    """G g of stride 2."""
    a, b = (1 / 6) * g[0], (1 / 6) * g[2]
    return (1 / 2) * g[0], -3 * (a + b), b - a, a + 2 * b, g[2], g[1], g[1], g[1], g[1]


def filters_by_two_back(u: Vectors) -> Vectors:
    """Gᵀ u of stride 2."""
    a, b = (1 / 2) * u[1], (1 / 6) * u[2]
    return (
        (1 / 2) * u[0] - a - b + (1 / 6) * u[3],
        u[5] + u[6] + u[7] + u[8],
        b - a + (1 / 3) * u[3] + u[4],
    )


def samples(d: Vectors) -> Vectors:
    """What comes out of a convolution of 1 × 1 with stride 2: it meets the inputs that `inputs_by_two` leaves as they are."""
    return d


FORMULAS = {
    INPUTS: (6, inputs),
    OUTPUTS: (4, outputs_back),
    INPUTS_BY_TWO: (9, inputs_by_two),
    OUTPUTS_BY_TWO: (4, outputs_by_two_back),
    SAMPLES: (4, samples),
}
FORMULAS_BACK = {
    INPUTS: (6, inputs_back),
    OUTPUTS: (6, outputs),
    INPUTS_BY_TWO: (9, inputs_by_two_back),
    OUTPUTS_BY_TWO: (9, outputs_by_two),
    SAMPLES: (4, samples),
}
there, back, back_added = compiled(FORMULAS), compiled(FORMULAS_BACK), compiled(FORMULAS_BACK, add=True)
"""What transforms maps; its transpose; the same added to what is there."""
filter_there = compiled({FILTERS: (3, filters), FILTERS_BY_TWO: (3, filters_by_two)})
filter_back = compiled({FILTERS: (6, filters_back), FILTERS_BY_TWO: (9, filters_by_two_back)})
