"""How the stages of the kernel are compiled, and the constants that several of them use.

Python's types mean nothing to numba, hence the no_type_check of every stage; arrays are float32, positions in images
are whole numbers.
"""

from __future__ import annotations

import numpy as np

# Sums may be reordered and multiply-adds fused, and no pixel is NaN (they come from bytes): what vector code needs.
FAST = {"contract", "reassoc", "nsz", "nnan"}
# Stages are inlined: a process that has just compiled them would else call their stand-alone forms, whose last bits differ
# from what every later process reads from the cache, and a resumed run would differ from the uninterrupted one.
OPTIONS = {"nogil": True, "fastmath": FAST, "error_model": "numpy", "forceinline": True}
ORDERED = {**OPTIONS, "fastmath": FAST - {"reassoc"}}

# Pixels that go through a stage together: three planes of them stay in the first-level cache.
CHUNK = 1024

ZERO, ONE = np.float32(0), np.float32(1)
UINTP = np.uintp
