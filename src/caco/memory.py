"""Memory: how much is free, and plain words for when there is not enough."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from caco.errors import CacoError

ADVICE = (
    "Lower what is large (--batch-size, --bank-size, --views.size, --encoder.projector); pre-training also needs less with "
    "--precision bf16, --engine.checkpointing or --accumulate"
)


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free both in main memory and on the device."""
    return min(_free_main_memory(), free_on(device))


def free_on(device: torch.device) -> int:
    """Return the bytes that are free on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_main_memory()


def _free_main_memory() -> int:
    """Return the bytes of main memory that are free or easily freed to this process (Linux), else half of all there is."""
    try:
        fields = _fields(Path("/proc/meminfo"))
        free = int(fields["MemAvailable:"]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return min([free, *free_in_groups()])


def free_in_groups(processes: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Yield the bytes that are left to this process by each limit it is under: of a container, a job, a user (cgroups)."""
    try:
        groups = [line.split(":", 2) for line in processes.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in groups:
        if controllers == "":
            top, names, total = root, ("memory.max", "memory.current"), ""
        elif "memory" in controllers.split(","):
            top, names, total = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"
        else:
            continue
        # In a container the path may be the host's, and its own group be at the top.
        inner = top / path.strip("/")
        for folder in (inner, *inner.parents[: len(inner.relative_to(top).parts)]):
            try:
                limit, used = ((folder / name).read_text().strip() for name in names)
                if limit != "max":
                    fields = _fields(folder / "memory.stat")
                    cached = sum(int(fields.get(total + kind, 0)) for kind in ("inactive_file", "active_file"))
                    yield max(int(limit) - int(used) + cached, 0)
            except (OSError, ValueError):  # the top of all has no limit
                continue


def _fields(path: Path) -> dict[str, str]:
    """Return the first word of each line of a file, and the second."""
    return dict(line.split()[:2] for line in path.read_text(encoding="ascii").splitlines())


def in_words(size: int) -> str:
    """Return a number of bytes for people."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


@contextmanager
def out_of_memory_is_told() -> Iterator[None]:
    """Raise CacoError, with what to do, in place of what torch, numpy and Python raise when memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise CacoError(f"out of memory{_attempt(str(error))}. {ADVICE}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Return whether torch, numpy or Python says so that memory has run out."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(error) for words in ("can't allocate memory", "DefaultCPUAllocator")
    )


def _attempt(message: str) -> str:
    """Return which allocation failed, as far as the message tells: torch's of a CPU, or of a GPU, or numpy's."""
    if found := re.search(r"tried to allocate (\d+) bytes", message):
        return f" ({in_words(int(found[1]))} more were wanted)"
    found = re.search(r"(?:Tried|Unable) to allocate ([\d.]+ \w+)", message)
    return f" ({found[1]} more were wanted)" if found else ""
