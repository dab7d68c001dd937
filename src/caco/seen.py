"""Whether images are among others (those that a run was trained on, that --val has), by the files that hold them."""

from __future__ import annotations

import os
import sys
from functools import cached_property

from caco.data.encoded import EncodedSource
from caco.data.source import ImageSource, open_source
from caco.data.textures import SPLITS
from caco.data.torchvision_sets import SETS, choose_split
from caco.errors import CacoError, UsageError, counted

JUDGED_BY_THEMSELVES = "images that are judged by themselves; the accuracy is too high"
TRAINED_ON = "images that the run is trained on; of others the accuracy may be lower"


class TrainedOn:
    """The images of a run, as its --data names them."""

    def __init__(self, data: str) -> None:
        self._data = data
        self._asked: dict[tuple[str, str], bool | None] = {}

    def has(self, images: str, split: str) -> bool | None:
        """Return whether any of the images that a name stands for is among them; None where that cannot be told.

        split: the part that is meant of a set by name, as for `open_source`. It cannot be told of what is not there
        (any more), such as images that a Python caller gave as an object: those have a name, and no place.
        """
        if (images, split) not in self._asked:
            self._asked[images, split] = self._find(images, split)
        return self._asked[images, split]

    def _find(self, images: str, split: str) -> bool | None:
        own, theirs = _parts(self._data, "train"), _parts(images, split)
        if own and theirs:
            return not own.isdisjoint(theirs)
        found = _named_files(images, split)
        if found is None or self._files is None:
            return None
        return not found.isdisjoint(self._files)

    @cached_property
    def _files(self) -> set[str] | None:
        return _named_files(self._data, "train")


def say_shared(data: ImageSource, val: ImageSource, what: str = JUDGED_BY_THEMSELVES) -> None:
    """Say when files with images of --val are also among those of --data. what: what their images are, and what follows."""
    if shared := shared_files(data, val):
        words = f"--val {val.name} shares {counted(shared, 'file')} with --data {data.name}: {what}"
        print(words, file=sys.stderr)


def shared_files(one: ImageSource, other: ImageSource) -> int:
    """Return how many files hold images of both sources, whatever links lead to them."""
    return len(_real_files(one) & _real_files(other))


def _parts(images: str, split: str) -> set[tuple[str, str]]:
    """Return the parts (set, part) of a set by name that are meant; none where the name is no such set's."""
    head, _, detail = images.partition(":")
    if os.path.exists(os.path.expanduser(images)) or head not in ("textures", *SETS):
        return set()
    explicit, splits = ("", SPLITS) if head == "textures" else (detail, tuple(SETS[head].splits))
    try:
        part = choose_split(head, split, explicit, splits)
    except UsageError:
        return set()
    return {(head, single) for single in part.split("+")}  # stl10 has a part train+unlabeled


def _named_files(images: str, split: str) -> set[str] | None:
    """Return the files that hold the images of a name; None where it names nothing that is there."""
    try:
        return _real_files(open_source(images, split=split))
    except CacoError:
        return None


def _real_files(source: ImageSource) -> set[str]:
    """Return the real paths of the files that hold a source's images; none for pixels in memory, such as a set's arrays.

    A folder is asked once which of its files are links: to ask for each file would take minutes over a network.
    """
    folders: dict[str, tuple[str, set[str]]] = {}
    found = set()
    for path in source.files() if isinstance(source, EncodedSource) else ():
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder), _links(folder)
        real, links = folders[folder]
        found.add(os.path.realpath(path) if name in links else os.path.join(real, name))
    return found


def _links(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_symlink()}
    except OSError:
        return set()
