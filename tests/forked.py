"""caco's command line in a process of its own: as real to kill as any, but forked from one that has imported everything.

Importing torch and timm takes a slow core some eight seconds, and a test of interruptions starts many.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path

from caco.cli import main


class Command:
    """A command that has been started; what it says on stderr is kept."""

    def __init__(self, arguments: list[str]) -> None:
        handle, name = tempfile.mkstemp(prefix="stderr-")
        os.close(handle)
        self._error = Path(name)
        self._process = multiprocessing.get_context("forkserver").Process(
            target=_run, args=(arguments, name), daemon=True
        )
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """The exit status, or the negative number of the signal that ended it; None while it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: int) -> None:
        if self._process.pid and self.returncode is None:
            os.kill(self._process.pid, number)

    def finish(self, timeout: float = 120) -> str:
        """Wait for its end and return what it said. Raises TimeoutError, having killed it."""
        self._process.join(timeout)
        if self.returncode is None:
            self._process.kill()
            self._process.join()
            raise TimeoutError(f"still running after {timeout} s:\n{self._said()}")
        return self._said()

    def _said(self) -> str:
        text = self._error.read_text()
        self._error.unlink()
        return text


def _run(arguments: list[str], error: str) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(error, os.O_WRONLY), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as a shell starts it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # `launch` may have started the server, where it waits
    sys.argv = ["caco", *arguments]
    sys.exit(main(arguments))
