"""Files are whole or not there: a crash at any moment leaves the old one."""

import contextlib
import errno
import json
import os
from pathlib import Path

import pytest

from caco.errors import CacoError, UsageError
from caco.files import check_writable, refused, replace_file, replace_json, replacing


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_writes_replaces_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "new" / "folder" / "file.bin"
    replace_file(path, b"first")
    replace_file(path, memoryview(b"second"))
    assert path.read_bytes() == b"second"
    assert names(path.parent) == ["file.bin"]


@pytest.mark.parametrize("moment", ["replace", "fsync"])
def test_a_crash_keeps_the_old_file(tmp_path, monkeypatch, moment):
    path = tmp_path / "file.bin"
    replace_file(path, b"old")

    def crash(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, moment, crash)
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, b"new and longer")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file.bin"]


def test_content_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """The order of calls is the guarantee: write, sync the file, rename, sync the folder."""
    calls = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (calls.append("sync"), sync(number))[1])
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append("rename"), rename(old, new))[1])
    replace_file(tmp_path / "file", b"content")
    assert calls == ["sync", "rename", "sync"]


@pytest.mark.parametrize(("number", "is_borne"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_file_system_that_syncs_no_folders(tmp_path, monkeypatch, number, is_borne):
    sync = os.fsync

    def refuse(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    with contextlib.nullcontext() if is_borne else pytest.raises(CacoError, match="cannot be written"):
        replace_file(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_temporary_file_is_in_the_same_folder(tmp_path, monkeypatch):
    """Renaming is atomic within a file system only."""
    seen = []
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (seen.append((old, new)), rename(old, new))[1])
    replace_file(tmp_path / "file", b"content")
    ((old, new),) = seen
    assert old.parent == new.parent == tmp_path
    assert old.name.startswith(".")
    assert old.name.endswith(".tmp")


def test_json(tmp_path):
    replace_json(tmp_path / "a.json", {"b": [1, None, "é"]})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"b": [1, None, "é"]}
    assert text.endswith("}\n")
    with pytest.raises(TypeError):
        replace_json(tmp_path / "a.json", {"c": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1, None, "é"]}


def test_a_full_disk_names_the_file_and_what_to_do(tmp_path):
    """A real one: /dev/full refuses every byte, as a full disk does."""
    with pytest.raises(OSError, match="No space left") as caught, open("/dev/full", "wb", buffering=0) as full:
        full.write(b"content")
    said = refused(caught.value, tmp_path / "a.json")
    assert said == f"{tmp_path}/a.json cannot be written: No space left on device; free some space there"
    assert "free some space" in refused(caught.value)


def test_what_cannot_be_written_is_told_with_its_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CacoError, match=f"{tmp_path}/file/a.json cannot be written: "):
        replace_file(Path("file/a.json"), b"")


def test_writable_or_not_is_known_before_the_work(tmp_path):
    check_writable("--out", tmp_path / "new" / "folder" / "a.json")
    assert names(tmp_path) == []  # tried without leaving anything
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a.json", Path("/proc/nobody/a.json")):  # not even root may write there
        with pytest.raises(UsageError, match=f"--out: {path} cannot be written: "):
            check_writable("--out", path)
    with pytest.raises(UsageError, match="Is a directory"):
        check_writable("--out", tmp_path)


def test_an_error_that_is_none_of_the_systems_comes_as_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="no file's fault") as caught, replacing(tmp_path / "file"):
        raise RuntimeError("no file's fault")
    assert caught.value.__cause__ is None and names(tmp_path) == []


def test_a_system_that_opens_no_folders(tmp_path, monkeypatch):
    """Windows refuses to open one, and so to sync it; a file is whole or not there all the same."""
    opened = os.open

    def as_windows(path, *arguments, **named):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **named)

    path = tmp_path / "file.bin"
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", as_windows)
        patch.setattr(os, "name", "nt")
        replace_file(path, b"content")
    assert path.read_bytes() == b"content"
