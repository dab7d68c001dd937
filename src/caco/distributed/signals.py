"""What a signal to the process that has started others does to them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any


@contextmanager
def without_ctrl_c() -> Iterator[None]:
    """While entered, Ctrl-C waits. A process started here never gets one: the terminal sends it to all, and only the
    parent decides what it means."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # the first process would start it, and it lets Ctrl-C through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class SignalsToChildren:
    """While entered, SIGTERM and Ctrl-C to this process reach its children: as SIGTERM where they can resume, else as SIGKILL.

    A second Ctrl-C is always SIGKILL.
    """

    def __init__(self, processes: list[Any], can_resume: bool) -> None:
        """processes: those started so far; may grow."""
        self.processes, self.can_resume = processes, can_resume
        self._last: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> SignalsToChildren:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def take_effect(self) -> None:
        """Do what the last signal, if there was one, does to a process that does not catch it."""
        if self._last == signal.SIGINT:
            raise KeyboardInterrupt
        if self._last is not None:
            signal.raise_signal(self._last)

    def _pass_on(self, number: int, frame: Any) -> None:
        kill = not self.can_resume or (self._last is not None and number == signal.SIGINT)
        self._last = number
        for process in self.processes:
            if not process.is_alive():
                continue
            if (
                number == signal.SIGINT and not kill
            ):  # held back there (`without_ctrl_c`): only tells which of both it was
                os.kill(process.pid, number)
            process.kill() if kill else process.terminate()
