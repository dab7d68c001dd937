"""Colours of three planes: jitter, grey, and at the end solarising and normalising."""

from __future__ import annotations

from typing import no_type_check

import numpy as np
from numba import njit

from caco.data import parameters as p
from caco.data.kernel.compilation import CHUNK, ONE, OPTIONS, UINTP, ZERO

RED, GREEN, BLUE = np.float32(0.299), np.float32(0.587), np.float32(0.114)


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
