"""What a listing found, and its file: a set of a million images is listed once."""

from __future__ import annotations

import io
import json
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from caco.files import replace_file

FORMAT = 1


@dataclass(frozen=True)
class Index:
    """The names of all images, and what else a source needs to find them."""

    names: list[str]
    """One name for each image, in the order of the source."""
    stamps: dict[str, tuple[int, int]]
    """Each folder or file that was looked at: its time of change in ns and its size (folders: 0) at that moment."""
    columns: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """Further numbers of each image, int64 [N]."""
    classes: tuple[str, ...] = ()
    """Names of the classes, if a column holds labels."""


def stamp(path: str) -> tuple[int, int]:
    """Return (time of last change in ns, size in bytes; 0 for a folder). Raises OSError."""
    status = os.stat(path)
    return status.st_mtime_ns, 0 if os.path.isdir(path) else status.st_size


def read_index(cache: Path | None, identity: str) -> Index | None:
    """Return from the file `cache` the index of what `identity` names, or None if there is none that still holds.

    It is stale if it was made of anything else or by another format of this file, or if any folder or shard it was made
    from has another time of change (a folder's changes when a file in it is added, removed or renamed) or size, or is
    gone. Overwriting an image file in place changes no name: that index stays good.
    """
    if cache is None:
        return None
    try:
        with np.load(io.BytesIO(cache.read_bytes()), allow_pickle=False) as file:
            header = json.loads(file["header"].tobytes())
            if (header["format"], header["place"]) != (FORMAT, identity):
                return None
            stamps = {path: (int(changed), int(size)) for path, (changed, size) in header["stamps"].items()}
            if any(stamp(path) != then for path, then in stamps.items()):
                return None
            names = file["names"].tobytes().decode("utf-8", "surrogateescape").split("\0")
            columns = {name: file[name] for name in header["columns"]}
            return Index(names, stamps, columns, tuple(header["classes"]))
    # No such file, a part of one, or another program's: then there is no index yet.
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile):
        return None


def write_index(cache: Path | None, identity: str, index: Index) -> None:
    """Write the file that `read_index` reads; nothing if `cache` is None."""
    if cache is None:
        return
    header = {
        "format": FORMAT,
        "place": identity,
        "stamps": index.stamps,
        "columns": list(index.columns),
        "classes": index.classes,
    }
    arrays = {"header": json.dumps(header).encode(), "names": "\0".join(index.names).encode("utf-8", "surrogateescape")}
    content = io.BytesIO()
    bytes_as_arrays = {name: np.frombuffer(data, np.uint8) for name, data in arrays.items()}
    np.savez(content, **bytes_as_arrays, **index.columns)  # type: ignore[arg-type]
    replace_file(cache, content.getvalue())
