"""One run in a folder at a time: two would remove each other's checkpoints."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from caco.errors import UsageError

LOCK = ".lock"
PATIENCE = 5.0
"""Seconds to wait for another process to let go: one that was killed may take a moment to be gone."""


class RunLock:
    """Held by a run's main process, and let go by the system when that ends, in whatever way."""

    def __init__(self) -> None:
        self._file: IO[str] | None = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def take(self, folder: Path) -> None:
        """Take the folder for this process, once. Raises UsageError, with the other's number, when it is taken.

        Without effect where the system or the file system has no locks.
        """
        if self._file is not None:
            return
        try:
            import fcntl

            file = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
        except (ImportError, OSError):  # Windows; a folder that may not be written to, which is told elsewhere
            return
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    holder = file.read().strip() or "unknown"
                    file.close()
                    raise UsageError(
                        f"--out {folder} is in use by another run (process {holder}); choose another folder, or stop it"
                    ) from None
                time.sleep(0.1)
            except OSError:  # a network file system without locks
                break
        file.truncate(0)
        file.write(f"{os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        self._file = file
