"""Work in threads of our own, each of which runs compiled code without Python's lock."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def parts_of(count: int, most: int) -> list[tuple[int, int]]:
    """Return the first and last of each part of so many: one for each of torch's threads, or `most`, at least one."""
    parts = max(min(torch.get_num_threads(), count, most), 1)
    bounds = [count * part // parts for part in range(parts + 1)]
    return list(zip(bounds, bounds[1:], strict=False))


def in_threads(work: Callable[[int, int], None], parts: list[tuple[int, int]]) -> None:
    """Do each part of the work in a thread of its own."""
    if len(parts) == 1:
        work(*parts[0])
    else:
        list(_thread_pool(len(parts)).map(work, *zip(*parts, strict=True)))


_POOLS: dict[int, ThreadPoolExecutor] = {}
_POOLS_LOCK = threading.Lock()


def _thread_pool(threads: int) -> ThreadPoolExecutor:
    """Return so many threads."""
    with _POOLS_LOCK:
        if threads not in _POOLS:
            _POOLS[threads] = ThreadPoolExecutor(threads, thread_name_prefix="caco")
        return _POOLS[threads]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_POOLS.clear)  # a child has no threads but its first
