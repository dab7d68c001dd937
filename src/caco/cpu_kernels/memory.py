"""Memory that compiled code (numba) works in. Python's types mean nothing to numba, hence the no_type_check."""

from __future__ import annotations

from typing import no_type_check

import numpy as np
from numba import njit

inlined = njit(forceinline=True, error_model="numpy")

CACHE_LINE = 64
"""Bytes."""


@inlined
@no_type_check
def aligned(count, like):
    """Return so many numbers that begin with a line of the cache, so that no vector lies in two."""
    line = CACHE_LINE // like.itemsize
    numbers = np.empty(count + line, like.dtype)
    start = -(numbers.ctypes.data // like.itemsize) % line
    return numbers[start : start + count]
