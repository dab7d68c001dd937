"""The whole way from an image to its normalised view: the one function that Python calls, and all stages inlined in it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import no_type_check

import numpy as np
from numba import carray, types  # type: ignore[attr-defined]
from numba.extending import intrinsic
from numpy.typing import NDArray

from caco.compiled_code import kept
from caco.data import parameters as p
from caco.data.kernel import blur, colours, resize
from caco.data.kernel.compilation import CHUNK, OPTIONS, ZERO

SIGNATURE = types.void(
    types.int64[:, ::1],
    types.float32[:, ::1],
    types.float32[::1],
    types.float32[::1],
    types.float32[::1],
    types.float32[:, :, ::1],
)
"""The arguments of `render_rows`: places, table, scale, offset, scratch, views; all contiguous."""


@intrinsic
@no_type_check
def pixels_at(context, address):
    """Return a pointer to the bytes at an address: images of different sizes are no array that numba knows."""

    def generate(target, builder, signature, arguments):
        return builder.inttoptr(arguments[0], target.get_value_type(signature.return_type))

    return types.CPointer(types.uint8)(types.int64), generate


@kept(SIGNATURE, **OPTIONS)
@no_type_check
def render_rows(places, table, scale, offset, scratch, views):
    """Render one view of each image, of which `places`, [B, 3], has address, height and width, to float32 [B, S, 3 S]."""
    size = views.shape[1]
    pixels = size * size
    for sample in range(len(places)):
        parameters, view = table[sample], views[sample]
        image = carray(pixels_at(places[sample, 0]), (places[sample, 1], 3 * places[sample, 2]))
        sigma = parameters[p.SIGMA]
        margin = blur.blur_margin(sigma)
        plane_size = (size + 2 * margin) * size
        planes = scratch[: 3 * plane_size].reshape(3, plane_size)
        rest = scratch[3 * plane_size :]
        # One slice a plane: a slice of all three would not be contiguous, and no loop over it a vector loop.
        start, stop = margin * size, margin * size + pixels
        red, green, blue = planes[0, start:stop], planes[1, start:stop], planes[2, start:stop]
        resize.resize_crop(image, parameters, size, rest, red, green, blue)
        colours.change_colours(red, green, blue, parameters)
        solarize = parameters[p.SOLARIZE] > ZERO
        if sigma > ZERO:
            weights = np.empty(margin + blur.PAIRS, np.float32)
            radius = blur.gaussian(sigma, weights)
            block = max(1, CHUNK // size) * (size + 2 * margin)
            lines = rest[: 5 * block].reshape(5, block)
            blur.blur_and_finish(planes, size, margin, weights, radius, solarize, scale, offset, lines, view)
        else:
            colours.finish(red, green, blue, solarize, scale, offset, view.reshape(3 * pixels))


_scratch = threading.local()


def fill_views(
    images: NDArray[np.uint8] | list[NDArray[np.uint8]],
    table: NDArray[np.float32],
    mean: Sequence[float],
    std: Sequence[float],
    views: NDArray[np.float32],
) -> None:
    """Render one view of each image into `views`, on the calling thread, without the GIL.

    images: uint8 [B, H, W, 3], or [H, W, 3] each. table: ViewParameters.table(). views: float32 [B, S, S, 3]. All contiguous.
    """
    places, (batch, size) = _places(images), views.shape[:2]
    margin = blur.blur_margin.py_func(table[:, p.SIGMA].max())
    wide = size + 2 * margin
    # The planes, and behind them what only one stage at a time needs: one row of the source; the blur's lines.
    needed = 3 * wide * size + max(3 * int(places[:, 2].max()) + 3, 5 * max(1, CHUNK // size) * wide)
    scratch = getattr(_scratch, "buffer", None)
    if scratch is None or len(scratch) < needed:
        scratch = _scratch.buffer = np.empty(needed, dtype=np.float32)
    deviation = np.asarray(std, dtype=np.float32)
    scale, offset = 1 / deviation, -np.asarray(mean, dtype=np.float32) / deviation
    render_rows(places, table, scale, offset, scratch, views.reshape(batch, size, 3 * size))


def _places(images: NDArray[np.uint8] | list[NDArray[np.uint8]]) -> NDArray[np.int64]:
    """Return address, height and width of each image, int64 [B, 3]. Raises TypeError: compiled code would read anything."""
    for image in images if isinstance(images, list) else images[:1]:
        if not (image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.flags.c_contiguous):
            raise TypeError(f"an image must be uint8 [H, W, 3], in one piece, not {image.dtype} {list(image.shape)}")
    places = np.empty((len(images), 3), dtype=np.int64)
    if isinstance(images, list):
        for row, image in enumerate(images):
            places[row] = image.__array_interface__["data"][0], *image.shape[:2]
    else:
        places[:, 0] = images.__array_interface__["data"][0] + images.strides[0] * np.arange(len(images))
        places[:, 1:] = images.shape[1:3]
    return places
