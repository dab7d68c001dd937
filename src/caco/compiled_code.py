"""What numba compiles: whether it can be had here, and where its code is kept for later processes."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SOURCES = ("cpu_kernels/*.py", "winograd/*.py", "data/kernel/*.py", "data/parameters.py", "data/jpeg_header.py")
"""All files whose code and constants are compiled."""
OLD = 30 * 24 * 3600.0
"""Seconds."""

_ONE_AT_A_TIME = threading.RLock()


@lru_cache
def has_numba() -> bool:
    """Return whether numba can be used here. Where it is installed and cannot, say why: without it all is slower."""
    if not find_spec("numba"):
        return False
    try:
        numba = importlib.import_module("numba")
    except Exception as error:  # it says itself what it cannot stand, mostly a version of numpy
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        logging.getLogger(__name__).warning("numba is not used, which is slower: %s", reason)
        return False
    return not numba.config.DISABLE_JIT


def kept(signature: Any = None, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator: numba compiles the function, without Python's lock, and later processes find it compiled.

    signature: of what it is called with, where it is to be compiled at once; else it is as it is called. By itself numba looks
    at a function's own file only, and goes on loading what it made of others that have changed since. So its code lies in
    a folder that is named by all the SOURCES.
    """
    import numba

    of_types = () if signature is None else (signature,)

    def decorate(function: Callable[..., Any]) -> Any:
        with _in_place(numba.config):
            return numba.njit(*of_types, **{"cache": True, "nogil": True, "error_model": "numpy", **options})(function)

    return decorate


@contextlib.contextmanager
def _in_place(config: Any) -> Iterator[None]:
    """Let numba, of which this is the configuration, keep in our place what is decorated meanwhile, and later nothing else."""
    with _ONE_AT_A_TIME:
        others = config.CACHE_DIR
        config.CACHE_DIR = _place(others)
        try:
            yield
        finally:
            config.CACHE_DIR = others


@lru_cache
def _place(asked: str) -> str:
    """Return the folder of what is compiled of these sources: in the one asked for (NUMBA_CACHE_DIR), the package, or home.

    In a container, all may be read-only: then it is a temporary folder, also for the processes that this one will start.
    """
    name = f"caco-{hash_of_sources(Path(__file__).parent)}"
    home = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "caco", "compiled")
    folders = [Path(asked)] if asked else [Path(__file__).parent / "__pycache__", home]
    for folder in (folder for folder in folders if folder.parts[0] != "~"):  # of a user without a home
        with contextlib.suppress(OSError):
            (folder / name).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder / name):
                _remove_old(folder)
                return str(folder / name)
    # Of an unguessable name: code that another user has put there would be run.
    temporary = tempfile.mkdtemp(prefix="caco-compiled-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    os.environ["NUMBA_CACHE_DIR"] = temporary
    return os.path.join(temporary, name)


def _remove_old(folder: Path) -> None:
    """Remove what was compiled of other sources, and has not grown for weeks."""
    for path in folder.glob("caco-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > OLD:
                shutil.rmtree(path, ignore_errors=True)


def hash_of_sources(package: Path) -> str:
    """Return a hash of all SOURCES in a folder of the package."""
    paths = sorted(path for pattern in SOURCES for path in package.glob(pattern))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()[:16]
