"""Labelled sources side by side: where their labels come from, one numbering of their classes, a part of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from caco.data.arrays import ArraySource
from caco.data.datasets import DatasetSource
from caco.data.decode import Pixels
from caco.data.source import ImageSource
from caco.errors import UsageError, did_you_mean


def where_labels_come_from(source: ImageSource) -> str:
    """Return in words what gives a source of this kind its labels."""
    if isinstance(source, ArraySource):
        return "caco.data.arrays.ArraySource(images, labels)"
    if isinstance(source, DatasetSource):
        return "the Dataset's `targets` or `labels`, whole numbers"
    return "class folders, or a label column"


class Relabelled:
    """A source with the classes of another: the same images, labels renumbered."""

    def __init__(self, source: ImageSource, classes: tuple[str, ...]) -> None:
        """Raises UsageError when `source` has no labels, a class that is not among `classes`, or other classes with one
        name for two of them."""
        if source.labels is None:
            raise UsageError(f"{source.name} has no labels ({where_labels_come_from(source)})")
        unknown = [name for name in source.classes if name not in classes]
        if unknown:
            near = did_you_mean(unknown[0], classes)
            raise UsageError(f"{source.name} has the class {unknown[0]!r}, which the training images lack.{near}")
        numbers = np.arange(len(classes), dtype=np.int64)
        if source.classes != classes:
            _check_each_has_a_name(source, classes)
            numbers = np.array([classes.index(name) for name in source.classes], dtype=np.int64)
        self.name, self.classes = source.name, classes
        self.labels = numbers[source.labels]
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def key(self, index: int) -> str:
        return self._source.key(index)

    def load(self, index: int) -> Pixels:
        return self._source.load(index)


def _check_each_has_a_name(source: ImageSource, classes: tuple[str, ...]) -> None:
    """Raise UsageError when classes cannot be matched by name: two of the source's, or of `classes`, share one."""
    for where, names in ((source.name, source.classes), ("the training images", classes)):
        doubled = names_of_several(names)
        if doubled:
            raise UsageError(
                f"{source.name} has other classes than the training images, and by name they cannot be matched: "
                f"several classes of {where} are called {doubled[0]!r}; give each a name of its own"
            )


def names_of_several(classes: Sequence[str]) -> list[str]:
    """Return the names that more than one class has."""
    return [name for name, count in Counter(classes).items() if count > 1]


class Subset:
    """Some of a source's images, in the order of `indices`."""

    def __init__(self, source: ImageSource, indices: np.ndarray) -> None:
        self.name, self.classes = source.name, source.classes
        self.labels = None if source.labels is None else np.asarray(source.labels)[indices]
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def key(self, index: int) -> str:
        return self._source.key(int(self._indices[index]))

    def load(self, index: int) -> Pixels:
        return self._source.load(int(self._indices[index]))
