"""Crop, resize and flip: from the bytes of an image to three planes in 0-1."""

from __future__ import annotations

import math
from typing import no_type_check

import numpy as np
from numba import njit

from caco.data import parameters as p
from caco.data.kernel.compilation import OPTIONS, ORDERED, UINTP, ZERO


@njit(**OPTIONS)
@no_type_check
def resize_taps(start, length, pixels, size, flip, step, first, count, weights):
    """Fill, for each target pixel, its first source pixel (times step), the number of taps, their weights and a 0.

    The stretch [start, start + length) of `pixels` source pixels becomes `size` pixels; start is below 1.
    """
    scale = length / size
    support = max(scale, 1.0)
    for target in range(size):
        centre = start + (target + 0.5) * scale
        low = max(int(centre - support + 0.5), 0)
        taps = min(int(centre + support + 0.5), pixels) - low
        pixel = size - 1 - target if flip else target
        total = 0.0
        for tap in range(taps):
            weight = max(1.0 - abs(low + tap + 0.5 - centre) / support, 0.0)
            weights[pixel, tap] = weight
            total += weight
        for tap in range(taps):
            weights[pixel, tap] /= total
        weights[pixel, taps] = 0.0
        first[pixel] = low * step
        count[pixel] = taps


@njit(**OPTIONS)
@no_type_check
def mix_rows(image, top, start, width, count, weights, row):
    """row = the weighted sum of `count` rows of bytes from `top`, `width` bytes from `start`."""
    tap = 0
    while tap < count:
        one = image[top + tap, start : start + width]
        weight = weights[tap]
        if tap + 1 < count:
            two = image[top + tap + 1, start : start + width]
            second = weights[tap + 1]
            if tap == 0:
                for x in range(width):
                    row[x] = weight * np.float32(one[x]) + second * np.float32(two[x])
            else:
                for x in range(width):
                    row[x] += weight * np.float32(one[x]) + second * np.float32(two[x])
        elif tap == 0:
            for x in range(width):
                row[x] = weight * np.float32(one[x])
        else:
            for x in range(width):
                row[x] += weight * np.float32(one[x])
        tap += 2


@njit(**ORDERED)
@no_type_check
def resample_row(row, size, first, count, weights, red, green, blue):
    """The weighted sums of the pixels of `row` (three channels side by side), into the three planes' rows.

    Two taps at a time: that is all of them when a crop is enlarged. An odd count is filled up with a weight of zero.
    """
    for x in range(size):
        source = first[x]
        one, two = weights[x, 0], weights[x, 1]
        r = one * row[source] + two * row[source + UINTP(3)]
        g = one * row[source + UINTP(1)] + two * row[source + UINTP(4)]
        b = one * row[source + UINTP(2)] + two * row[source + UINTP(5)]
        tap = 2
        while tap < count[x]:
            source += UINTP(6)
            one, two = weights[x, tap], weights[x, tap + 1]
            r += one * row[source] + two * row[source + UINTP(3)]
            g += one * row[source + UINTP(1)] + two * row[source + UINTP(4)]
            b += one * row[source + UINTP(2)] + two * row[source + UINTP(5)]
            tap += 2
        red[x], green[x], blue[x] = r, g, b


@njit(**OPTIONS)
@no_type_check
def resize_crop(image, parameters, size, row, red, green, blue):
    """Crop, resize and flip one image into three planes of float32 [size * size] in 0-1."""
    # The crop may begin and end inside a pixel: then the image is smaller than the one it was drawn for.
    down_from, right_from = np.float64(parameters[p.TOP]), np.float64(parameters[p.LEFT])
    crop_height, crop_width = np.float64(parameters[p.HEIGHT]), np.float64(parameters[p.WIDTH])
    top, left = int(down_from), int(right_from)
    height, width = int(math.ceil(down_from + crop_height)) - top, int(math.ceil(right_from + crop_width)) - left
    most = 2 * int(math.ceil(max(height, width, size) / size)) + 2
    first_row, rows = np.empty(size, UINTP), np.empty(size, np.int64)
    first_column, columns = np.empty(size, UINTP), np.empty(size, np.int64)
    down, right = np.empty((size, most), np.float32), np.empty((size, most), np.float32)
    flip = parameters[p.FLIP] > ZERO
    resize_taps(down_from - top, crop_height, height, size, False, 1, first_row, rows, down)
    resize_taps(right_from - left, crop_width, width, size, flip, 3, first_column, columns, right)
    down *= np.float32(1 / 255)
    row[3 * width : 3 * width + 3] = ZERO  # a weight of zero may fall here, and zero times rubbish could be NaN
    for y in range(size):
        mix_rows(image, top + first_row[y], 3 * left, 3 * width, rows[y], down[y], row)
        start, stop = y * size, (y + 1) * size
        resample_row(row, size, first_column, columns, right, red[start:stop], green[start:stop], blue[start:stop])
