"""Files that are whole or not there at all."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from caco.errors import CacoError, UsageError, did_you_mean

TEMPORARY = ".*.[0-9]*.tmp"
"""Pattern of the names that files have while they are written: their own, and the number of the process."""
PLACES = ("", "checkpoints/", "export/", "results/")
"""Where a run's files are, in its folder."""
FULL = (errno.ENOSPC, errno.EDQUOT)
"""No space left on the disk, or of one's share of it."""


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Write content to path as a whole (`replacing`). Raises CacoError when the system refuses."""
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path, second_name: Path | None = None) -> Iterator[BinaryIO]:
    """Give a file to write to, which takes the place of `path` when all is written.

    A crash at any moment leaves the old file or the new one, never a part: a temporary file in the same folder is synced
    to disk and renamed, then the folder is synced. second_name: in the same folder; the file gets it, too, and first,
    without being written twice (where the file system cannot do that, it is). Raises CacoError when the system refuses: a
    full disk, a folder that may not be written to, ...
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                try:
                    yield file
                except RuntimeError as error:
                    if refusal := _refusal_behind(error):
                        raise refusal from None
                    raise
                file.flush()
                os.fsync(file.fileno())
            if second_name is not None:
                _give_second_name(temporary, second_name)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        raise CacoError(refused(error, path)) from error


def _refusal_behind(error: BaseException) -> OSError | None:
    """Return what the system refused while torch.save wrote, which tells an error of its own instead; None: nothing."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause


def _give_second_name(temporary: Path, name: Path) -> None:
    other = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    try:
        try:
            os.link(temporary, other)
        except OSError:  # a file system without such links
            shutil.copyfile(temporary, other)
        os.replace(other, name)
    finally:
        other.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    if os.name == "nt":  # Windows opens no folders
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # which say that this file system syncs no folders
            raise
    finally:
        os.close(folder)


def replace_json(path: Path, content: Any) -> None:
    """Write indented JSON with `replace_file`."""
    replace_file(path, (json.dumps(content, indent=2) + "\n").encode())


@contextmanager
def one_at_a_time(lock: Path) -> Iterator[bool]:
    """Wait until no other process of this machine is inside, hold the file `lock`, and let go of it at the end.

    The system lets go when this process ends in whatever way; the file stays. Gives False, and holds nothing, where the
    system or the file system has no locks, or the file may not be written.
    """
    try:
        import fcntl

        file = open(lock, "a", encoding="utf-8")  # noqa: SIM115 (closed below)
    except (ImportError, OSError):
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            held = True
        except OSError:  # a network file system without locks
            held = False
        yield held


def holds_run(folder: Path) -> bool:
    """Return whether a folder holds a run, of any version of caco, by its config.json; other programs have one, too."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"recipe", "bank_size", "backbone"} <= content.keys()


def check_encoder_is_there(path: Path, names: Sequence[str] = ()) -> None:
    """Raise UsageError when no run folder or file is at a path. names: what else could have been meant."""
    if not path.exists():
        near = did_you_mean(str(path), names)
        raise UsageError(f"there is no run folder or file {path}{near and '.' + near}")


def check_output(option: str, path: Path, overwrite: bool) -> None:
    """Raise UsageError when a command's file cannot be written at `path`, or one is there that it is not to overwrite."""
    if path.is_file() and not overwrite:
        raise UsageError(f"{option} {path} is there already; choose another name, or replace it with --overwrite")
    check_writable(option, path)


def check_writable(option: str, path: Path) -> None:
    """Raise UsageError when a file cannot be written at `path`; tried in the nearest folder that is there already.

    option: what named it ("--out"). Folders on the way are made when the file is written.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{option}: {refused(error, path)}") from error


def refused(error: OSError, path: Path | None = None) -> str:
    """Return in words what the system refused, with the whole path, and what to do.

    path: the file that was to be written, where the error may not know it.
    """
    name = path or error.filename
    if name is None:
        where = "a file cannot be written" if error.errno in FULL else "the system refuses"
    else:
        where = f"{os.path.abspath(name)} {'cannot be written' if path or error.errno in FULL else 'cannot be used'}"
    advice = "; free some space there" if error.errno in FULL else ""
    return f"{where}: {error.strerror or error}{advice}"


def print_any_name() -> None:
    """Let this process print every name of a file, as escapes where the terminal has no characters for it.

    A process that was started without an output (`>&-`, by some schedulers) prints into nowhere.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (open as long as the process)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
