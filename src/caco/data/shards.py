"""WebDataset shards: tar files of images, read at random by the offsets of their members."""

from __future__ import annotations

import mmap
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from caco.data.decode import ENDINGS
from caco.data.encoded import EncodedSource, Labels, labels_by_name, labels_by_number, read_bytes
from caco.data.folder import ending, relative_names
from caco.data.index import Index, read_index, stamp, write_index
from caco.errors import UsageError


class _Member(NamedTuple):
    """One file in a tar file."""

    name: str
    offset: int
    """Where its bytes begin."""
    size: int


class ShardSource(EncodedSource):
    """An `ImageSource` of the images in tar files; keys are "shard.tar/member.jpg"."""

    def __init__(self, name: str, shards: Sequence[str], named: Sequence[Path], index: Index) -> None:
        """shards: their paths; named: the same before links were followed, for the keys; index: the members' names, with
        the columns shard, offset, size and, if any, label."""
        super().__init__(name, index.columns.get("label"), index.classes)
        self.shards = shards
        self._shard_names = relative_names([os.path.abspath(path) for path in named])[1]
        self._members = index.names
        self._shard, self._offset, self._size = (index.columns[column] for column in ("shard", "offset", "size"))

    def __len__(self) -> int:
        return len(self._members)

    def key(self, index: int) -> str:
        """Return "shard.tar/member.jpg"; shards of one name in several folders keep the folders that differ."""
        return f"{self._shard_names[self._shard[index]]}/{self._members[index]}"

    def files(self) -> Iterable[str]:
        """Return the shards' paths."""
        return self.shards

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
    identity = "\n".join(["shards", *shards])
    index = read_index(index_cache, identity)
    if index is None:
        index = _index(shards)
        if not index.names:
            raise UsageError(f"{name} holds no images in {len(shards):,} tar files")
        write_index(index_cache, identity, index)
    return ShardSource(name, shards, paths, index)


def _index(shards: Sequence[str]) -> Index:
    names: list[str] = []
    spans: list[tuple[int, int, int]] = []
    texts: list[str] = []
    stamps = {}
    for number, shard in enumerate(shards):
        stamps[shard] = stamp(shard)
        members, labels = _members(shard)
        for member in members:
            names.append(member.name)
            spans.append((number, member.offset, member.size))
            texts.append(labels.get(_sample(member.name), ""))
    shard_column, offset, size = np.array(spans, np.int64).reshape(-1, 3).T
    columns = {"shard": shard_column, "offset": offset, "size": size}
    if not texts or not all(texts):
        return Index(names, stamps, columns)
    numbers: Labels
    if all(re.fullmatch(r"-?[0-9]{1,9}", text) for text in texts):
        numbers, classes = labels_by_number(np.array(texts).astype(np.int64))
    else:
        numbers, classes = labels_by_name(texts)
    if numbers is not None:
        columns["label"] = numbers
    return Index(names, stamps, columns, classes)


def _members(shard: str) -> tuple[list[_Member], dict[str, str]]:
    """Return a tar file's images, and for each sample with a `.cls` member that member's text."""
    images = []
    labels = {}
    try:
        with open(shard, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for member in _plain_members(content) or _any_members(shard):
                kind = ending(member.name)
                if kind in ENDINGS and not os.path.basename(member.name).startswith("."):
                    images.append(member)
                elif kind == "cls":
                    text = content[member.offset : member.offset + member.size]
                    labels[_sample(member.name)] = text.decode().strip()
    except (tarfile.TarError, OSError, ValueError) as problem:
        raise UsageError(f"{shard} cannot be read as an uncompressed tar file: {problem}") from problem
    return images, labels


def _any_members(shard: str) -> list[_Member]:
    """Return the files in any uncompressed tar file. Raises TarError."""
    with tarfile.open(shard, "r:") as tar:
        files = (member for member in tar if member.isreg() and not member.issparse())
        return [_Member(member.name, member.offset_data, member.size) for member in files]


def _plain_members(content: mmap.mmap | bytes) -> list[_Member] | None:
    """Return the files in a tar file of the common kind, some four times as fast as tarfile does.

    None for what `tarfile` should judge: long names, sparse files, links, damage. Layout: POSIX.1-2017, pax, "ustar".
    """
    members = []
    position = 0
    while header := content[position : position + 512].rstrip(b"\0"):
        header = header.ljust(512, b"\0")
        try:
            size, checksum = (int(header[part].strip(b"\0 "), 8) for part in (slice(124, 136), slice(148, 156)))
        except ValueError:
            return None
        first, position = position + 512, position + 512 + (size + 511) // 512 * 512
        summed = header[:148] + b" " * 8 + header[156:]  # a header's checksum is the sum of its bytes, itself blank;
        if zlib.adler32(summed) & 0xFFFF != (checksum + 1) % 65521:  # Adler-32 has it as its lower half, in C
            return None
        if position > len(content):
            return None
        kind = header[156:157]
        if kind in (b"0", b"\0"):
            name = header[:100].partition(b"\0")[0]
            if header[257:263] == b"ustar\0" and header[345] != 0:
                name = header[345:500].partition(b"\0")[0] + b"/" + name
            members.append(_Member(name.decode("utf-8", "surrogateescape"), first, size))
        elif kind == b"x":  # finer times and the like do not matter here; names and sizes do
            records = content[first : first + size]
            if any(word in records for word in (b" path=", b" size=", b"GNU.sparse", b"charset")):
                return None
        elif kind != b"5" or size:
            return None
    return members


def _sample(member: str) -> str:
    """Return the name that a sample's members share: up to the first dot after the last slash."""
    folder, slash, file = member.rpartition("/")
    return folder + slash + file.partition(".")[0]
