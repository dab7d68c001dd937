"""What numba has compiled: where it is kept (package, home, or a folder for as long as it runs), and when it is deleted."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import tempfile
from pathlib import Path

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


def remove_stale_code() -> None:
    """Delete what numba compiled of sources that have changed: it looks at a function's own file only, not at what that uses."""
    folders = [Path(__file__).parent / name for name in ("cpu_kernels", "winograd")]
    changed = max(path.stat().st_mtime for folder in folders for path in folder.glob("*.py"))
    with contextlib.suppress(OSError):  # read-only: nothing has been compiled there
        for path in (path for folder in folders for path in (folder / "__pycache__").glob("*.nb?")):
            if path.stat().st_mtime < changed:
                path.unlink(missing_ok=True)


def _anything() -> int:
    return 0
