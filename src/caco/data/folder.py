"""Image files in folders or on a list."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from caco.data.decode import ENDINGS
from caco.data.encoded import EncodedSource, Labels, labels_by_name, read_bytes
from caco.data.index import Index, read_index, write_index
from caco.data.parts import check_one_part, check_one_part_of_files, part_of
from caco.errors import UsageError
from caco.files import holds_run

CONTAINERS = ("parquet", "tar")
UNREAD = frozenset(
    ["heic", "heif", "avif", "jxl", "jp2", "tga", "psd", "dng", "cr2", "cr3", "nef", "arw", "orf", "raf", "rw2"]
)
"""Endings of pictures that caco does not read."""


class FileSource(EncodedSource):
    """An `ImageSource` of image files; keys are their names relative to `root`."""

    def __init__(
        self,
        name: str,
        root: str,
        names: Sequence[str],
        labels: Labels = None,
        classes: tuple[str, ...] = (),
        left_out: str = "",
    ) -> None:
        """left_out: in words, the pictures beside these that caco does not read."""
        super().__init__(name, labels, classes)
        self.root = root
        self.names = names
        self.left_out = left_out

    def __len__(self) -> int:
        return len(self.names)

    def key(self, index: int) -> str:
        """Return the file's path relative to the root, with `/` between its parts."""
        return self.names[index]

    def files(self) -> Iterable[str]:
        """Return the images' paths."""
        return (os.path.join(self.root, name) for name in self.names)

    def read(self, index: int) -> bytes:
        """Return the file's bytes. Raises BrokenImage."""
        return read_bytes(os.path.join(self.root, self.names[index]), self.names[index])


@dataclass(frozen=True)
class Listing:
    """What is in a folder and all folders below; names are relative to it, sorted."""

    images: list[str]
    containers: list[str]
    """Parquet and tar files."""
    others: Counter[str]
    """How many other files there are of each ending."""
    stamps: dict[str, tuple[int, int]]


def ending(name: str) -> str:
    """Return a file's ending in lower case without its dot, or an empty string."""
    return name.rpartition(".")[2].lower() if "." in name else ""


def list_folder(root: str) -> Listing:
    """Return everything below a folder, except hidden files and folders, `__MACOSX`, and folders that hold a run of caco.

    A run may write below its own images, and its pictures (gallery.png) are none of them. Links are followed, but not back
    into a folder they are inside of. One with an image's ending that leads nowhere is listed: it counts as a broken image,
    and no picture is missed in silence. No image is opened. Raises UsageError for a folder that may not be read.
    """
    images: list[str] = []
    containers: list[str] = []
    others: Counter[str] = Counter()
    stamps: dict[str, tuple[int, int]] = {}
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while waiting:
        prefix, above = waiting.pop()
        folder = os.path.join(root, prefix) if prefix else root
        try:
            status = os.stat(folder)
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                continue
            stamps[folder] = (status.st_mtime_ns, 0)  # taken before the folder is read: a later change will show
            before = len(images), len(containers), len(waiting)
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = entry.name
                    if name[0] == "." or name == "__MACOSX":
                        continue
                    if name == "config.json" and prefix and holds_run(Path(folder)):
                        del images[before[0] :], containers[before[1] :], waiting[before[2] :], stamps[folder]
                        break
                    kind, leads_to = ending(name), _leads_to(entry)
                    if leads_to == "folder":
                        waiting.append((f"{prefix}{name}/", above | {identity}))
                    elif kind in ENDINGS:
                        if leads_to != "other":
                            images.append(prefix + name)
                    elif kind in CONTAINERS:
                        containers.append(prefix + name)
                    else:
                        others[kind] += 1
        except OSError as problem:
            raise UsageError(f"the folder {folder} cannot be read: {problem.strerror}") from problem
    return Listing(sorted(images), sorted(containers), others, stamps)


