"""JPEG files decoded on an NVIDIA GPU, by nvJPEG, which torchvision brings; GPUs of data centres have an engine for it.

Its pixels differ from libjpeg-turbo's by some levels of 255: it rounds in another order, and smooths colours that are
stored at half the size in another way.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from caco.data.decode import decode_rgb
from caco.own_kernels import suits_kernels, works

MOST_TRIES = 3
"""Of decoding into memory that is not fresh: another thread may take some meanwhile."""
LARGEST_DIFFERENCE = 4.0
"""Of smooth pictures' pixels between both decoders, on average, in levels of 255."""

# torchvision (from 0.29 on) says at each call that TorchCodec will do it one day.
warnings.filterwarnings("ignore", "The image decoding and encoding capabilities of TorchVision", append=True)


def decode_jpegs(files: Sequence[bytes], device: torch.device) -> list[UInt8[Tensor, "3 H W"] | None]:
    """Return the pictures, RGB, on the device; None for a file that nvJPEG refuses. Waits for the device.

    Raises torch.OutOfMemoryError where it fails for another reason than a file: nvJPEG takes memory that torch has not taken.
    """
    try:
        return list(_decode(files, device))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # of all files, for a single one
        if len(files) > 1:
            middle = len(files) // 2
            return decode_jpegs(files[:middle], device) + decode_jpegs(files[middle:], device)
        torch.cuda.empty_cache()
        try:
            _decode([_smooth_jpeg(0, 60, 90)], device)
        except RuntimeError:
            raise torch.OutOfMemoryError(f"nvJPEG fails: {error}") from error
        return [None]


def _decode(files: Sequence[bytes], device: torch.device) -> Sequence[Tensor]:
    """Return the pictures. Raises RuntimeError where nvJPEG refuses one of them, or fails.

    Nothing may be left to do on the current stream when nvJPEG begins: its engine does not wait for kernels that still read
    from memory which was given back since (pytorch/vision#9606). Nor may what it writes to be fresh from the driver: the
    lower part of a picture in such memory was black, once (docs/performance.md). Then it is decoded anew, into the same, as long
    as that is so, MOST_TRIES times in all.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]
    pictures: list[Tensor] = []
    for _ in range(MOST_TRIES):
        pictures.clear()
        torch.cuda.current_stream(device).synchronize()
        before = _taken_from_driver(device)
        pictures += decode_jpeg(encoded, ImageReadMode.RGB, device)
        if _taken_from_driver(device) == before:
            break
    return pictures


def _taken_from_driver(device: torch.device) -> int:
    """Return how many times torch has taken memory from the driver."""
    return int(torch.cuda.memory_stats(device).get("segment.all.allocated", 0))


@lru_cache
def can_decode(device: torch.device) -> bool:
    """Return whether a device decodes and crops as the CPU does; where it should and does not, it is told. Waits for it."""

    def problem() -> str:
        from caco.data.crop_kernel import crop_images
        from caco.data.parameters import draw_parameters
        from caco.data.render import render_with_torch, to_device
        from caco.views import Augmentation

        files = [_smooth_jpeg(number, 60 + 20 * number, 90) for number in range(3)]
        pictures = [decode_rgb(data, "a picture").pixels for data in files]
        decoded = _decode(files, device)
        if [tuple(picture.shape[1:]) for picture in decoded] != [picture.shape[:2] for picture in pictures]:
            return "it changes the size of a picture"
        heights, only_crop = np.array([len(picture) for picture in pictures]), Augmentation.crop_and_flip(32)
        drawn = draw_parameters(only_crop, heights, 90, seed=0, epoch=0, indices=np.arange(3), view=0)
        plain = torch.empty(3, 3, 32, 32, memory_format=torch.channels_last)
        ours = torch.empty(3, 3, 32, 32, device=device, memory_format=torch.channels_last)
        render_with_torch(pictures, drawn, (0.0,) * 3, (1.0,) * 3, plain)
        crop_images(decoded, to_device(device, drawn, (0.0,) * 3, (1.0,) * 3)[0], ours)
        difference = 255 * float((ours.cpu() - plain).abs().mean())
        return "" if difference < LARGEST_DIFFERENCE else f"pixels deviate by {difference:.2g} of 255 from the CPU's"

    return suits_kernels(device) and works("JPEG files decoded by the GPU", problem)


def _smooth_jpeg(seed: int, height: int, width: int) -> bytes:
    colours = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()
