"""The pixels of random views on CPUs: one compiled function (numba) that takes an image to its normalised view.

The same mathematics as `render`, which is its oracle, arranged so that inner loops run over contiguous float32 and
touch little memory: source rows are mixed to one row, that row is resampled into three planes, and colours, blur and
the final scaling work on planes. It holds no lock: call it from as many threads as there are cores.

All of it is in one file because numba keeps what it compiled until that file changes, not the files it calls into.
Python's types mean nothing to numba, hence no_type_check; arrays are float32, positions in images are whole numbers.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import no_type_check

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from caco.data import parameters as p

# Stages are inlined: a process that has just compiled them would else call their stand-alone forms, whose last bits differ
# from what it (and every later process) reads from the cache, and a resumed run would differ from the uninterrupted one.
# Sums may be reordered and multiply-adds fused, and no pixel is NaN (they come from bytes): what vector code needs.
FAST = {"contract", "reassoc", "nsz", "nnan"}
ORDERED = {"nogil": True, "cache": True, "fastmath": FAST - {"reassoc"}, "error_model": "numpy", "forceinline": True}
OPTIONS = {"nogil": True, "cache": True, "fastmath": FAST, "error_model": "numpy", "forceinline": True}

# Pixels whose colours are changed together: three planes of it stay in the first-level cache.
CHUNK = 1024
# The blur adds this many pairs of neighbours at a time: as many arrays as the compiler will check for overlap. To this
# number mix_neighbours is unrolled by hand.
PAIRS = 3

RED, GREEN, BLUE = np.float32(0.299), np.float32(0.587), np.float32(0.114)
ZERO, ONE = np.float32(0), np.float32(1)

UINTP = np.uintp


@njit(**OPTIONS)
@no_type_check
def blur_margin(sigma):
    """Rows added above and below a plane: the blur's radius, ceil(3 sigma), rounded up to whole groups of PAIRS."""
    return int(math.ceil(math.ceil(np.float32(3) * sigma) / PAIRS)) * PAIRS


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
def blend_constant(plane, factor, addend):
    """plane = factor * plane + addend, within 0-1: brightness, and contrast."""
    for x in range(len(plane)):
        plane[x] = min(max(factor * plane[x] + addend, ZERO), ONE)


@njit(**OPTIONS)
@no_type_check
def blend_gray(red, green, blue, factor):
    """Each channel = factor * itself + (1 - factor) * the grey image, within 0-1: saturation."""
    rest = ONE - factor
    for x in range(len(red)):
        gray = rest * (RED * red[x] + GREEN * green[x] + BLUE * blue[x])
        red[x] = min(max(factor * red[x] + gray, ZERO), ONE)
        green[x] = min(max(factor * green[x] + gray, ZERO), ONE)
        blue[x] = min(max(factor * blue[x] + gray, ZERO), ONE)


@njit(**OPTIONS)
@no_type_check
def shift_hue(red, green, blue, turns):
    """Turn the hue of HSV, in units of the chroma: see `render.shift_hue`."""
    sixths = np.float32(6) * turns
    for x in range(len(red)):
        r, g, b = red[x], green[x], blue[x]
        value = max(max(r, g), b)
        base = min(min(r, g), b)
        chroma = value - base
        turn = chroma * np.float32(6)
        sixth = r - g + np.float32(4) * chroma
        sixth = b - r + np.float32(2) * chroma if value == g else sixth
        sixth = g - b if value == r else sixth
        sixth += sixths * chroma
        sixth = sixth + turn if sixth < ZERO else sixth
        sixth = sixth - turn if sixth >= turn else sixth
        twice = chroma + chroma
        red[x] = base + min(max(abs(sixth - twice - chroma) - chroma, ZERO), chroma)
        green[x] = base + min(max(twice - abs(sixth - twice), ZERO), chroma)
        blue[x] = base + min(max(twice - abs(sixth - twice - twice), ZERO), chroma)


@njit(**OPTIONS)
@no_type_check
def to_gray(red, green, blue):
    """Put the grey image into all three channels."""
    for x in range(len(red)):
        gray = RED * red[x] + GREEN * green[x] + BLUE * blue[x]
        red[x] = gray
        green[x] = gray
        blue[x] = gray


@njit(**OPTIONS)
@no_type_check
def sum_gray(red, green, blue):
    """Return the sum of the grey image's pixels."""
    total = ZERO
    for x in range(len(red)):
        total += RED * red[x] + GREEN * green[x] + BLUE * blue[x]
    return total


@njit(**OPTIONS)
@no_type_check
def apply_jitter(red, green, blue, parameters, first, last, mean):
    """Apply the operations first to last - 1 of the sample's order; mean: of the grey image, for the contrast."""
    for stage in range(first, last):
        operation = int(parameters[p.ORDER + stage])
        if operation == p.BRIGHTNESS or operation == p.CONTRAST:
            is_contrast = operation == p.CONTRAST
            factor = parameters[p.CONTRAST_FACTOR] if is_contrast else parameters[p.BRIGHTNESS_FACTOR]
            addend = (ONE - factor) * mean if is_contrast else ZERO
            if factor != ONE:
                for plane in (red, green, blue):
                    blend_constant(plane, factor, addend)
        elif operation == p.SATURATION:
            if parameters[p.SATURATION_FACTOR] != ONE:
                blend_gray(red, green, blue, parameters[p.SATURATION_FACTOR])
        elif parameters[p.HUE_SHIFT] != ZERO:
            shift_hue(red, green, blue, parameters[p.HUE_SHIFT])


