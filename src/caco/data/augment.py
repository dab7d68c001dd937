"""Random views of images, and the fixed view of evaluation.

`draw_parameters` decides, `render_views` does: plain torch on any device, or a compiled kernel on CPUs, with the same
pixels to 1e-4 of full scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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
from caco.data.render import render_with_torch
from caco.errors import UsageError

__all__ = ["ViewParameters", "centre_view", "draw_parameters", "normalise", "render_view_into", "render_views"]

Engine = Literal["auto", "torch", "numba"]


def render_views(
    images: UInt8[Tensor, "B H W 3"] | list[NDArray[np.uint8]],
    parameters: ViewParameters,
    recipe: ViewRecipe,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    engine: Engine = "auto",
    threads: int = 1,
) -> Float[Tensor, "B 3 S S"]:
    """Render one view of each image: float32 [B, 3, S, S], S = recipe.size, less mean, over std (of pixels in 0-1).

    images: one uint8 tensor [B, H, W, 3] on any device, or B uint8 arrays [H, W, 3] of any sizes. engine: torch, numba
    (CPU only), or auto (numba for images on the CPU where it is installed). threads: of the numba engine, without the
    GIL. Raises UsageError when the engine cannot do it.
    """
    if len(images) != len(parameters):
        raise ValueError(f"{len(images)} images, but parameters of {len(parameters)}")
    if not len(images):
        return torch.empty(0, 3, recipe.size, recipe.size, device=images.device if isinstance(images, Tensor) else None)
    if choose_engine(engine, images.device if isinstance(images, Tensor) else torch.device("cpu")) == "torch":
        return render_with_torch(images, parameters, recipe.size, mean, std)
    views = torch.empty(len(images), 3, recipe.size, recipe.size)
    table, target = parameters.table(), views.numpy()
    pixels = images.numpy() if isinstance(images, Tensor) else images

    def render(rows: slice) -> None:
        from caco.data.kernel import render_with_numba

        if isinstance(pixels, np.ndarray):
            render_with_numba(np.ascontiguousarray(pixels[rows]), table[rows], mean, std, target[rows])
            return
        for row in range(rows.start, rows.stop):
            image = np.ascontiguousarray(pixels[row])[None]
            render_with_numba(image, table[row : row + 1], mean, std, target[row : row + 1])

    edges = np.linspace(0, len(images), min(threads, len(images)) + 1).astype(int)
    parts = [slice(int(start), int(stop)) for start, stop in zip(edges[:-1], edges[1:], strict=True)]
    if len(parts) == 1:
        render(parts[0])
    else:
        with ThreadPoolExecutor(len(parts)) as pool:
            list(pool.map(render, parts))
    return views


def render_view_into(
    image: UInt8[np.ndarray, "H W 3"],
    parameters: ViewParameters,
    row: int,
    recipe: ViewRecipe,
    mean: Sequence[float],
    std: Sequence[float],
    out: Float[Tensor, "3 S S"],
) -> None:
    """Render one view of one image (by one row of the parameters) into `out`, contiguous float32 [3, S, S] on the CPU.

    For loaders that render in their own threads: the GIL is not held where numba is installed.
    """
    one = parameters.rows(slice(row, row + 1))
    if choose_engine("auto", out.device) == "torch":
        out.copy_(render_with_torch([image], one, recipe.size, mean, std)[0])
        return
    from caco.data.kernel import render_with_numba

    render_with_numba(np.ascontiguousarray(image)[None], one.table(), mean, std, out.numpy()[None])


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
    centre, spread = (torch.tensor(values, device=batch.device).view(3, 1, 1) for values in (mean, std))
    return (pixels - centre) / spread
