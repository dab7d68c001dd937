"""What an image source is, and how `--data` becomes one."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from caco.data.decode import ENDINGS, Pixels
from caco.data.folder import FileSource, ending, folder_source, list_source, relative_names
from caco.data.parquet import parquet_source
from caco.data.shards import shard_source
from caco.data.torchvision_sets import SETS, choose_split, torchvision_source
from caco.errors import UsageError, did_you_mean

TEXTURES = 5000
"""Pictures in `textures` when no number is given."""

_KNOWN_SETS = f" Named sets: textures, {', '.join(SETS)}"


@runtime_checkable
class ImageSource(Protocol):
    """Images to look at: read-only, and safe to use from many threads."""

    @property
    def name(self) -> str:
        """What the user wrote."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; () without labels."""

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """int64 [N], indices into classes; None without labels."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """Return an image's name, unique in this source: a relative path, "shard.tar/0001.jpg", "row 17", ..."""

    def load(self, index: int) -> Pixels:
        """Return an image, uint8 [H, W, 3], RGB, upright; not to be written to. Raises BrokenImage(key, reason)."""


def open_source(
    data: str | Path | Sequence[str | Path],
    *,
    split: str = "train",
    download: bool = False,
    index_cache: Path | None = None,
    root: Path | None = None,
) -> ImageSource:
    """Return the images that `data` names, in an order that is the same on every machine: by path.

    data: a folder of images (labels: its sub-folders, if all images are in one of at least two), without what is hidden
        or in the folder of a run; an image; a `.txt` list of images, one a line; Parquet files in Hugging Face's image
        layout or WebDataset tar shards: a file, a folder of them, or a pattern (`*`, `**`, `{000..010}`, `{a,b}`); the name
        of a torchvision set, if need be with its part after a colon (`stl10:unlabeled`); `textures` or `textures:COUNT`; a
        sequence of paths of one kind. A path that exists goes before a name. (What a Python caller has as an object:
        `datasets.own_source`.)
    split: "train", "val" or "test": the part of a named set. Folders and files are taken as they are.
    download: allow torchvision to download a set that is not there.
    index_cache: a file (`.npz`) that keeps the listing of a folder or of shards; when it is stale: `index.read_index`.
    root: the folder of torchvision sets and of unpacked Parquet files; else $CACO_DATA, else ~/.cache/caco/data.
    Raises UsageError for what does not exist, is of an unknown kind, or holds no images.
    """
    root = root or Path(os.path.expanduser(os.environ.get("CACO_DATA") or "~/.cache/caco/data"))
    if not isinstance(data, (str, Path)):
        return _files_source([Path(path) for path in data], f"{len(data)} files", index_cache, root)
    return _named_source(os.fspath(data), split, download, index_cache, root)


def _named_source(name: str, split: str, download: bool, index_cache: Path | None, root: Path) -> ImageSource:
    """Return the images that one path, pattern or name of a set stands for."""
    if not name.strip():
        raise UsageError("no images named: give a folder, Parquet or tar files, a torchvision set, or textures")
    path = Path(os.path.expanduser(name))  # of a user who is not there, it leaves the name as it is
    if os.path.isdir(path):
        found = folder_source(path, name, index_cache)
        return found if isinstance(found, FileSource) else _files_source(found, name, index_cache, root)
    if os.path.exists(path):
        return _files_source([path], name, index_cache, root)
    head, _, detail = name.partition(":")
    if head == "textures":
        return _textures(split, detail)
    if head in SETS:
        return torchvision_source(head, split, detail, root, download)
    if _is_pattern(name):
        return _files_source(expand_pattern(str(path)), name, index_cache, root)
    raise _not_there(name, path)


def check_is_there(name: str) -> None:
    """Raise the UsageError that `open_source` has for a path or name of which there is nothing; nothing is listed or read."""
    path = Path(os.path.expanduser(name))
    is_set = name.partition(":")[0] in ("textures", *SETS)
    if name.strip() and not (os.path.exists(path) or is_set or _is_pattern(name)):
        raise _not_there(name, path)


def _is_pattern(name: str) -> bool:
    return re.search(r"[*?\[{]", name) is not None


def _not_there(name: str, path: Path) -> UsageError:
    if re.search(r"[/\\.]", name):
        return UsageError(f"{name}: no such file or folder.{_nearest(path)}")
    return UsageError(f"{name}: no such file, folder or named set.{_nearest(path, ('textures', *SETS)) or _KNOWN_SETS}")


def expand_pattern(pattern: str) -> list[Path]:
    """Return the sorted files that a pattern names. Raises UsageError if there are none, or one it names is missing."""
    paths: list[Path] = []
    for branch in _expand_braces(pattern):
        found = glob.glob(branch, recursive=True)
        if not found:
            missing = "matches no file" if glob.has_magic(branch) else f"names {branch}, which is not there"
            raise UsageError(f"the pattern {pattern} {missing}")
        paths.extend(Path(match) for match in found)
    return sorted(set(paths), key=Path.as_posix)


def _expand_braces(pattern: str) -> list[str]:
    """Return the pattern once for each choice in `{a,b}` and number in `{000..010}`, padded like the first."""
    match = re.search(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    count = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if count:
        choices = [str(number).zfill(len(count[1])) for number in range(int(count[1]), int(count[2]) + 1)]
    else:
        choices = match[1].split(",")
    tails = _expand_braces(pattern[match.end() :])
    return [pattern[: match.start()] + choice + tail for choice, tail in itertools.product(choices, tails)]


def _files_source(paths: Sequence[Path], name: str, index_cache: Path | None, root: Path) -> ImageSource:
    """Return the source of files of one kind."""
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None or not paths:
        raise UsageError(f"{name}: {missing} is not a file" if missing else f"{name}: no files given")
    kinds = {"image" if ending(path.name) in ENDINGS else ending(path.name) for path in paths}
    if len(kinds) > 1:
        raise UsageError(f"{name}: files of several kinds ({', '.join(sorted(kinds))}); give files of one kind")
    kind = kinds.pop()
    if kind == "parquet":
        return parquet_source(paths, name, root)
    if kind == "tar":
        return shard_source(paths, name, index_cache)
    if kind == "image":
        return FileSource(name, *relative_names([os.path.abspath(path) for path in paths]))
    if kind == "txt" and len(paths) == 1:
        return list_source(paths[0], name)
    packed = kind in ("gz", "tgz", "bz2", "xz", "zst", "zip", "7z", "rar")
    advice = "unpack it first" if packed else "images come in a folder, or as .parquet, .tar or a .txt list of paths"
    raise UsageError(f"{name}: cannot read images from a .{kind} file; {advice}")


def _textures(split: str, count: str) -> ImageSource:
    if count and not (count.isdecimal() and int(count) > 0):
        raise UsageError(f"textures:{count}: after the colon comes the number of pictures, such as textures:{TEXTURES}")
    from caco.data.textures import texture_source

    return texture_source(int(count or TEXTURES), choose_split("textures", split, "", ("train", "test")))


def _nearest(path: Path, sets: Sequence[str] = ()) -> str:
    """Return " Did you mean ...?" with what lies beside the first part of a path that is not there, and named sets."""
    missing = path
    while not os.path.isdir(missing.parent):
        missing = missing.parent
    names = list(sets)
    with contextlib.suppress(OSError):
        names += [entry for entry in os.listdir(missing.parent) if entry[0] != "."]
    hint = did_you_mean(missing.name, names)
    return f"{hint} (in {missing.parent})" if hint and missing.parent != Path() else hint
