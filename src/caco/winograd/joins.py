"""The end of a residual block, compiled (numba): normalise, add the shortcut, rectify, and the gradients of that.

Python's types mean nothing to numba, hence the no_type_check.
"""

from __future__ import annotations

from typing import no_type_check

from numba import njit

from caco.cpu_kernels.memory import aligned
from caco.cpu_kernels.vectors import BYTES, load, store, where_positive


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def join(maps, factors, shortcut, results, first, last):
    """Fill the results of images `first` to `last`: factors[0] · maps + factors[1] + shortcut, rectified.

    maps, shortcut, results: [B, H, W, C]. factors: [2, C].
    """
    channels, lanes = maps.shape[3], BYTES // maps.itemsize
    image, source, other, target = maps[0].size, maps.reshape(-1), shortcut.reshape(-1), results.reshape(-1)
    flat_factors = factors.reshape(-1)
    for pixel in range(first * image, last * image, channels):
        for channel in range(0, channels, lanes):
            at = pixel + channel
            value = (
                load(source, at) * load(flat_factors, channel)
                + load(flat_factors, channels + channel)
                + load(other, at)
            )
            store(target, at, where_positive(value, value))


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def part(maps, factors, results, pulls, maps_gradient, shortcut_gradient, sums, first, last):
    """Fill the gradients of `join` for maps and shortcut, and add that for the factors to sums [2, C]; pulls: the results'."""
    channels, lanes = maps.shape[3], BYTES // maps.itemsize
    image, source, result, pull = maps[0].size, maps.reshape(-1), results.reshape(-1), pulls.reshape(-1)
    to_maps, to_shortcut, flat_factors = maps_gradient.reshape(-1), shortcut_gradient.reshape(-1), factors.reshape(-1)
    flat_sums, sums_now = sums.reshape(-1), aligned(2 * channels, maps)
    for number in range(first, last):
        sums_now[:] = 0
        for pixel in range(number * image, (number + 1) * image, channels):
            for channel in range(0, channels, lanes):
                at, more = pixel + channel, channels + channel
                value = where_positive(load(result, at), load(pull, at))
                store(sums_now, channel, load(sums_now, channel) + value * load(source, at))
                store(sums_now, more, load(sums_now, more) + value)
                store(to_maps, at, value * load(flat_factors, channel))
                store(to_shortcut, at, value)
        for channel in range(2 * channels):
            flat_sums[channel] += sums_now[channel]
