"""Memory that compiled code (numba) works in. Python's types mean nothing to numba, hence the no_type_check."""

from __future__ import annotations

from typing import no_type_check

import numpy as np
from numba import njit

from caco.cpu_kernels.vectors import store, store_past_caches

inlined = njit(forceinline=True, error_model="numpy")

CACHE_LINE = 64
"""Bytes."""
LARGE = 12 * 2**20
"""Bytes from which on an array would not stay in the caches until it is read: it is written past them, which spares them to
fetch each line first, only to overwrite it."""


@inlined
@no_type_check
def aligned(count, like):
    """Return so many numbers that begin with a line of the cache, so that no vector lies in two."""
    line = CACHE_LINE // like.itemsize
    numbers = np.empty(count + line, like.dtype)
    start = -(numbers.ctypes.data // like.itemsize) % line
    return numbers[start : start + count]


@inlined
@no_type_check
def is_large(array):
    """Return whether an array is to be written past the caches; one that may be must begin with a line of them."""
    return array.size * array.itemsize >= LARGE


@inlined
@no_type_check
def write(array, at, vector, past_caches):
    """Put a vector where `load` finds it; other threads once this one has taken a lock, such as Python's after the call."""
    if past_caches:
        store_past_caches(array, at, vector)
    else:
        store(array, at, vector)
