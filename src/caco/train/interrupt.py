"""SIGTERM and Ctrl-C: finish the step, save, leave."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

CTRL_C, ASKED = "stopped by Ctrl-C", "asked to stop (SIGTERM)"


class InterruptFlag:
    """While entered, SIGTERM and the first Ctrl-C only set `why`; a second Ctrl-C stops at once.

    Signals can be caught in the main thread alone; elsewhere the flag is never set.
    """

    def __init__(self) -> None:
        self.why: str | None = None
        """Why the run is to stop, in words; None: it is not."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> InterruptFlag:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.why is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        # A process that `launch` has started gets SIGTERM from its parent for either; Ctrl-C then waits behind it.
        ctrl_c = number == signal.SIGINT or signal.SIGINT in signal.sigpending()
        self.why = self.why or (CTRL_C if ctrl_c else ASKED)
