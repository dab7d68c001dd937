"""Strips of maps, compiled (numba): the pixels that a row of tiles needs, and what is done to them on the way.

Maps are [B, H, W, C]. A strip is as high as a tile, flat; beyond the border it is zero. Reading, the maps can be
normalised and rectified, or have a multiple of other maps added; writing, sums can be taken. So what lies between two
convolutions costs no pass through memory of its own. Python's types mean nothing to numba, hence the no_type_check.
"""

from __future__ import annotations

from typing import no_type_check

from caco.cpu_kernels.memory import aligned, inlined, is_large, write
from caco.cpu_kernels.processor import BYTES
from caco.cpu_kernels.vectors import computed_bytes, load, store, where_positive, zeros

PIXELS, STEP, MARGIN = (6, 4, 0, 9, 4, 0, 4), (4, 4, 0, 8, 4, 0, 4), (1, 0, 0, 1, 0, 0, 0)
"""Of maps of each kind (`transforms.py`): pixels along a side of a tile, from a tile to the next, before the first pixel."""


@inlined
@no_type_check
def cut_out(kind, maps, factors, others, row, strip):
    """Fill a strip with a row of tiles; the rows of all images are counted through.

    factors: none, or of each channel two, [2, C]. Without others, what is read is factors[0] · maps + factors[1], rectified;
    with others [B, H, W, C], it is maps + factors[0] · others + factors[1].
    """
    channels, lanes = maps.shape[3], BYTES // computed_bytes(maps)
    row_size, left, right = inside(kind, maps)
    source, flat_factors, flat_others = maps.reshape(-1), factors.reshape(-1), others.reshape(-1)
    for i in range(PIXELS[kind]):
        start, to = first_of_pixels(kind, maps, row, i), i * row_size
        if start < 0:
            clear(strip, to, to + row_size)
            continue
        clear(strip, to, to + left)
        clear(strip, to + right, to + row_size)
        to += left
        if len(factors) == 0:
            for number in range(0, right - left, lanes):
                store(strip, to + number, load(source, start + number))
            continue
        for pixel in range(0, right - left, channels):
            for channel in range(0, channels, lanes):
                at = start + pixel + channel
                factor, constant = load(flat_factors, channel), load(flat_factors, channels + channel)
                if len(others):
                    value = load(source, at) + factor * load(flat_others, at) + constant
                else:
                    value = factor * load(source, at) + constant
                    value = where_positive(value, value)
                store(strip, to + pixel + channel, value)


@inlined
@no_type_check
def put_back(kind, strip, maps, added, factors, others, sums, row):
    """Put the rows of a strip that are done, as the next one does not overlap them, into the maps.

    added: none, or other maps [B, H, W, C], which are added to what is put where there are no sums. sums: none, or flat
    [3, C], of which the third is a shift: a number near what is summed, whose squares would else be large beside their
    variance. Without others, the sums grow by what is put, less the shift, and by the squares of that. With others, what is put
    is the gradient of `cut_out`'s rectified factors[0] · others + factors[1] for them, and the sums grow by that for the
    factors, with others less the shift. Returns how many pixels are put.
    """
    channels, lanes, rows = maps.shape[3], BYTES // computed_bytes(maps), grid(kind, maps)[0]
    row_size, left, right = inside(kind, maps)
    target, flat_factors, flat_others = maps.reshape(-1), factors.reshape(-1), others.reshape(-1)
    flat_added = added.reshape(-1)
    count, past = 0, is_large(maps)
    for i in range(STEP[kind] if (row + 1) % rows else PIXELS[kind]):
        start, at = first_of_pixels(kind, maps, row, i), i * row_size + left
        if start < 0:
            continue
        count += (right - left) // channels
        if len(sums) == 0:
            for number in range(0, right - left, lanes):
                value = load(strip, at + number)
                if len(added):
                    value = value + load(flat_added, start + number)
                write(target, start + number, value, past)
            continue
        for pixel in range(0, right - left, channels):
            for channel in range(0, channels, lanes):
                to, more = start + pixel + channel, channels + channel
                value, shift = load(strip, at + pixel + channel), load(sums, channels + more)
                if len(others):
                    factor, other = load(flat_factors, channel), load(flat_others, to)
                    value = where_positive(factor * other + load(flat_factors, more), value)
                    store(sums, channel, load(sums, channel) + value * (other - shift))
                    store(sums, more, load(sums, more) + value)
                    write(target, to, factor * value, past)
                else:
                    write(target, to, value, past)
                    value = value - shift
                    store(sums, channel, load(sums, channel) + value)
                    store(sums, more, load(sums, more) + value * value)
    return count


