"""How far a run is and how fast: the bar or the lines that show it, the forecast, images per second."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator

from caco.data.prefetch import Batch
from caco.train.journal import Bar, Journal, SilentJournal


class ProgressBar:
    """A bar on a terminal; on anything else a line after the first step, and then now and then. train.log has the lines.

    Used as a context, so that the bar leaves the terminal before an error is told there.
    """

    SECONDS_BETWEEN_LINES = 30.0
    FORMAT = "{percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"
    """Under 120 columns with all that is shown; on a narrower terminal the end is cut off, not the bar."""

    def __init__(self, journal: Journal, steps: int, done: int, unit: str = "step") -> None:
        self._journal, self._steps, self._unit = journal, steps, unit
        self._began, self._first, self._done = time.monotonic(), done, done  # when, and at which step, timing began
        self._after_first = False
        self._last_line = self._began
        hidden = isinstance(journal, SilentJournal) or not _has_columns()
        self._tell = journal.say if hidden else journal.note
        self._bar = Bar(
            total=steps, initial=done, bar_format=self.FORMAT, dynamic_ncols=True, disable=hidden, leave=False
        )

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def advance(self) -> None:
        """Count one step."""
        with contextlib.suppress(OSError):
            self._bar.update()
        self._done += 1
        if self._done == self._first + 1 and not self._after_first:
            now = time.monotonic()
            self._tell(f"{self._unit} {self._done:,}/{self._steps:,} took {now - self._began:.1f} s")
            # It made kernels and buffers, and may have compiled: those that follow tell how long the rest takes.
            self._began, self._first, self._after_first = now, self._done, True

    def show(self, step: int, text: str) -> None:
        """Show the latest numbers."""
        if not self._bar.disable:
            short = text.replace("positive probability", "p(positive)").replace(" waiting for data", " waiting")
            self._bar.set_postfix_str(short, refresh=False)  # to fit into 120 columns
        if time.monotonic() - self._last_line > self.SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            left = (self._last_line - self._began) / max(step - self._first, 1) * (self._steps - step)
            of_what = " in the warm start" if self._unit != "step" else ""
            self._tell(f"{self._unit} {step:,}/{self._steps:,} {text}, {_duration(left)} left{of_what}")


def _has_columns() -> bool:
    """Return whether errors go to a terminal that has room for a bar; some say that they are 0 columns wide."""
    try:
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):
        return False


class Forecast:
    """Whether a run will take long: told once, from the speed of some steps after the first."""

    STEPS = 20
    LONG = 3600.0
    """Seconds of work left from which it is told."""

    def __init__(self, steps_per_epoch: int, new: bool) -> None:
        """new: whether the number of epochs can still be chosen; that of a resumed run cannot."""
        self._per_epoch, self._new = steps_per_epoch, new
        self._began: float | None = None
        self._done = 0.0
        self._told = False

    def note(self, steps_left: float, measured: bool, cost: float = 1.0) -> str:
        """Take note of a step; return what is to be said, or "".

        steps_left: training steps to go, those of the warm start by their cost. measured: the device has done all steps
        up to here. cost: of this step, in training steps.
        """
        if self._began is None:  # the first step makes kernels and buffers
            self._began = time.monotonic()
            return ""
        self._done += cost
        if self._told or not measured or self._done < self.STEPS * cost:
            return ""
        self._told = True
        seconds = (time.monotonic() - self._began) / self._done
        left = seconds * steps_left
        if left < self.LONG:
            return ""
        an_hour = int(round(3600 / (seconds * self._per_epoch), 3))
        can_be_shorter = self._new and an_hour and left > 1.5 * self.LONG
        shorter = f"; --epochs {an_hour} takes about an hour" if can_be_shorter else ""
        return f"about {left / 3600:.0f} h to go at this speed; Ctrl-C saves, --resume goes on{shorter}"


class Stopwatch:
    """Images per second, and the share of the time spent waiting for the next batch."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget what was measured (the time between was not spent training)."""
        self.began, self.waited, self.images = time.monotonic(), 0.0, 0

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches, timing the wait for each."""
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - asked
            if batch is None:
                return
            yield batch

    def take(self) -> tuple[float, float]:
        """Return (images per second, share of time waited) since the last call, and start anew."""
        seconds = max(time.monotonic() - self.began, 1e-9)
        result = self.images / seconds, self.waited / seconds
        self.restart()
        return result


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
