"""Random views of images, and the fixed view of evaluation.

`draw_parameters` decides, `render_views` does: plain torch on any device, or a compiled kernel on CPUs, with the same
pixels to 1e-4 of full scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from caco.config import ViewRecipe
from caco.data.parameters import ViewParameters, draw_parameters
from caco.data.render import copy_to, render_with_torch
from caco.errors import UsageError

__all__ = ["ViewParameters", "centre_view", "draw_parameters", "normalise", "render_views"]

Engine = Literal["auto", "torch", "numba"]


def render_views(
    images: UInt8[Tensor, "B H W 3"] | list[NDArray[np.uint8]],
    parameters: ViewParameters,
    recipe: ViewRecipe,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    engine: Engine = "auto",
    out: Float[Tensor, "B 3 S S"] | None = None,
) -> Float[Tensor, "B 3 S S"]:
    """Render one view of each image: float32 [B, 3, S, S], S = recipe.size, less mean, over std (of pixels in 0-1).

    images: one uint8 tensor [B, H, W, 3] on any device, or B uint8 arrays [H, W, 3] of any sizes. engine: torch, numba
    (CPU only, on the calling thread, without the GIL), or auto (numba for images on the CPU where it is installed).
    out: where to write the views. They come in memory format channels_last, and so must `out`.
    Raises UsageError when the engine cannot do it.
    """
    if len(images) != len(parameters):
        raise ValueError(f"{len(images)} images, but parameters of {len(parameters)}")
    device = images.device if isinstance(images, Tensor) else torch.device("cpu")
    if out is None:
        shape = len(images), 3, recipe.size, recipe.size
        out = torch.empty(shape, device=device, memory_format=torch.channels_last)
    if not len(images):
        return out
    if choose_engine(engine, device) == "torch":
        return out.copy_(render_with_torch(images, parameters, recipe.size, mean, std))
    from caco.data.kernel import render_with_numba

    table, target = parameters.table(), out.permute(0, 2, 3, 1).numpy()
    if isinstance(images, Tensor):
        render_with_numba(np.ascontiguousarray(images.numpy()), table, mean, std, target)
        return out
    for row, image in enumerate(images):
        one = slice(row, row + 1)
        render_with_numba(np.ascontiguousarray(image)[None], table[one], mean, std, target[one])
    return out


def choose_engine(engine: Engine, device: torch.device) -> Literal["torch", "numba"]:
    """Return the engine to use for images on this device. Raises UsageError for an engine that cannot be used."""
    installed = find_spec("numba") is not None
    if engine == "numba" and not installed:
        raise UsageError("The numba engine for views needs numba: pip install 'caco[fast]'.")
    if engine == "numba" and device.type != "cpu":
        raise UsageError(f"The numba engine for views works on the CPU, but the images are on {device}.")
    return "numba" if engine != "torch" and installed and device.type == "cpu" else "torch"


def centre_view(image: UInt8[np.ndarray, "H W 3"], resize: int, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Return the fixed view of evaluation: the shorter side resized to `resize` pixels, then its middle.

    The pixels of torchvision's Resize and CenterCrop on a Pillow image, of which only the crop is computed (twice as
    fast from 500 x 375). Pillow may then take rows before columns, which rounds some pixels to the neighbouring value.
    Raises ValueError when size exceeds resize.
    """
    if size > resize:
        raise ValueError(f"a centre crop of {size} pixels does not fit in a shorter side of {resize}")
    height, width = image.shape[:2]
    shorter = min(height, width)
    resized_height, resized_width = int(resize * height / shorter), int(resize * width / shorter)
    top, left = round((resized_height - size) / 2), round((resized_width - size) / 2)
    down, right = height / resized_height, width / resized_width
    box = (left * right, top * down, (left + size) * right, (top + size) * down)
    view = Image.fromarray(np.ascontiguousarray(image)).resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(view)


def normalise(batch: UInt8[Tensor, "B H W 3"], mean: Sequence[float], std: Sequence[float]) -> Float[Tensor, "B 3 H W"]:
    """Return uint8 images as float32 [B, 3, H, W] in 0-1, less the mean, divided by the standard deviation."""
    pixels = batch.permute(0, 3, 1, 2).float() / 255
    centre, spread = (copy_to(batch.device, torch.tensor(values)).view(3, 1, 1) for values in (mean, std))
    return (pixels - centre) / spread
