"""The centre views of a source's images, which evaluations see: decoded when they are wanted, kept where they are wanted again."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from caco.data.augment import centre_view
from caco.data.source import ImageSource
from caco.data.threads import batched, map_in_order
from caco.views import Preparation


class CentreViews:
    """The centre views of some images of a source, in batches; broken images are left out and listed."""

    def __init__(
        self,
        source: ImageSource,
        preparation: Preparation,
        indices: np.ndarray | None = None,
        *,
        workers: int,
        batch_size: int = 256,
        most_kept: int = 0,
    ) -> None:
        """indices: None: all. workers: threads that decode. most_kept: bytes that all views may take to be kept for the next
        time, if none was broken.
        """
        self.source, self.preparation = source, preparation
        self.indices = np.arange(len(source)) if indices is None else indices
        self.workers, self.batch_size = workers, batch_size
        self.broken: list[tuple[str, str]] = []
        """Key and reason of each image that could not be read, when all have been taken."""
        self._may_be_kept = 0 < 3 * preparation.size**2 * len(self.indices) <= most_kept
        self._kept: list[tuple[list[int], Tensor]] | None = None

    def __iter__(self) -> Iterator[tuple[list[int], UInt8[Tensor, "B S S 3"]]]:
        """Yield the indices of some good images, and their views."""
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[tuple[list[int], Tensor]] = []
        broken: list[tuple[str, str]] = []
        ahead = 2 * self.batch_size + self.workers
        decoded = map_in_order(self._view, self.indices.tolist(), broken, ahead, self.workers)
        for read, views in batched(decoded, self.batch_size):
            batch = read, torch.from_numpy(np.stack(views))
            if self._may_be_kept:
                kept.append(batch)
            yield batch
        self.broken = broken
        if self._may_be_kept and not broken:  # broken images may be good the next time
            self._kept = kept

    def _view(self, index: int) -> UInt8[np.ndarray, "S S 3"]:
        image, how = self.source.load(index), self.preparation
        return centre_view(image, how.resize, how.size, how.interpolation, how.squash)
