"""Images that are Python objects: arrays, lists of files, and Datasets of torch."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from caco.data.arrays import ArraySource, remedy
from caco.data.decode import BrokenImage, Pixels, explained, upright_pixels
from caco.data.encoded import Labels, labels_by_number
from caco.data.source import ImageSource, open_source
from caco.errors import UsageError


def own_source(data: Any, option: str = "data") -> ImageSource:
    """Return what a Python caller gives as an object, not as a text, as an image source. Raises UsageError.

    option: the option that it was given for.
    """
    if isinstance(data, np.ndarray):
        return ArraySource(data)
    if isinstance(data, ImageSource):
        return data
    if isinstance(data, Tensor):
        raise UsageError(f"{option} is a Tensor; use .numpy(), uint8 [N, H, W, 3]{remedy(data)}")
    if isinstance(data, tuple) and data and isinstance(data[0], np.ndarray) and data[0].ndim == 4:
        raise UsageError(
            f"{option} is a tuple of arrays; labels go with their images: caco.data.arrays.ArraySource(images, labels)"
        )
    if isinstance(data, Sequence) and all(isinstance(item, (str, Path)) for item in data):
        return open_source(list(data))
    if isinstance(data, Mapping):
        inside = ", ".join(map(repr, list(data)[:5]))
        raise UsageError(f"{option} is a dictionary of {inside or 'nothing'}; name one part of it")
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return DatasetSource(data)
    raise UsageError(
        f"{option} is a {type(data).__name__}; it must be a path, a list of files, an array uint8 [N, H, W, 3], a Dataset "
        "with a length and numbered pictures, or an ImageSource"
    )


class DatasetSource:
    """An `ImageSource` of a map-style Dataset (`__len__`, `__getitem__`); keys are "image 17".

    An item is a picture, or a tuple that begins with one: a PIL image, or an array uint8 [H, W, 3] or [H, W]. PIL images
    of any mode become RGB as those in files do, and upright: `ImageOps.exif_transpose` takes away what says that they
    are not, so none is turned twice. Labels are the
    Dataset's `targets` or `labels`, whole numbers from 0 on, and their names its `classes`, as in torchvision; a
    Dataset without is unlabelled. It is read from many threads.
    """

    def __init__(self, dataset: Any) -> None:
        """Raises UsageError for a Dataset that is empty, gives something else, or has labels of another number."""
        self.name = type(dataset).__name__
        self._dataset = dataset
        if len(dataset) == 0:
            raise UsageError(f"{self.name} holds no images")
        self.labels, self.classes = self._labels()
        with contextlib.suppress(BrokenImage):  # one broken image does not make the set unusable
            self.load(0)

    def __len__(self) -> int:
        return len(self._dataset)

    def key(self, index: int) -> str:
        """Return "image 17", counted from 0."""
        return f"image {index}"

    def load(self, index: int) -> Pixels:
        """Return an image, uint8 [H, W, 3], not to be written to.

        Raises BrokenImage when the Dataset cannot read it, UsageError for what is not a picture.
        """
        key = self.key(index)
        try:
            item = self._dataset[index]
        except Exception as problem:
            if isinstance(problem, OSError) or _is_from_pillow(problem):
                raise BrokenImage(key, f"cannot be read: {problem}") from problem
            raise
        picture = item[0] if isinstance(item, (tuple, list)) and item else item
        if isinstance(picture, Image.Image):
            with explained(key):  # it may be decoded only here
                picture = upright_pixels(picture)
        shape: tuple[int, ...] = picture.shape if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 else ()
        if len(shape) not in (2, 3) or shape[2:] not in ((), (3,)):
            what = (
                f"{picture.dtype} {list(picture.shape)}" if isinstance(picture, np.ndarray) else type(picture).__name__
            )
            raise UsageError(
                f"{self.name} gives a {what}; caco needs PIL images or arrays uint8 [H, W, 3], or tuples that begin with "
                "one: leave out the Dataset's own transform"
            )
        if 0 in shape:
            raise BrokenImage(key, f"empty: {shape[0]} x {shape[1]} pixels")
        return np.repeat(picture[:, :, None], 3, axis=2) if picture.ndim == 2 else np.ascontiguousarray(picture)

    def _labels(self) -> tuple[Labels, tuple[str, ...]]:
        given = getattr(self._dataset, "targets", getattr(self._dataset, "labels", None))
        if given is None:
            return None, ()
        try:
            numbers = np.asarray(given)
        except ValueError:  # lists of different lengths
            return None, ()
        if numbers.ndim != 1 or numbers.dtype.kind not in "iu":  # boxes, or files that tell more
            return None, ()
        if len(numbers) != len(self._dataset):
            raise UsageError(f"{self.name} has {len(numbers):,} labels for {len(self._dataset):,} images")
        return labels_by_number(numbers.astype(np.int64), tuple(map(str, getattr(self._dataset, "classes", ()))))


def _is_from_pillow(problem: BaseException) -> bool:
    """Return whether Pillow raised it: of a damaged file, nearly any kind of error."""
    trace = problem.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("PIL.")
