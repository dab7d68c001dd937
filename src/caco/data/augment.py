"""Random views of images, and the fixed view of evaluation.

`draw_parameters` decides, `render_views` does: plain torch on any device, or a compiled kernel on CPUs, with the same
pixels to 1e-4 of full scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from caco.compiled_code import has_numba
from caco.data.parameters import ViewParameters, draw_parameters
from caco.data.render import copy_to, render_with_torch
from caco.own_kernels import works
from caco.views import Augmentation, Interpolation

__all__ = ["ViewParameters", "centre_view", "draw_parameters", "normalise", "render_views"]

LARGEST_DEVIATION = 1e-4
"""Mean deviation of compiled views from plain torch's, of full scale, that rounding explains."""
_EVERYTHING = Augmentation(
    size=24,
    area=(0.2, 1.0),
    flip_probability=0.5,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    jitter_probability=0.8,
    gray_probability=0.2,
    blur_probability=0.5,
    solarize_probability=0.5,
)
"""What compiled views are tried with."""

Images = UInt8[Tensor, "B H W 3"] | list[NDArray[np.uint8]]
"""One tensor on any device, or arrays of any sizes."""


def render_views(
    images: Images,
    parameters: ViewParameters,
    augmentation: Augmentation,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    out: Float[Tensor, "B 3 S S"] | None = None,
) -> Float[Tensor, "B 3 S S"]:
    """Render one view of each image: float32 [B, 3, S, S], S = augmentation.size, less mean, over std (of pixels in 0-1).

    By numba for images on the CPU where it is installed, else by torch. out: where to write the views. They come in memory
    format channels_last, and so must `out`.
    """
    if len(images) != len(parameters):
        raise ValueError(f"{len(images)} images, but parameters of {len(parameters)}")
    device = images.device if isinstance(images, Tensor) else torch.device("cpu")
    if out is None:
        shape = len(images), 3, augmentation.size, augmentation.size
        out = torch.empty(shape, device=device, memory_format=torch.channels_last)
    if len(images):
        choose_renderer(device)(images, parameters, mean, std, out)
    return out


Renderer = Callable[[Images, ViewParameters, Sequence[float], Sequence[float], Tensor], None]
"""Fills `out`, the last argument, float32 [B, 3, S, S], channels_last, on the images' device."""


def choose_renderer(device: torch.device) -> Renderer:
    """Return what renders views of images on this device."""
    return render_with_numba if device.type == "cpu" and has_numba() and _numba_renders() else render_with_torch


@lru_cache
def _numba_renders() -> bool:
    """Return whether compiled views are here what plain torch makes."""
    return works("compiled views", _problem_of_numba)


def _problem_of_numba() -> str:
    """Return how far compiled views of some noise are from torch's, "" where that is rounding."""
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (16, 48, 40, 3), dtype=np.uint8))
    drawn = draw_parameters(_EVERYTHING, 48, 40, seed=0, epoch=0, indices=np.arange(len(noise)), view=0)
    shape = len(noise), 3, _EVERYTHING.size, _EVERYTHING.size
    ours, plain = (torch.empty(shape, memory_format=torch.channels_last) for _ in range(2))
    render_with_numba(noise, drawn, (0.0,) * 3, (1.0,) * 3, ours)
    render_with_torch(noise, drawn, (0.0,) * 3, (1.0,) * 3, plain)
    deviation = float((ours - plain).abs().mean())  # not the largest: a pixel may be solarized in one of them only
    return "" if deviation < LARGEST_DEVIATION else f"they deviate by {deviation:.2g} of full scale from plain torch's"


def render_with_numba(
    images: Images,
    parameters: ViewParameters,
    mean: Sequence[float],
    std: Sequence[float],
    out: Float[Tensor, "B 3 S S"],
) -> None:
    """Fill `out` with one view of each image, all on the CPU: on the calling thread, without the GIL."""
    from caco.data.kernel.views import fill_views

    pixels = (
        np.ascontiguousarray(images.numpy())
        if isinstance(images, Tensor)
        else [np.ascontiguousarray(image) for image in images]
    )
    fill_views(pixels, parameters.table(), mean, std, out.permute(0, 2, 3, 1).numpy())


def centre_view(
    image: UInt8[np.ndarray, "H W 3"],
    resize: int,
    size: int,
    interpolation: Interpolation = "bilinear",
    squash: bool = False,
) -> UInt8[np.ndarray, "size size 3"]:
    """Return the fixed view of evaluation: the shorter side (squash: both) resized to `resize` pixels, then its middle.

    The pixels of torchvision's Resize and CenterCrop on a Pillow image, of which only the crop is computed (twice as
    fast from 500 x 375). Pillow may then take rows before columns, which rounds some pixels to the neighbouring value. An image
    that has its size already is returned itself, not a copy.
    Raises ValueError when size exceeds resize.
    """
    if size > resize:
        raise ValueError(f"a centre crop of {size} pixels does not fit in a shorter side of {resize}")
    height, width = image.shape[:2]
    if height == width == resize == size:
        return image
    shorter = min(height, width)
    resized_height, resized_width = int(resize * height / shorter), int(resize * width / shorter)
    if squash:
        resized_height = resized_width = resize
    top, left = round((resized_height - size) / 2), round((resized_width - size) / 2)
    down, right = height / resized_height, width / resized_width
    box = (left * right, top * down, (left + size) * right, (top + size) * down)
    resampling = Image.Resampling.BICUBIC if interpolation == "bicubic" else Image.Resampling.BILINEAR
    view = Image.fromarray(np.ascontiguousarray(image)).resize((size, size), resampling, box=box)
    return np.asarray(view)


def normalise(batch: UInt8[Tensor, "B H W 3"], mean: Sequence[float], std: Sequence[float]) -> Float[Tensor, "B 3 H W"]:
    """Return uint8 images as float32 [B, 3, H, W] in 0-1, less the mean, divided by the standard deviation."""
    pixels = batch.permute(0, 3, 1, 2).float() / 255
    centre, spread = (copy_to(batch.device, torch.tensor(values)).view(3, 1, 1) for values in (mean, std))
    return (pixels - centre) / spread
