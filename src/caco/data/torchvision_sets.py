"""The image sets that torchvision knows by name."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from caco.data.arrays import ArraySource
from caco.data.encoded import Labels, labels_by_number
from caco.data.folder import FileSource
from caco.errors import CacoError, UsageError, did_you_mean
from caco.files import one_at_a_time


@dataclass(frozen=True)
class NamedSet:
    """Where torchvision has a set."""

    dataset: str
    """Its class in `torchvision.datasets`."""
    splits: dict[str, dict[str, Any]]
    """The name of each part, and the arguments that choose it."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments for any part."""


def _path(path: str | Path) -> str | Path:
    """A `loader` for torchvision that leaves an image where it is: `dataset[index]` is then (path, label)."""
    return path


def _by_flag() -> dict[str, dict[str, Any]]:
    return {"train": {"train": True}, "test": {"train": False}}


def _by_name(*names: str, **others: str) -> dict[str, dict[str, Any]]:
    return {ours: {"split": theirs} for ours, theirs in [*((name, name) for name in names), *others.items()]}


_FILES = {"loader": _path}
SETS = {
    "aircraft": NamedSet("FGVCAircraft", _by_name("test", train="trainval"), _FILES),
    "cifar10": NamedSet("CIFAR10", _by_flag()),
    "cifar100": NamedSet("CIFAR100", _by_flag()),
    "country211": NamedSet("Country211", _by_name("train", "test", val="valid"), _FILES),
    "dtd": NamedSet("DTD", _by_name("train", "val", "test"), _FILES),
    "eurosat": NamedSet("EuroSAT", {"train": {}}, _FILES),
    "fashionmnist": NamedSet("FashionMNIST", _by_flag()),
    "flowers102": NamedSet("Flowers102", _by_name("train", "val", "test"), _FILES),
    "food101": NamedSet("Food101", _by_name("train", "test"), _FILES),
    "imagenette": NamedSet("Imagenette", _by_name("train", "val"), _FILES),
    "mnist": NamedSet("MNIST", _by_flag()),
    "pets": NamedSet("OxfordIIITPet", _by_name("test", train="trainval")),
    "stl10": NamedSet("STL10", _by_name("train", "test", "unlabeled", "train+unlabeled")),
    "svhn": NamedSet("SVHN", _by_name("train", "test", "extra")),
}


def choose_split(name: str, asked: str, explicit: str, splits: Sequence[str]) -> str:
    """Return the part of a named set: the `explicit` one of "stl10:unlabeled", else the one `asked` for by its role.

    The roles val and test stand in for each other where a set has only one. Raises UsageError for a part it lacks.
    """
    stand_in = {"val": "test", "test": "val"}.get(asked, asked)
    wanted = [explicit] if explicit else [asked, stand_in]
    for split in wanted:
        if split in splits:
            return split
    raise UsageError(f"{name} has no part {wanted[0]!r}, only {', '.join(splits)}.{did_you_mean(wanted[0], splits)}")


def torchvision_source(
    name: str, split: str, explicit_split: str, root: Path, download: bool
) -> ArraySource | FileSource:
    """Return a part of one of SETS from below the folder `root`.

    Raises UsageError if it is not there and `download` is false, or if reading it needs a package that is not there
    either; CacoError if a download fails.
    """
    named = SETS[name]
    part = choose_split(name, split, explicit_split, tuple(named.splits))
    import torchvision.datasets  # late: takes seconds

    dataset_class = getattr(torchvision.datasets, named.dataset)
    try:
        if download:
            root.mkdir(parents=True, exist_ok=True)
        # Several processes of a run, or several runs, would write the same files: the first loads them down, others wait.
        with one_at_a_time(root / f".{name}.lock") if download else contextlib.nullcontext():
            dataset = dataset_class(root=str(root), download=download, **named.splits[part], **named.arguments)
    except ModuleNotFoundError as problem:
        raise UsageError(f"{name} needs {problem.name}: pip install {problem.name}") from problem
    except (RuntimeError, OSError) as problem:
        if download:
            raise CacoError(f"{name} could not be downloaded to {root}: {problem}") from problem
        raise UsageError(
            f"{name} is not in {root}: download it there with --download, or name the folder that has it in CACO_DATA"
        ) from problem
    return _as_source(dataset, f"{name} ({part})", root)


def _as_source(dataset: Any, name: str, root: Path) -> ArraySource | FileSource:
    """Return a torchvision dataset's arrays as they are, or its files to be read and decoded by us."""
    named_classes = [entry if isinstance(entry, str) else entry[0] for entry in getattr(dataset, "classes", ())]
    if hasattr(dataset, "data"):
        images = np.asarray(dataset.data)
        if images.ndim == 4 and images.shape[1] == 3 and images.shape[3] != 3:
            images = images.transpose(0, 2, 3, 1)
        numbers = dataset.labels if hasattr(dataset, "labels") else dataset.targets
        labels, classes = _labels(numbers, named_classes)
        return ArraySource(images, labels, classes, name=name)
    if hasattr(dataset, "_images"):  # pets: the one set of files that takes no loader
        samples = list(zip(dataset._images, dataset._labels, strict=True))
    else:
        samples = [dataset[index] for index in range(len(dataset))]
    names = [Path(os.path.relpath(path, root)).as_posix() for path, _ in samples]
    labels, classes = _labels([label for _, label in samples], named_classes)
    return FileSource(name, str(root), names, labels, classes)


def _labels(numbers: Any, classes: Sequence[str]) -> tuple[Labels, tuple[str, ...]]:
    values: NDArray[np.int64] = np.asarray(numbers, dtype=np.int64)
    return labels_by_number(values, classes)