@njit(**OPTIONS)
@no_type_check
def change_colours(red, green, blue, parameters):
    """Colour jitter in the sample's order, then grey; three planes of float32 [pixels], changed in place.

    A chunk of pixels goes through all operations at once; only the contrast waits, for the mean of all pixels.
    """
    pixels = len(red)
    has_contrast, contrast_stage = False, 0
    for stage in range(4):
        if int(parameters[p.ORDER + stage]) == p.CONTRAST and parameters[p.CONTRAST_FACTOR] != ONE:
            has_contrast, contrast_stage = True, stage
    mean = ZERO
    # Round 0 applies what comes before the contrast and sums the grey image for its mean, round 1 the rest; without a
    # contrast round 1 does all. (One loop in the code: it is compiled once.)
    for round_number in range(0 if has_contrast else 1, 2):
        first, last = (0, contrast_stage) if round_number == 0 else (contrast_stage, 4)
        total = 0.0
        for start in range(0, pixels, CHUNK):
            stop = min(start + CHUNK, pixels)
            r, g, b = red[start:stop], green[start:stop], blue[start:stop]
            apply_jitter(r, g, b, parameters, first, last, mean)
            if round_number == 0:
                total += sum_gray(r, g, b)
            elif parameters[p.GRAY] > ZERO:
                to_gray(r, g, b)
        mean = np.float32(total / pixels)


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
def finish(red, green, blue, solarize, scale, offset, target):
    """Solarise and normalise a stretch of pixels, and write them to the view, the channels side by side."""
    s0, s1, s2, o0, o1, o2 = scale[0], scale[1], scale[2], offset[0], offset[1], offset[2]
    pixel = UINTP(0)
    if solarize:
        for x in range(len(red)):
            target[pixel] = s0 * min(red[x], ONE - red[x]) + o0
            target[pixel + UINTP(1)] = s1 * min(green[x], ONE - green[x]) + o1
            target[pixel + UINTP(2)] = s2 * min(blue[x], ONE - blue[x]) + o2
            pixel += UINTP(3)
    else:
        for x in range(len(red)):
            target[pixel] = s0 * red[x] + o0
            target[pixel + UINTP(1)] = s1 * green[x] + o1
            target[pixel + UINTP(2)] = s2 * blue[x] + o2
            pixel += UINTP(3)


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


@njit(
    types.void(
        types.Array(types.uint8, 3, "C", readonly=True),
        types.float32[:, ::1],
        types.float32[::1],
        types.float32[::1],
        types.float32[::1],
        types.float32[:, :, ::1],
    ),
    **OPTIONS,
)
@no_type_check
def render_rows(images, table, scale, offset, scratch, views):
    """Render one view of each image: bytes [B, H, 3 W] and parameters [B, COLUMNS] to float32 [B, S, 3 S]."""
    size = views.shape[1]
    pixels = size * size
    for sample in range(len(images)):
        parameters, view = table[sample], views[sample]
        sigma = parameters[p.SIGMA]
        margin = blur_margin(sigma)
        plane_size = (size + 2 * margin) * size
        planes = scratch[: 3 * plane_size].reshape(3, plane_size)
        rest = scratch[3 * plane_size :]
        # One slice a plane: a slice of all three would not be contiguous, and no loop over it a vector loop.
        start, stop = margin * size, margin * size + pixels
        red, green, blue = planes[0, start:stop], planes[1, start:stop], planes[2, start:stop]
        resize_crop(images[sample], parameters, size, rest, red, green, blue)
        change_colours(red, green, blue, parameters)
        solarize = parameters[p.SOLARIZE] > ZERO
        if sigma > ZERO:
            weights = np.empty(margin + PAIRS, np.float32)
            radius = gaussian(sigma, weights)
            block = max(1, CHUNK // size) * (size + 2 * margin)
            lines = rest[: 5 * block].reshape(5, block)
            blur_and_finish(planes, size, margin, weights, radius, solarize, scale, offset, lines, view)
        else:
            finish(red, green, blue, solarize, scale, offset, view.reshape(3 * pixels))


_scratch = threading.local()


def fill_views(
    images: NDArray[np.uint8],
    table: NDArray[np.float32],
    mean: Sequence[float],
    std: Sequence[float],
    views: NDArray[np.float32],
) -> None:
    """Render one view of each image into `views`, on the calling thread, without the GIL.

    images: uint8 [B, H, W, 3], contiguous. table: ViewParameters.table(). views: float32 [B, S, S, 3], contiguous.
    """
    batch, height, width, _ = images.shape
    size = views.shape[1]
    margin = blur_margin(table[:, p.SIGMA].max())
    wide = size + 2 * margin
    # The planes, and behind them what only one stage at a time needs: one row of the source; the blur's lines.
    needed = 3 * wide * size + max(3 * width + 3, 5 * max(1, CHUNK // size) * wide)
    scratch = getattr(_scratch, "buffer", None)
    if scratch is None or len(scratch) < needed:
        scratch = _scratch.buffer = np.empty(needed, dtype=np.float32)
    deviation = np.asarray(std, dtype=np.float32)
    scale, offset = 1 / deviation, -np.asarray(mean, dtype=np.float32) / deviation
    render_rows(
        images.reshape(batch, height, 3 * width), table, scale, offset, scratch, views.reshape(batch, size, 3 * size)
    )
