"""Where numba keeps what it has compiled: in the package or the user's home, else in a folder of its own for as long as it runs."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

import numba


def find_place() -> None:
    """Let numba, and the processes that this one will start, keep what it compiles in a temporary folder if all else fails.

    In a container, package and home may both be read-only; numba then refuses to compile what is to be kept.
    """
    try:
        numba.njit(cache=True)(_anything)
    except RuntimeError:
        # Of an unguessable name: code that another user has put there would be run.
        folder = tempfile.mkdtemp(prefix="caco-compiled-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["NUMBA_CACHE_DIR"] = folder
        setattr(numba.config, "CACHE_DIR", folder)  # noqa: B010 (which its types do not know)


def _anything() -> int:
    return 0
