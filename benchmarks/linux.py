"""What Linux tells in /proc: the memory of a process and its children, how busy the cores were, the processor.

Elsewhere nothing is told: amounts are None or 0, texts empty. Not a benchmark itself.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

SAMPLING_SECONDS = 0.05
CHILDREN_SECONDS = 1.0
"""The kernel walks all pages of a child to tell its part of shared ones: not often, or it would disturb."""


class FamilyMemory:
    """Watches the resident memory of a process and its descendants from a thread."""

    def __init__(self, process: int) -> None:
        self.process = process
        self.main: int | None = None
        self.family: int | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        children, last = 0, 0.0
        while not self._done.wait(SAMPLING_SECONDS):
            if time.monotonic() - last > CHILDREN_SECONDS:
                children, last = sum(map(_share, _descendants(self.process)[1:])), time.monotonic()
            memory = _bytes(self.process, "status", "VmRSS")
            if memory:
                self.main = max(self.main or 0, memory)
                self.family = max(self.family or 0, memory + children)


def _descendants(process: int) -> list[int]:
    """Return a process and all below it."""
    children: dict[str, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        children.setdefault(_fields(folder / "status").get("PPid", ""), []).append(int(folder.name))
    found = [process]
    for parent in found:
        found += children.get(str(parent), [])
    return found


def _share(process: int) -> int:
    """Return the memory of a process, shared pages divided among those that share them."""
    return _bytes(process, "smaps_rollup", "Pss") or _bytes(process, "status", "VmRSS")


def _bytes(process: int, file: str, name: str) -> int:
    """Return an amount that /proc gives in kB; 0 where it does not."""
    words = _fields(Path(f"/proc/{process}/{file}")).get(name, "").split()
    return int(words[0]) * 1024 if words else 0


def _fields(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text().splitlines()
    except OSError:  # ended, or not Linux
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def busy_seconds() -> float | None:
    """Return the seconds that all cores together have worked since the start of the machine."""
    try:
        user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def processor() -> dict[str, str]:
    """Return what Linux says of the last processor."""
    return _fields(Path("/proc/cpuinfo"))
