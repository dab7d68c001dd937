"""Crops of images of any sizes on an NVIDIA GPU, resized: one kernel for all, in Triton. `render.resize_weights` is the oracle."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from jaxtyping import Float, UInt8
from torch import Tensor

from caco.data import parameters as p
from caco.data.render import copy_to

COLUMNS = tl.constexpr(p.COLUMNS)
TOP, LEFT, HEIGHT, WIDTH = (tl.constexpr(column) for column in (p.TOP, p.LEFT, p.HEIGHT, p.WIDTH))
FLIP = tl.constexpr(p.FLIP)
BLOCK = 512
"""Pixels of a view that a program makes."""


def crop_images(
    images: Sequence[UInt8[Tensor, "3 H W"]], rows: Float[Tensor, "B columns"], out: Float[Tensor, "B 3 S S"]
) -> None:
    """Fill `out`, channels_last, with one crop of each image, resized and flipped, pixels in 0-1. All is on one device."""
    size = out.shape[-1]
    places = [(image.data_ptr(), image.shape[1], image.shape[2]) for image in images]
    table = copy_to(out.device, torch.from_numpy(np.array(places, dtype=np.int64)))
    _crop[(len(images), triton.cdiv(size * size, BLOCK))](table, rows, out, size, BLOCK=BLOCK, num_warps=4)


@triton.jit
def _crop(table, rows, views, size, BLOCK: tl.constexpr):
    """Some pixels of one crop: of each the sum of the source's pixels under a triangle, by their weights."""
    image = tl.program_id(0)
    row = rows + image * COLUMNS
    pixels = tl.load(table + 3 * image).to(tl.pointer_type(tl.uint8))
    height, width = tl.load(table + 3 * image + 1).to(tl.int32), tl.load(table + 3 * image + 2).to(tl.int32)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size * size
    line, column = place // size, place % size
    column = tl.where(tl.load(row + FLIP) > 0, size - 1 - column, column)
    top, lines = tl.load(row + TOP), tl.load(row + HEIGHT)
    left, columns = tl.load(row + LEFT), tl.load(row + WIDTH)
    down, right = tl.maximum(lines / size, 1.0), tl.maximum(columns / size, 1.0)
    centre_down, centre_right = (line + 0.5) * (lines / size), (column + 0.5) * (columns / size)
    first_line = tl.floor(top + centre_down - down + 0.5).to(tl.int32)
    first_column = tl.floor(left + centre_right - right + 0.5).to(tl.int32)
    red, green, blue, total = centre_down * 0, centre_down * 0, centre_down * 0, centre_down * 0
    for below in range(tl.ceil(2 * down).to(tl.int32) + 1):
        source_line = first_line + below
        weight_down = _weight(source_line, top, lines, centre_down, down, height)
        for beside in range(tl.ceil(2 * right).to(tl.int32) + 1):
            source_column = first_column + beside
            weight = weight_down * _weight(source_column, left, columns, centre_right, right, width)
            there = inside & (weight > 0)
            pointer = pixels + source_line * width + source_column
            red += weight * tl.load(pointer, mask=there, other=0).to(tl.float32)
            green += weight * tl.load(pointer + height * width, mask=there, other=0).to(tl.float32)
            blue += weight * tl.load(pointer + 2 * height * width, mask=there, other=0).to(tl.float32)
            total += weight
    scale = 1 / (255 * tl.where(total > 0, total, 1.0))
    pointer = views + (image.to(tl.int64) * size * size + place) * 3
    tl.store(pointer, red * scale, mask=inside)
    tl.store(pointer + 1, green * scale, mask=inside)
    tl.store(pointer + 2, blue * scale, mask=inside)


@triton.jit
def _weight(number, start, length, centre, reach, extent):
    """Of a source's line or column for a pixel around `centre`, counted from the crop's start."""
    source = number + 0.5 - start
    inside = (source > -0.5) & (source < length + 0.5) & (number >= 0) & (number < extent)
    return tl.where(inside, tl.maximum(1 - tl.abs(source - centre) / reach, 0.0), 0.0)