@inlined
@no_type_check
def begin_sums(kind, strip, maps, others, row, sums):
    """Let sums be 0, and the shift what is in the first of the pixels: of those to be put, or of the others."""
    channels, lanes = maps.shape[3], BYTES // computed_bytes(maps)
    row_size, left, _ = inside(kind, maps)
    image, at = row // grid(kind, maps)[0], MARGIN[kind] * row_size + left
    clear(sums, 0, 2 * channels)
    for channel in range(0, channels, lanes):
        from_others = len(others) > 0
        first = load(others.reshape(-1), image * maps[0].size + channel) if from_others else load(strip, at + channel)
        store(sums, 2 * channels + channel, first)


@inlined
@no_type_check
def end_sums(sums, count, of_others, totals):
    """Add sums over so many pixels to totals [2, C], float64, as if there had been no shift."""
    channels = totals.shape[1]
    for channel in range(channels):
        one, two, shift = float(sums[channel]), float(sums[channels + channel]), float(sums[2 * channels + channel])
        totals[0, channel] += one + shift * (two if of_others else count)
        totals[1, channel] += two if of_others else two + shift * (2 * one + shift * count)


@inlined
@no_type_check
def begin(kind, maps, row, strip):
    """Make a strip ready for sums: what the one before has not put, since they overlap, and zeros."""
    row_size = inside(kind, maps)[0]
    kept = PIXELS[kind] - STEP[kind] if row % grid(kind, maps)[0] else 0
    shift = STEP[kind] * row_size
    for number in range(0, kept * row_size, BYTES // strip.itemsize):
        store(strip, number, load(strip, number + shift))
    clear(strip, kept * row_size, PIXELS[kind] * row_size)


@inlined
@no_type_check
def clear(strip, start, end):
    """Let a strip's numbers be 0, whole vectors of them."""
    for number in range(start, end, BYTES // strip.itemsize):
        store(strip, number, zeros(strip))


@inlined
@no_type_check
def first_of_pixels(kind, maps, row, i):
    """Return where in the flat maps the pixels of a strip's row `i` start, -1 if it is beyond the border."""
    height, width, channels = maps.shape[1:]
    rows = grid(kind, maps)[0]
    y = row % rows * STEP[kind] - MARGIN[kind] + i
    return (row // rows * height + y) * width * channels if 0 <= y < height else -1


@inlined
@no_type_check
def inside(kind, maps):
    """Return the numbers in a row of a strip, and which of them are not beyond the border: the first, and where they end."""
    width, channels = maps.shape[2:]
    wide = (grid(kind, maps)[1] - 1) * STEP[kind] + PIXELS[kind]
    return wide * channels, MARGIN[kind] * channels, min(MARGIN[kind] + width, wide) * channels


@inlined
@no_type_check
def grid(kind, maps):
    """Return the rows and columns of tiles of an image."""
    step = STEP[kind]
    return (maps.shape[1] + step - 1) // step, (maps.shape[2] + step - 1) // step


@inlined
@no_type_check
def strip_of(kind, maps, like):
    """Return room for a strip of such maps, of numbers as another array has."""
    return aligned(PIXELS[kind] * inside(kind, maps)[0], like)
