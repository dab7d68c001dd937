"""The end of a residual block, compiled (numba): normalise, add the shortcut, rectify, and the gradients of that.

Python's types mean nothing to numba, hence the no_type_check.
"""

from __future__ import annotations

from typing import no_type_check

from caco.compiled_code import kept
from caco.cpu_kernels.memory import aligned, is_large, write
from caco.cpu_kernels.processor import BYTES
from caco.cpu_kernels.vectors import computed_bytes, load, store, where_positive
from caco.winograd.strips import clear


@kept()
@no_type_check
def join(maps, factors, shortcut, shortcut_factors, results, first, last):
    """Fill the results of images `first` to `last`: factors[0] · maps + factors[1] + shortcut, rectified.

    maps, shortcut, results: [B, H, W, C]. factors: [2, C]; shortcut_factors: none, or two with which it is read, too.
    """
    channels, lanes = maps.shape[3], BYTES // computed_bytes(maps)
    image, source, other, target = maps[0].size, maps.reshape(-1), shortcut.reshape(-1), results.reshape(-1)
    flat_factors, flat_others = factors.reshape(-1), shortcut_factors.reshape(-1)
    past = is_large(maps)
    for pixel in range(first * image, last * image, channels):
        for channel in range(0, channels, lanes):
            at, more = pixel + channel, channels + channel
            value = load(source, at) * load(flat_factors, channel) + load(flat_factors, more)
            if len(flat_others):
                value = value + load(other, at) * load(flat_others, channel) + load(flat_others, more)
            else:
                value = value + load(other, at)
            write(target, at, where_positive(value, value), past)


@kept()
@no_type_check
def part(
    maps, factors, shortcut, shortcut_factors, results, pulls, maps_gradient, shortcut_gradient, sums, first, last
):
    """Fill the gradients of `join` for maps and shortcut; add to sums [3, C] those for the factors and the shortcut's first.

    pulls: the results' gradient. The shortcut's second factor has the gradient of the first ones' second.
    """
    channels, lanes = maps.shape[3], BYTES // computed_bytes(maps)
    image, source, result, pull = maps[0].size, maps.reshape(-1), results.reshape(-1), pulls.reshape(-1)
    to_maps, to_shortcut, other = maps_gradient.reshape(-1), shortcut_gradient.reshape(-1), shortcut.reshape(-1)
    flat_factors, flat_others, flat_sums = factors.reshape(-1), shortcut_factors.reshape(-1), sums.reshape(-1)
    sums_now, shifts, past = aligned(3 * channels, factors), aligned(2 * channels, factors), is_large(maps)
    for number in range(first, last):
        clear(sums_now, 0, 3 * channels)
        shift, other_shift = (
            number * image,
            number * image if len(flat_others) else 0,
        )  # an image's first pixel, as in `put_back`
        for channel in range(0, channels, lanes):
            store(shifts, channel, load(source, shift + channel))
            if len(flat_others):
                store(shifts, channels + channel, load(other, other_shift + channel))
        for pixel in range(number * image, (number + 1) * image, channels):
            for channel in range(0, channels, lanes):
                at, more, most = pixel + channel, channels + channel, 2 * channels + channel
                value = where_positive(load(result, at), load(pull, at))
                distance = load(source, at) - load(shifts, channel)
                store(sums_now, channel, load(sums_now, channel) + value * distance)
                store(sums_now, more, load(sums_now, more) + value)
                write(to_maps, at, value * load(flat_factors, channel), past)
                if len(flat_others):
                    distance = load(other, at) - load(shifts, more)
                    store(sums_now, most, load(sums_now, most) + value * distance)
                    value = value * load(flat_others, channel)
                write(to_shortcut, at, value, past)
        for channel in range(channels):
            total = float(sums_now[channels + channel])
            flat_sums[channel] += sums_now[channel] + shifts[channel] * total
            flat_sums[channels + channel] += total
            if len(flat_others):
                flat_sums[2 * channels + channel] += (
                    sums_now[2 * channels + channel] + shifts[channels + channel] * total
                )
