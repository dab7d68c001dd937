"""Views of encoded images by the GPU: threads of the CPU only read usual JPEG files (`makers.py` has the other makers).

Others they decode: also grey JPEG files, of which nvJPEG once left a part black (docs/performance.md), and progressive ones,
for which GPUs have no engine.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from caco.data.broken import BrokenImages
from caco.data.compiled import DeviceViews
from caco.data.decode import BrokenImage, Decoded, decode_rgb, plain_jpeg, upright_size
from caco.data.encoded import EncodedSource
from caco.data.load import load_or_next
from caco.data.makers import DECODED_CHUNK, RandomViews
from caco.data.nvjpeg import decode_jpegs
from caco.data.parameters import ViewParameters
from caco.data.render import copy_to, to_device

FILES_AT_ONCE, PIXELS_AT_ONCE = 256, 2**26
"""What is decoded at a time, at most: the GPU's memory holds so many pixels of three bytes beside the views."""
PROBES, MOST_OTHERS = 32, 0.2
"""Images that are looked at first, and which share of them may be other than JPEG files for a GPU."""


class File(NamedTuple):
    """An image as it was read."""

    number: int
    """Of the image in the source: in place of a broken one the next good one."""
    data: bytes
    height: int
    """Upright, in pixels."""
    width: int
    suits_gpu: bool
    """A JPEG file that the GPU decodes (`decode.PlainJpeg`)."""


class FromFiles:
    """Reads the files of the images in every step; the GPU decodes usual JPEG files, threads the others, and it renders all.

    Nothing is decoded smaller than it is, as `FromSource` does with pictures of more than NEVER_SHRUNK pixels.
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
        heights, widths = np.array([file.height for file in files]), np.array([file.width for file in files])
        drawn = self.views.draw(indices, heights, widths, epoch)
        shapes = [(len(files), 3, augmentation.size, augmentation.size) for augmentation in self.views.augmentations]
        crops = [torch.empty(shape, device=self.device, memory_format=torch.channels_last) for shape in shapes]
        for part in _parts(files):
            images = self._decode(files[part], pool)
            for row, image in enumerate(images, start=part.start):
                height, width = image.shape[1:]
                if (height, width) != (heights[row], widths[row]):  # another one's, for this one was broken
                    others = self.views.draw(indices[row : row + 1], height, width, epoch)
                    for parameters, other in zip(drawn, others, strict=True):
                        parameters.put(row, other)
            for parameters, crop in zip(drawn, crops, strict=True):
                crop_images(images, self._on_device(parameters.rows(part))[0], crop[part])
            del images  # before the next ones are there
        return [
            render.of_crops(crop, *self._on_device(parameters))
            for render, crop, parameters in zip(self.renders, crops, drawn, strict=True)
        ]

    def _on_device(self, parameters: ViewParameters) -> tuple[Tensor, Tensor]:
        return to_device(self.device, parameters, self.views.mean, self.views.std)

    def _read(self, index: int) -> File:
        def load(candidate: int) -> File:
            data, key = self.source.read(candidate), self.source.key(candidate)
            plain = None if candidate in self._refused else plain_jpeg(data, key)
            height, width = upright_size(data, key) if plain is None else plain[1:3]
            return File(candidate, data, height, width, plain is not None and plain.suits_engine)

        return load_or_next(self.source, index, self.broken, load)

    def _decode(self, files: Sequence[File], pool: ThreadPoolExecutor) -> list[Tensor]:
        """Return each image, uint8 [3, H, W], on the device; of one that is broken the next good one."""
        images: dict[int, Tensor] = {}
        suited = [place for place, file in enumerate(files) if file.suits_gpu]
        decoded = decode_jpegs([files[place].data for place in suited], self.device) if suited else []
        for place, pixels in zip(suited, decoded, strict=True):
            if pixels is not None and pixels.shape[1:] == (files[place].height, files[place].width):
                images[place] = pixels
            else:
                self._refuse(files[place].number)
        others = [place for place in range(len(files)) if place not in images]
        by_threads = pool.map(self._by_thread, [files[place] for place in others])
        for place, image in zip(others, by_threads, strict=True):
            images[place] = copy_to(self.device, torch.from_numpy(image.pixels).permute(2, 0, 1).contiguous())
        return [images[place] for place in range(len(files))]

    def _by_thread(self, file: File) -> Decoded:
        def load(candidate: int) -> Decoded:
            data = file.data if candidate == file.number else self.source.read(candidate)
            return decode_rgb(data, self.source.key(candidate))

        return load_or_next(self.source, file.number, self.broken, load)

    def _refuse(self, number: int) -> None:
        if not self._refused:
            told = "the GPU cannot decode some JPEG files, which threads do instead; the first is %s"
            logging.getLogger(__name__).warning(told, self.source.key(number))
        self._refused.add(number)


def suits_files(source: EncodedSource) -> bool:
    """Return whether most images of a source are JPEG files for a GPU, by some of them."""
    suits = 0
    probes = np.unique(np.linspace(0, len(source) - 1, PROBES).astype(int)).tolist()
    for index in probes:
        try:
            found = plain_jpeg(source.read(index), source.key(index))
            suits += found is not None and found.suits_engine
        except BrokenImage:
            continue
    return suits >= (1 - MOST_OTHERS) * len(probes)


def _parts(files: Sequence[File]) -> Iterator[slice]:
    """Yield which files are decoded at a time."""
    first, pixels = 0, 0
    for number, file in enumerate(files):
        own = file.height * file.width
        if number > first and (number - first == FILES_AT_ONCE or pixels + own > PIXELS_AT_ONCE):
            yield slice(first, number)
            first, pixels = number, 0
        pixels += own
    yield slice(first, len(files))
