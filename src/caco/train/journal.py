"""What a run writes down.

metrics.jsonl  what was learned: the truth that every other view reads; the same, byte for byte, after a resume
speed.jsonl    how fast: images/s and the share of time spent waiting for data (differs from run to run)
train.log      what was said on the console, with times
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from caco.errors import CacoError
from caco.files import refused


class Bar(tqdm):  # type: ignore[misc]
    """tqdm's bar without a lock between processes, which a process that is killed would leave behind."""

    _lock = threading.RLock()


class Journal:
    """The files of one run, appended to as it goes on. Raises CacoError, with the file, when the system refuses."""

    def __init__(
        self,
        folder: Path,
        keep_bytes: int = 0,
        tensorboard: bool = False,
        warm_start_steps: int = 0,
        resumed_at: int | None = None,
    ) -> None:
        """keep_bytes: length of metrics.jsonl at the checkpoint resumed from; what came later is done again, and TensorBoard
        forgets it. resumed_at: steps done then, those of the warm start below 0: so TensorBoard counts them."""
        self._warm_start_steps = warm_start_steps
        with contextlib.ExitStack() as opened:  # where one is refused, those before it are closed again
            self._metrics = opened.enter_context(_open(folder / "metrics.jsonl", "ab"))
            with _refusals(folder / "metrics.jsonl"):
                # Never to more than it has: it would be filled up with zeros.
                self._metrics.truncate(min(keep_bytes, self._metrics.tell()))
                self._metrics.seek(0, os.SEEK_END)
            self._speed = opened.enter_context(_open(folder / "speed.jsonl", "a", encoding="utf-8"))
            log = _open(folder / "train.log", "a", encoding="utf-8", errors="backslashreplace")
            self._log = opened.enter_context(log)
            self._events = _event_writer(folder, resumed_at) if tensorboard else None
            opened.pop_all()  # open as long as the run

    def record(self, kind: str, step: int, **values: Any) -> None:
        """Append one record to metrics.jsonl."""
        line = json.dumps({"kind": kind, "step": step, **values})
        _append(self._metrics, line.encode() + b"\n")
        if self._events is not None:
            at = step - self._warm_start_steps if kind == "warm start" else step
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._events.add_scalar(f"{kind}/{name}", value, at)

    def record_speed(self, step: int, images_per_second: float, data_wait: float) -> None:
        """Append one record to speed.jsonl. data_wait: share of the time, 0-1."""
        record = {"step": step, "images_per_second": round(images_per_second, 2), "data_wait": round(data_wait, 4)}
        _append(self._speed, json.dumps(record) + "\n")

    def say(self, text: str) -> None:
        """Say something on the console (above a progress bar) and in train.log."""
        with contextlib.suppress(OSError):  # a console that is gone (`| head`) must not stop the run
            Bar.write(text, file=sys.stderr)
        self.note(text)

    def note(self, text: str) -> None:
        """Write something to train.log only."""
        _append(self._log, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def sync(self) -> int:
        """Bring metrics.jsonl to the disk and return its length in bytes, for a checkpoint."""
        with _refusals(Path(self._metrics.name)):
            os.fsync(self._metrics.fileno())
            return self._metrics.tell()

    def close(self) -> None:
        """Close the files."""
        for file in (self._metrics, self._speed, self._log):
            with contextlib.suppress(OSError):  # what could not be written has been told
                file.close()
        if self._events is not None:
            self._events.close()


def _open(path: Path, mode: str, **how: str) -> IO[Any]:
    with _refusals(path):
        return open(path, mode, **how)  # type: ignore[call-overload,no-any-return]


def _append(file: IO[Any], text: str | bytes) -> None:
    with _refusals(Path(file.name)):
        file.write(text)
        file.flush()


@contextlib.contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Raise CacoError, with the file, in place of what the system says when it refuses."""
    try:
        yield
    except OSError as error:
        raise CacoError(refused(error, path)) from error


class SilentJournal(Journal):
    """The journal of a process that is not the main one: it writes nothing."""

    def __init__(self) -> None:
        pass

    def record(self, kind: str, step: int, **values: Any) -> None:
        """Write nothing."""

    def record_speed(self, step: int, images_per_second: float, data_wait: float) -> None:
        """Write nothing."""

    def say(self, text: str) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Write nothing."""

    def sync(self) -> int:
        """Return 0: there is no file."""
        return 0

    def close(self) -> None:
        """Close nothing."""


def _event_writer(folder: Path, resumed_at: int | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # an extra; `checks.check` has told if it is missing

    with _refusals(folder):
        return SummaryWriter(str(folder), purge_step=None if resumed_at is None else resumed_at + 1)