def _leads_to(entry: os.DirEntry[str]) -> str:
    """Return "folder", "file", "nothing" (a link to what is not there, or to itself) or "other" (a socket, ...)."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError:  # links in a circle
        return "nothing"
    return "other" if os.path.exists(entry.path) else "nothing"


def folder_source(root: Path, name: str, index_cache: Path | None = None) -> FileSource | list[Path]:
    """Return the images below a folder, or the paths of the Parquet or tar files it holds instead.

    Labels are the sorted names of the first-level folders if there are at least two, no image lies outside them, and they
    are not pieces of one part of a set (train_1, train_2).
    Raises UsageError if there is nothing to train on, or no telling what is meant: images and files that hold images, or
    the parts of a set.
    """
    folder = os.path.realpath(root)
    index = read_index(index_cache, f"folder {folder}")
    left_out = ""
    if index is None:
        listing = list_folder(folder)
        _check_contents(listing, name)
        if listing.containers:
            check_one_part_of_files(name, listing.containers)
            return [Path(folder, container) for container in listing.containers]
        left_out = _left_out(listing.others)
        index = Index(listing.images, listing.stamps)
        write_index(index_cache, f"folder {folder}", index)
    check_one_part(name, index.names)
    labels, classes = _folder_labels(index.names)
    return FileSource(name, folder, index.names, labels, classes, left_out)


def _check_contents(listing: Listing, name: str) -> None:
    """Raise UsageError if a folder holds nothing to look at, or two things."""
    images, containers = len(listing.images), len(listing.containers)
    if images and containers:
        pattern = f"{name.rstrip('/')}/**/*.{ending(listing.containers[0])}"
        raise UsageError(
            f"{name} holds both images ({images:,}) and Parquet or tar files ({containers:,}): name a folder that has "
            f"only the one, or give a pattern like '{pattern}'"
        )
    if not images and not containers:
        common = listing.others.most_common(5)
        kinds = [f"{count:,} {'.' + kind if kind else 'without ending'}" for kind, count in common]
        raise UsageError(
            f"{name} holds no images; found: {', '.join(kinds) or 'no files at all'} "
            f"(images end in {', '.join('.' + kind for kind in sorted(ENDINGS))})"
        )


def _left_out(others: Counter[str]) -> str:
    """Return which pictures beside the images caco does not read, in words: none is to be missed in silence."""
    return ", ".join(f"{others[kind]:,} .{kind}" for kind in sorted(UNREAD & set(others)))


def say_left_out(source: object) -> None:
    """Say how many pictures of a folder are of a kind that caco does not read."""
    if isinstance(source, FileSource) and source.left_out:
        print(f"{source.name}: pictures that caco does not read are left out: {source.left_out}", file=sys.stderr)


def _folder_labels(names: Sequence[str]) -> tuple[Labels, tuple[str, ...]]:
    """Return labels by first-level folder; none if an image is outside all of them, there is only one, or all are pieces."""
    firsts = [path.partition("/")[0] for path in names if "/" in path]
    if len(firsts) < len(names):
        return None, ()
    labels, classes = labels_by_name(firsts)
    if len(classes) < 2 or all(map(part_of, classes)):
        return None, ()
    return labels, classes


def relative_names(paths: Sequence[str]) -> tuple[str, list[str]]:
    """Return the folder that absolute paths are all in, and each path relative to it, with `/` between its parts."""
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return common, [Path(os.path.relpath(path, common)).as_posix() for path in paths]


def list_source(path: Path, name: str) -> FileSource:
    """Return the images that a text file lists: one path a line, absolute or relative to the list; without labels.

    The order is the list's. Raises UsageError for an empty list, one that is not text, or one without a single file
    among its first ten.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # -sig: Windows begins such files with a mark
    except UnicodeDecodeError as problem:
        raise UsageError(f"{name} is not a text file (UTF-8): a list of images has one path a line") from problem
    names = [line.strip() for line in lines if line.strip()]
    root = os.path.realpath(path.parent)
    if not any(os.path.isfile(os.path.join(root, image)) for image in names[:10]):
        first = f"none of its first paths is a file, such as {os.path.join(root, names[0])}" if names else "it is empty"
        raise UsageError(f"{name} is not a list of images: {first}")
    return FileSource(name, root, names)
