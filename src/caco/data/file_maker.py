"""Views of encoded images by the GPU alone: threads of the CPU only read the files (`makers.py` has the other makers)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from caco.data.broken import BrokenImages
from caco.data.compiled import DeviceViews
from caco.data.decode import Decoded, PlainJpeg, decode_rgb, plain_jpeg
from caco.data.encoded import EncodedSource
from caco.data.load import load_or_next
from caco.data.makers import DECODED_CHUNK, RandomViews
from caco.data.nvjpeg import decode_jpegs
from caco.data.render import copy_to, to_device

FILES_AT_ONCE, PIXELS_AT_ONCE = 256, 2**27
"""What the GPU decodes at a time, at most: its memory holds so many pixels of three bytes beside the views."""


class File(NamedTuple):
    """An image as it was read."""

    number: int
    """Of the image in the source: in place of a broken one the next good one."""
    image: PlainJpeg | Decoded


class FromFiles:
    """Reads the files of the images in every step; the GPU decodes plain JPEG files, threads the others, and it renders all.

    Views of pictures of more than NEVER_SHRUNK pixels differ a little from `FromSource`'s, which decodes these smaller.
    """

    def __init__(
        self, source: EncodedSource, views: RandomViews, broken: BrokenImages, device: torch.device, compiled: bool
    ) -> None:
        """device: a GPU for which `nvjpeg.can_decode`. compiled: what follows the crop is (`DeviceViews`)."""
        self.source, self.views, self.broken, self.device = source, views, broken, device
        self.renders = [
            DeviceViews(augmentation, views.mean, views.std, compiled=compiled) for augmentation in views.augmentations
        ]
        self._refused: set[int] = set()
        """Images that the GPU cannot decode, as far as they are known."""

    def __call__(self, indices: np.ndarray, epoch: int, pool: ThreadPoolExecutor) -> list[Tensor]:
        """Return the views; in place of a broken image the next good one's. Waits for the device."""
        from caco.data.crop_kernel import crop_images  # Triton is not everywhere

        some = [indices[first : first + DECODED_CHUNK].tolist() for first in range(0, len(indices), DECODED_CHUNK)]
        files = [file for read in pool.map(lambda few: [self._read(index) for index in few], some) for file in read]
        heights, widths = (np.array([getattr(file.image, side) for file in files]) for side in ("height", "width"))
        drawn = self.views.draw(indices, heights, widths, epoch)
        on_device = [to_device(self.device, parameters, self.views.mean, self.views.std) for parameters in drawn]
        shapes = [(len(files), 3, augmentation.size, augmentation.size) for augmentation in self.views.augmentations]
        crops = [torch.empty(shape, device=self.device, memory_format=torch.channels_last) for shape in shapes]
        for part in _parts(files):
            pixels = self._decode(files[part])
            if pixels is None:
                return self(indices, epoch, pool)  # now that those it refuses are known
            for (rows, _), crop in zip(on_device, crops, strict=True):
                crop_images(pixels, rows[part], crop[part])
        return [
            render.of_crops(crop, rows, statistics)
            for render, crop, (rows, statistics) in zip(self.renders, crops, on_device, strict=True)
        ]

    def _read(self, index: int) -> File:
        def load(candidate: int) -> File:
            data, key = self.source.read(candidate), self.source.key(candidate)
            plain = None if candidate in self._refused else plain_jpeg(data, key)
            return File(candidate, plain or decode_rgb(data, key))

        return load_or_next(self.source, index, self.broken, load)

    def _decode(self, files: Sequence[File]) -> list[Tensor] | None:
        """Return each image, uint8 [3, H, W], on the device; None if the GPU refuses any, which is noted."""
        plain = [file.image.data for file in files if isinstance(file.image, PlainJpeg)]
        decoded = iter(decode_jpegs(plain, self.device) if plain else [])
        images = []
        for number, image in files:
            if isinstance(image, Decoded):
                images.append(copy_to(self.device, torch.from_numpy(image.pixels).permute(2, 0, 1).contiguous()))
                continue
            pixels = next(decoded)
            if pixels is not None and pixels.shape[1:] == (image.height, image.width):
                images.append(pixels)
            else:
                self._refused.add(number)
        return images if len(images) == len(files) else None


def _parts(files: Sequence[File]) -> Iterator[slice]:
    """Yield which files are decoded at a time."""
    first, pixels = 0, 0
    for number, file in enumerate(files):
        own = file.image.height * file.image.width
        if number > first and (number - first == FILES_AT_ONCE or pixels + own > PIXELS_AT_ONCE):
            yield slice(first, number)
            first, pixels = number, 0
        pixels += own
    yield slice(first, len(files))
