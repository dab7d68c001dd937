"""A sign of life of each process, so that the others never wait for a dead one for ever, and can say which it was."""

from __future__ import annotations

import os
import sys
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING, ClassVar

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

if TYPE_CHECKING:
    from caco.distributed.world import Place

BEAT = 1.0
"""Seconds between two signs of life."""

LOST_AFTER = 20.0
"""Seconds without one after which a process counts as lost."""

EXIT_STATUS = 76
"""Of a process that has lost another (EX_PROTOCOL)."""


class Heartbeat(threading.Thread):
    """Writes this process's sign of life to the common store, and watches those of all others.

    When another process falls silent, this one says which, and exits at once: it may be waiting inside a collective,
    where no exception can reach it. Checkpoints are whole whenever that happens.
    """

    _running: ClassVar[list[Heartbeat]] = []

    def __init__(self, place: Place, timeout: float) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.place = place
        self.lost_after = min(LOST_AFTER, timeout)
        self._stopped = threading.Event()
        # A connection of its own: the process group's may be blocked in a collective.
        self._store = PrefixStore(
            f"heartbeat {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}",
            TCPStore(place.address, place.port, is_master=False, timeout=timedelta(seconds=self.lost_after)),
        )
        self._running.append(self)

    @classmethod
    def stop_all(cls) -> None:
        """Say goodbye and stop: from now on nobody misses this process."""
        while cls._running:
            cls._running.pop()._stop_beating()

    def run(self) -> None:
        """Beat and watch until stopped."""
        beats, seen = 0, {rank: (b"", time.monotonic()) for rank in range(self.place.size)}
        while not self._stopped.wait(BEAT):
            beats += 1
            try:
                self._store.set(str(self.place.rank), str(beats))
                for rank in range(self.place.size):
                    beat = self._store.get(str(rank)) if self._store.check([str(rank)]) else b""
                    if beat == b"goodbye" or beat != seen[rank][0]:
                        seen[rank] = (beat, time.monotonic())
            except (dist.DistError, RuntimeError):
                if not self._stopped.is_set():
                    self._give_up(0, "which holds the meeting point, cannot be reached")
                return
            for rank, (_, when) in seen.items():
                if time.monotonic() - when > self.lost_after:
                    self._give_up(rank, f"has given no sign of life for {self.lost_after:.0f} s")

    def lost_rank(self) -> int | None:
        """Return a process that has fallen silent, waiting long enough to be sure; None when all are alive."""
        before = self._beats()
        time.sleep(4 * BEAT)
        after = self._beats()
        silent = [rank for rank in before if before[rank] == after[rank] and after[rank] != b"goodbye"]
        return silent[0] if silent else None

    def _beats(self) -> dict[int, bytes]:
        ranks = (rank for rank in range(self.place.size) if rank != self.place.rank)
        return {rank: self._store.get(str(rank)) if self._store.check([str(rank)]) else b"" for rank in ranks}

    def _stop_beating(self) -> None:
        """Say goodbye; the main process, which may hold the store, waits until the others have said it, too."""
        self._stopped.set()
        try:
            self._store.set(str(self.place.rank), "goodbye")
            deadline = time.monotonic() + self.lost_after
            while self.place.rank == 0 and time.monotonic() < deadline:
                if all(beat == b"goodbye" for beat in self._beats().values()):
                    return
                time.sleep(0.05)
        except (dist.DistError, RuntimeError):
            pass  # the process that holds the store is gone; nobody is left to tell

    def _give_up(self, rank: int, why: str) -> None:
        if self._stopped.is_set():
            return
        print(
            f"caco: process {self.place.rank} of {self.place.size} stops: process {rank} {why}. "
            "Start again with --resume to go on from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_STATUS)


def name_lost_process() -> str:
    """Return which process was lost, in words, after a collective has failed."""
    for heartbeat in Heartbeat._running:
        try:
            rank = heartbeat.lost_rank()
        except (dist.DistError, RuntimeError):
            rank = 0  # it holds the store
        return f"process {rank} was lost" if rank is not None else "another process failed"
    return "another process failed"
