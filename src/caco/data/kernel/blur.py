"""The Gaussian blur of three planes, with the last stage behind it while the pixels are in the cache."""

from __future__ import annotations

import math
from typing import no_type_check

import numpy as np
from numba import njit

from caco.data.kernel.colours import finish
from caco.data.kernel.compilation import CHUNK, OPTIONS, ZERO

# The blur adds this many pairs of neighbours at a time: as many arrays as the compiler will check for overlap. To this
# number mix_neighbours is unrolled by hand.
PAIRS = 3


@njit(**OPTIONS)
@no_type_check
def blur_margin(sigma):
    """Rows added above and below a plane: the blur's radius, ceil(3 sigma), rounded up to whole groups of PAIRS."""
    return int(math.ceil(math.ceil(np.float32(3) * sigma) / PAIRS)) * PAIRS


@njit(**OPTIONS)
@no_type_check
def gaussian(sigma, weights):
    """Fill weights[k] of a Gaussian at distance k, 0 beyond ceil(3 sigma); return that radius."""
    radius = int(math.ceil(np.float32(3) * sigma))
    weights[:] = ZERO
    total = 0.0
    for k in range(radius + 1):
        weights[k] = math.exp(-0.5 * (k / sigma) ** 2)
        total += weights[k] if k == 0 else 2 * weights[k]
    for k in range(radius + 1):
        weights[k] /= total
    return radius


@njit(**OPTIONS)
@no_type_check
def mix_neighbours(source, centre, stride, weights, radius, target):
    """target[i] = the sum of weights[|k|] * source[centre + i + k * stride] for |k| up to radius."""
    n = len(target)
    middle = source[centre : centre + n]
    w = weights[0]
    for i in range(n):
        target[i] = w * middle[i]
    k = 1
    while k <= radius:
        w1, w2, w3 = weights[k], weights[k + 1], weights[k + 2]
        a1, b1 = source[centre - k * stride :], source[centre + k * stride :]
        a2, b2 = source[centre - (k + 1) * stride :], source[centre + (k + 1) * stride :]
        a3, b3 = source[centre - (k + 2) * stride :], source[centre + (k + 2) * stride :]
        for i in range(n):
            target[i] += w1 * (a1[i] + b1[i]) + w2 * (a2[i] + b2[i]) + w3 * (a3[i] + b3[i])
        k += PAIRS


@njit(**OPTIONS)
@no_type_check
def blur_and_finish(planes, size, margin, weights, radius, solarize, scale, offset, lines, view):
    """Blur three planes and write them to the view, a block of rows at a time so that all passes stay in the cache.

    planes: `size` rows with `margin` more above and below, which are filled here. lines: float32 [5, pixels], scratch.
    """
    below = (margin + size) * size
    for channel in range(3):
        plane = planes[channel]
        for y in range(margin):
            for x in range(size):
                plane[y * size + x] = plane[margin * size + x]
                plane[below + y * size + x] = plane[below - size + x]
    wide = size + 2 * margin
    rows = max(1, CHUNK // size)
    for top in range(0, size, rows):
        count = min(rows, size - top)
        down, padded = lines[0, : count * size], lines[1, : count * wide]
        for channel in range(3):
            mix_neighbours(planes[channel], (margin + top) * size, size, weights, radius, down)
            for y in range(count):
                start = y * wide
                for x in range(margin):
                    padded[start + x] = down[y * size]
                    padded[start + margin + size + x] = down[(y + 1) * size - 1]
                for x in range(size):
                    padded[start + margin + x] = down[y * size + x]
            mix_neighbours(padded, margin, 1, weights, radius, lines[2 + channel, : (count - 1) * wide + size])
        for y in range(count):
            start, stop = y * wide, y * wide + size
            red, green, blue = lines[2, start:stop], lines[3, start:stop], lines[4, start:stop]
            finish(red, green, blue, solarize, scale, offset, view[top + y])
