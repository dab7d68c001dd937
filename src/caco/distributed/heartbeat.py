"""A sign of life of each process, so that the others never wait for a dead one for ever, and can say which it was."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from caco.distributed.membership import Membership
from caco.errors import LostProcess

BEAT = 1.0
"""Seconds between two signs of life."""

LOST_AFTER = 20.0
"""Seconds without one after which a process counts as lost."""

EXIT_STATUS = 76
"""Of a process that has lost another (EX_PROTOCOL)."""

HINT = " Start again with --resume to go on from the last checkpoint."
"""What to do when a process of a run that can resume was lost."""


def say(lost: LostProcess) -> None:
    """Tell at the terminal why this process is about to end."""
    print(f"caco: {lost}", file=sys.stderr, flush=True)


class Heartbeat:
    """Writes this process's sign of life to the common store, and watches those of all others.

    When another process falls silent, this one says which, and exits at once: it may be waiting inside a collective,
    where no exception can reach it. Checkpoints are whole whenever that happens.

    Silence counts only while this process itself runs on time: where it gets no time to run, others may get none either.
    Where something else on the same machine sees every process end (`Membership.supervised`), silence means no more than a
    busy machine, and ends nothing.

    One thread talks to the store. A second one only looks at the clock, since the first may itself wait for ever: a cable
    that is pulled out gives no error.
    """

    def __init__(
        self, membership: Membership, timeout: float, on_lost: Callable[[LostProcess], object] = say, hint: str = ""
    ) -> None:
        """membership: with the address and port of the store, which process 0 holds.

        on_lost: called with the reason before this process exits. hint: what to do, said after the reason.
        """
        self._on_lost, self._hint = on_lost, hint
        self.membership = membership
        self.lost_after = float("inf") if membership.supervised else min(LOST_AFTER, timeout)
        patience = timeout if membership.supervised else self.lost_after
        self._stopped = threading.Event()
        # A connection of its own: the process group's may be blocked in a collective.
        store = TCPStore(membership.address, membership.port, is_master=False, timeout=timedelta(seconds=patience))
        self._store = PrefixStore("heartbeat", store)
        self._talked = time.monotonic()
        self._seen = {rank: (b"", self._talked) for rank in range(membership.size) if rank != membership.rank}
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._watch)]

    def start(self) -> None:
        """Beat and watch until stopped."""
        for thread in self._threads:
            thread.start()

    def stop(self, patience: float) -> None:
        """Say goodbye and stop: from now on nobody misses this process. patience: longest wait, in seconds."""
        self._stopped.set()
        # Apart, since the store may never answer again.
        farewell = threading.Thread(target=self._say_goodbye, args=(patience,), daemon=True)
        farewell.start()
        farewell.join(patience)

    def lost_process(self) -> LostProcess:
        """Return what to raise when an exchange has failed: it names the process that was lost, where one has fallen silent.

        Waits long enough to be sure of that.
        """
        time.sleep(5 * BEAT)
        now = time.monotonic()
        rank, (_, last_sign) = min(self._seen.items(), key=lambda item: item[1][1])
        if now - self._talked > 3 * BEAT:
            return self._lost("process 0 was lost")  # it holds the store
        if now - last_sign > 3 * BEAT:
            return self._lost(f"process {rank} was lost")
        return self._lost("another process failed")

    def _beat(self) -> None:
        beats = 0
        while not self._stopped.wait(BEAT):
            beats += 1
            try:
                self._store.set(str(self.membership.rank), str(beats))
                for rank, beat in self._beats().items():
                    if beat == b"goodbye" or beat != self._seen[rank][0]:
                        self._seen[rank] = (beat, time.monotonic())
            except (dist.DistError, RuntimeError):
                self._give_up("process 0, which holds the meeting point, cannot be reached")
                return
            self._talked = time.monotonic()

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._stopped.wait(BEAT):
            now = time.monotonic()
            late, looked = now - looked - BEAT, now
            if late > BEAT:  # suspended, or starved on a busy machine: it may have seen nobody meanwhile
                self._talked = min(self._talked + late, now)
                self._seen = {rank: (beat, min(when + late, now)) for rank, (beat, when) in self._seen.items()}
            if now - self._talked > self.lost_after:
                self._give_up(f"process 0, which holds the meeting point, has not answered for {self.lost_after:.0f} s")
            for rank, (_, when) in list(self._seen.items()):
                if now - when > self.lost_after:
                    self._give_up(f"process {rank} has given no sign of life for {self.lost_after:.0f} s")

    def _beats(self) -> dict[int, bytes]:
        return {rank: self._store.get(str(rank)) if self._store.check([str(rank)]) else b"" for rank in self._seen}

    def _say_goodbye(self, patience: float) -> None:
        """Say goodbye; process 0, which holds the store, waits until the others have said it, too."""
        try:
            self._threads[0].join()  # else its last beat might follow
            self._store.set(str(self.membership.rank), "goodbye")
            deadline = time.monotonic() + patience
            while self.membership.rank == 0 and time.monotonic() < deadline:
                if all(beat == b"goodbye" for beat in self._beats().values()):
                    return
                time.sleep(0.05)
        except (dist.DistError, RuntimeError):
            pass  # the process that holds the store is gone; nobody is left to tell

    def _give_up(self, why: str) -> None:
        if self._stopped.is_set():
            return
        self._on_lost(self._lost(why))
        os._exit(EXIT_STATUS)

    def _lost(self, why: str) -> LostProcess:
        return LostProcess(f"process {self.membership.rank} of {self.membership.size} stops: {why}.{self._hint}")
