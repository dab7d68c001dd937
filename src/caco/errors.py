"""Errors meant for people: what was wrong, where, and what to do."""

from __future__ import annotations

import difflib
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path


class CacoError(Exception):
    """A problem its reader can act on; the command line shows it as one line, without a traceback."""

    exit_status = 1


class UsageError(CacoError):
    """A wrong option, name, path or combination, found before any heavy work."""

    exit_status = 2


class LostProcess(CacoError):
    """Another process of the run was lost, so this one stops too: never the cause of a failure, only its echo."""


class Interrupted(CacoError):
    """The run was asked to stop (SIGTERM, Ctrl-C) and has saved itself; resume continues exactly."""

    exit_status = 75  # EX_TEMPFAIL: "try again later", which schedulers read as "requeue"


def did_you_mean(name: str, choices: Iterable[str], most: int = 3) -> str:
    """Return ``" Did you mean a, b?"`` with the nearest choices, or an empty string."""
    near = difflib.get_close_matches(name, list(choices), n=most, cutoff=0.6)
    return f" Did you mean {', '.join(near)}?" if near else ""


def program() -> str:
    """Return the name to call caco by here: as it was called, where the shell does not find it by its name."""
    return "caco" if shutil.which("caco") or Path(sys.argv[0]).name != "caco" else sys.argv[0]


def command_line(*arguments: str) -> str:
    """Return a command of caco to paste into a shell."""
    return shlex.join([program(), *arguments])


def counted(number: int, word: str) -> str:
    """Return "1 image" or "1,000 images"."""
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"
