"""WebDataset shards: tar files of images, read at random by the offsets of their members."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from caco.data.decode import ENDINGS
from caco.data.encoded import EncodedSource, labels_by_name, labels_by_number, read_bytes
from caco.data.folder import ending
from caco.data.index import Index, read_index, stamp, write_index
from caco.errors import UsageError


class ShardSource(EncodedSource):
    """An `ImageSource` of the images in tar files; keys are "shard.tar/member.jpg"."""

    def __init__(self, name: str, shards: Sequence[str], index: Index) -> None:
        """shards: their paths; index: the members' names, with the columns shard, offset, size and, if any, label."""
        super().__init__(name, index.columns.get("label"), index.classes)
        self.shards = shards
        self._shard_names = distinct_names(shards)
        self._members = index.names
        self._shard, self._offset, self._size = (index.columns[column] for column in ("shard", "offset", "size"))

    def __len__(self) -> int:
        return len(self._members)

    def key(self, index: int) -> str:
        """Return "shard.tar/member.jpg"; shards of one name in several folders keep the folders that differ."""
        return f"{self._shard_names[self._shard[index]]}/{self._members[index]}"

    def read(self, index: int) -> bytes:
        """Return the member's bytes. Raises BrokenImage."""
        path = self.shards[self._shard[index]]
        return read_bytes(path, self.key(index), int(self._offset[index]), int(self._size[index]))


def shard_source(paths: Sequence[Path], name: str, index_cache: Path | None = None) -> ShardSource:
    """Return the images in tar files, in the order of the files and of their members.

    A label is the text of the `.cls` member of the same sample (the same name up to the first dot): the number or the
    name of a class. Without one for each image there are no labels.
    Raises UsageError for a shard that is damaged or compressed, or if no shard has an image.
    """
    shards = [os.path.realpath(path) for path in paths]
    place = "\n".join(["shards", *shards])
    index = read_index(index_cache, place)
    if index is None:
        index = _index(shards)
        if not index.names:
            raise UsageError(f"{name} holds no images in {len(shards):,} tar files")
        write_index(index_cache, place, index)
    return ShardSource(name, shards, index)


def _index(shards: Sequence[str]) -> Index:
    names: list[str] = []
    places: list[tuple[int, int, int]] = []
    texts: list[str] = []
    stamps = {}
    for number, shard in enumerate(shards):
        stamps[shard] = stamp(shard)
        members, labels = _members(shard)
        for member in members:
            names.append(member.name)
            places.append((number, member.offset_data, member.size))
            texts.append(labels.get(_sample(member.name), ""))
    shard_column, offset, size = np.array(places, np.int64).reshape(-1, 3).T
    columns = {"shard": shard_column, "offset": offset, "size": size}
    if not texts or not all(texts):
        return Index(names, stamps, columns)
    if all(text.isdecimal() for text in texts):
        numbers, classes = labels_by_number(np.array(texts).astype(np.int64))
    else:
        numbers, classes = labels_by_name(texts)
    return Index(names, stamps, {**columns, "label": numbers}, classes)


def _members(shard: str) -> tuple[list[tarfile.TarInfo], dict[str, str]]:
    """Return a tar file's images, and for each sample with a `.cls` member that member's text."""
    images = []
    labels = {}
    try:
        with tarfile.open(shard, "r:") as tar:  # the colon: not compressed, or there would be no offsets
            for member in tar:
                if not member.isreg() or member.issparse() or os.path.basename(member.name)[:1] in ("", "."):
                    continue
                kind = ending(member.name)
                if kind in ENDINGS:
                    images.append(member)
                elif kind == "cls":
                    content = tar.extractfile(member)
                    labels[_sample(member.name)] = content.read().decode().strip() if content else ""
    except (tarfile.TarError, OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"{shard} cannot be read as an uncompressed tar file: {problem}") from problem
    return images, labels


def _sample(member: str) -> str:
    """Return the name that a sample's members share: up to the first dot after the last slash."""
    folder, slash, file = member.rpartition("/")
    return folder + slash + file.partition(".")[0]


def distinct_names(paths: Sequence[str]) -> list[str]:
    """Return each path relative to the folder they are all in, with `/` between its parts."""
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [Path(os.path.relpath(path, common)).as_posix() for path in paths]
