"""Memory that a CPU run has freed is kept for its next tensors instead of going back to the system.

glibc gives large blocks back at once, and the system clears every page anew at the next step: a fifth of a step of
ResNet-18. The price is gaps that the next tensors do not fit into. Most of them are there because glibc keeps small blocks
apart which lie between large ones; it can be told not to, but only before a program begins (docs/what-paid.md).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Sequence

# Names of malloc.h. A threshold of -1 is the largest there is.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
NO_SMALL_BLOCKS_APART = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
"""Environment of a program whose heap has few gaps."""


def begin_anew_with_few_gaps(arguments: Sequence[str]) -> None:
    """Let a command that trains on a CPU begin anew in this environment, as the same process; else return.

    It returns where torch is loaded, so that some program has begun which is not ours alone, or where there is a GPU.
    """
    trains = arguments[:1] in (["pretrain"], ["demo"]) and not {"-h", "--help"} & set(arguments)
    is_new = "torch" not in sys.modules and not set(NO_SMALL_BLOCKS_APART) & set(os.environ)
    if trains and is_new and sys.platform == "linux" and not os.path.exists("/dev/nvidiactl"):
        with contextlib.suppress(OSError):  # it goes on as it is
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **NO_SMALL_BLOCKS_APART})


def keep_heap() -> bool:
    """Tell the allocator of this process to keep what is freed; return whether it has understood (glibc does)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
