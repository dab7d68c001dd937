"""Where the processes of a run wait for each other for as long as it takes."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from torch.distributed import PrefixStore  # type: ignore[attr-defined]

FAILED = "failed"
LONGEST_PAUSE = 0.5
"""Seconds between two looks at the store, at most."""


class OthersFailed(RuntimeError):
    """Another process has failed, and will not come."""


class Meeting:
    """A barrier without a deadline: an exchange by torch.distributed gives up, and what one process does may take long.

    It downloads, times how to compute, writes a checkpoint. Whether a process has died meanwhile, the heartbeat tells.
    """

    def __init__(self, store: Any, size: int) -> None:
        """store: that of the run, which all of its `size` processes reach."""
        self._store, self._size, self._number = PrefixStore("meeting", store), size, 0

    def wait(self) -> None:
        """Wait until all processes are here. Raises OthersFailed when one will not come, what torch does when the store is gone."""
        self._number += 1
        everyone = f"{self._number} everyone"
        if self._store.add(f"{self._number} here", 1) == self._size:
            self._store.set(everyone, "is here")
        pause = 0.001
        while not self._store.check([everyone]):  # to wait inside the store would keep others of this process from it
            if self._store.check([FAILED]):
                raise OthersFailed("another process has failed")
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE)

    def fail(self) -> None:
        """Let nobody wait for this process any more; whoever waits where it has been goes on."""
        with contextlib.suppress(RuntimeError):  # the store is gone, which they see themselves
            self._store.set(FAILED, "")
