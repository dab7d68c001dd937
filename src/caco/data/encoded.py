"""Sources that hold encoded images (JPEG, PNG, ...): they only have to say where the bytes are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from caco.data.decode import BrokenImage, Decoded, Pixels, Shrink, decode_rgb

Labels = NDArray[np.int64] | None


class EncodedSource(ABC):
    """An `ImageSource` of encoded images."""

    def __init__(self, name: str, labels: Labels, classes: tuple[str, ...]) -> None:
        self.name = name
        self.labels = labels
        self.classes = classes

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, index: int) -> str:
        """Return the name of an image, unique in this source."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Return an image's bytes as they are stored. Raises BrokenImage if they cannot be read."""

    @abstractmethod
    def files(self) -> Iterable[str]:
        """Return the whole paths of the files that hold the images."""

    def load(self, index: int) -> Pixels:
        """Return an image, uint8 [H, W, 3], RGB, upright. Raises BrokenImage."""
        return decode_rgb(self.read(index), self.key(index)).pixels

    def load_shrunk(self, index: int, shrink: Shrink) -> Decoded:
        """Return an image; a JPEG decoded smaller by the factor that `shrink` says for its size. Raises BrokenImage."""
        return decode_rgb(self.read(index), self.key(index), shrink)


def read_bytes(path: str, key: str, offset: int = 0, size: int = -1) -> bytes:
    """Return `size` bytes of a file from `offset` on, or all. Raises BrokenImage if they are not there.

    The file is opened anew each time: no handle is shared between threads or processes, and none is kept.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            if offset:
                file.seek(offset)
            data = file.read(size)
    except OSError as problem:
        raise BrokenImage(key, f"cannot be read: {problem.strerror}") from problem
    if size >= 0 and len(data) < size:
        raise BrokenImage(key, f"truncated: {len(data):,} of {size:,} bytes are there")
    return data


def labels_by_name(names: Sequence[str]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return int64 [N] labels and the classes: the sorted distinct names."""
    classes = tuple(sorted(set(names)))
    number = {name: label for label, name in enumerate(classes)}
    return np.fromiter((number[name] for name in names), np.int64, len(names)), classes


def labels_by_number(numbers: NDArray[np.int64], classes: Sequence[str] = ()) -> tuple[Labels, tuple[str, ...]]:
    """Return labels and classes from numbers, int64 [N]; where `classes` lacks a name, the numbers there are the names.

    A set with a number below 0 (by custom "no label") has no labels.
    """
    if not len(numbers) or numbers.min() < 0:
        return None, ()
    if numbers.max() < len(classes):
        return numbers, tuple(classes)
    there, labels = np.unique(numbers, return_inverse=True)
    names = tuple(classes[number] if number < len(classes) else str(number) for number in there.tolist())
    return labels.astype(np.int64), names
