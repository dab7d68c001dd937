"""Images that are in memory as pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from caco.data.decode import Pixels
from caco.data.encoded import Labels, labels_by_number
from caco.errors import UsageError


def remedy(images: Any) -> str:
    """Return how an array or Tensor of pixels becomes uint8 [N, H, W, 3], behind a colon; "" where it is not known."""
    steps = []
    shape = tuple(images.shape)
    if len(shape) == 4 and shape[1] == 3 and shape[3] != 3:
        steps.append("images.transpose(0, 2, 3, 1) puts the channels last")
    elif len(shape) == 4 and shape[1] == 1:
        steps.append("images[:, 0] takes away the axis of the one channel")
    if "float" in str(images.dtype):
        steps.append('(255 * images).round().astype("uint8") makes bytes of numbers from 0 to 1')
    return f": {', '.join(steps)}" if steps else ""


class ArraySource:
    """An `ImageSource` of an array: uint8 [N, H, W, 3] (RGB) or [N, H, W] (grey); keys are "image 17"."""

    def __init__(
        self,
        images: NDArray[Any],
        labels: Sequence[int] | NDArray[Any] | None = None,
        classes: Sequence[str] = (),
        name: str = "array",
    ) -> None:
        """labels: N whole numbers from 0 on; classes: their names. Raises UsageError for another shape or dtype, or none."""
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)):
            raise UsageError(
                f"{name}: images must be uint8 [N, H, W, 3] or [N, H, W], not {images.dtype} {list(images.shape)}"
                f"{remedy(images)}"
            )
        if images.size == 0:
            raise UsageError(f"{name} holds no images: its shape is {list(images.shape)}")
        self.name = name
        self.images = images
        self.labels: Labels = None
        self.classes: tuple[str, ...] = ()
        if labels is not None:
            numbers = np.asarray(labels)
            if numbers.shape != (len(images),) or numbers.dtype.kind not in "iu" or (numbers < 0).any():
                raise UsageError(f"{name}: labels must be {len(images)} whole numbers from 0 on, one for each image")
            self.labels, self.classes = labels_by_number(numbers.astype(np.int64), tuple(classes))

    def __len__(self) -> int:
        return len(self.images)

    def key(self, index: int) -> str:
        """Return "image 17", counted from 0."""
        return f"image {index}"

    def load(self, index: int) -> Pixels:
        """Return an image, uint8 [H, W, 3], not to be written to."""
        image = self.images[index]
        if image.ndim == 2:
            return np.repeat(image[:, :, None], 3, axis=2)
        return np.ascontiguousarray(image)
