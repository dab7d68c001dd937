"""The views of small images on an NVIDIA GPU: one kernel, in Triton, of which each program makes one whole view.

The stages of `render.py`, which is the oracle, in the same order; an image's pixels stay on the chip from the crop to the
normalisation. Resizing and blurring are products with matrices, as there (tf32x3: exact to float32, on tensor cores). What an
image does not need is not computed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, UInt8
from torch import Tensor

from caco.data import parameters as p

COLUMNS = tl.constexpr(p.COLUMNS)
TOP, LEFT, HEIGHT, WIDTH = (tl.constexpr(column) for column in (p.TOP, p.LEFT, p.HEIGHT, p.WIDTH))
FLIP, ORDER, GRAY = tl.constexpr(p.FLIP), tl.constexpr(p.ORDER), tl.constexpr(p.GRAY)
SIGMA, SOLARIZE, HUE_SHIFT = tl.constexpr(p.SIGMA), tl.constexpr(p.SOLARIZE), tl.constexpr(p.HUE_SHIFT)
FACTORS = tl.constexpr(p.BRIGHTNESS_FACTOR)
"""Of the first three operations, one after the other."""
CONTRAST, SATURATION, HUE = tl.constexpr(p.CONTRAST), tl.constexpr(p.SATURATION), tl.constexpr(p.HUE)


def small_views(
    images: UInt8[Tensor, "B H W 3"],
    rows: Float[Tensor, "B columns"],
    statistics: Float[Tensor, "2 3 1 1"],
    size: int,
) -> Float[Tensor, "B 3 S S"]:
    """Return one view of each image, channels_last; all is on the device. Sides of 64 pixels at most: a program holds a view."""
    count, height, width, _ = images.shape
    views = torch.empty(
        (count, 3, size, size), dtype=torch.float32, device=images.device, memory_format=torch.channels_last
    )
    padded = [max(16, triton.next_power_of_2(side)) for side in (height, width, size)]
    _view[(count,)](*(images, rows, statistics, views, height, width, size), *padded, num_warps=8)
    return views


@triton.jit
def _view(
    images,
    rows,
    statistics,
    views,
    height,
    width,
    size,
    ROWS: tl.constexpr,
    ROW: tl.constexpr,
    SIZE: tl.constexpr,
):
    image = tl.program_id(0)
    row = rows + image * COLUMNS
    down = _resize_weights(tl.load(row + TOP), tl.load(row + HEIGHT), height, size, 0.0, ROWS, SIZE)
    right = tl.trans(
        _resize_weights(tl.load(row + LEFT), tl.load(row + WIDTH), width, size, tl.load(row + FLIP), ROW, SIZE)
    )
    pixels = images + image.to(tl.int64) * height * width * 3
    red = _crop(pixels, height, width, down, right, ROWS, ROW)
    green = _crop(pixels + 1, height, width, down, right, ROWS, ROW)
    blue = _crop(pixels + 2, height, width, down, right, ROWS, ROW)
    line, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    inside = (line < size) & (column < size)

    for stage in range(4):
        operation = tl.load(row + ORDER + stage).to(tl.int32)
        if operation == HUE:
            turns = tl.load(row + HUE_SHIFT)
            if turns != 0:
                red, green, blue = _shift_hue(red, green, blue, turns)
        else:
            factor = tl.load(row + FACTORS + operation)
            if factor != 1:
                gray = _luma(red, green, blue)
                mean = tl.sum(tl.where(inside, gray, 0.0)) / (size * size)
                partner = tl.where(operation == CONTRAST, mean, tl.where(operation == SATURATION, gray, 0.0))
                red = _blend(red, partner, factor)
                green = _blend(green, partner, factor)
                blue = _blend(blue, partner, factor)
    if tl.load(row + GRAY) > 0:
        red = _luma(red, green, blue)
        green = red
        blue = red
    sigma = tl.load(row + SIGMA)
    if sigma > 0:
        band = _band(sigma, size, SIZE)
        red = _both_ways(red, band)
        green = _both_ways(green, band)
        blue = _both_ways(blue, band)
    if tl.load(row + SOLARIZE) > 0:
        red = tl.minimum(red, 1 - red)
        green = tl.minimum(green, 1 - green)
        blue = tl.minimum(blue, 1 - blue)
    place = views + image.to(tl.int64) * size * size * 3 + (line * size + column) * 3
    tl.store(place, (red - tl.load(statistics)) / tl.load(statistics + 3), mask=inside)
    tl.store(place + 1, (green - tl.load(statistics + 1)) / tl.load(statistics + 4), mask=inside)
    tl.store(place + 2, (blue - tl.load(statistics + 2)) / tl.load(statistics + 5), mask=inside)


@triton.jit
def _resize_weights(start, length, extent, size, flip, EXTENT: tl.constexpr, SIZE: tl.constexpr):
    """[SIZE, EXTENT]: `render.resize_weights`, zero beyond both."""
    pixel = tl.arange(0, SIZE).to(tl.float32)
    pixel = tl.where(flip > 0, size - 1 - pixel, pixel)
    scale = length / size
    centre = (pixel + 0.5) * scale
    number = tl.arange(0, EXTENT)
    source = number.to(tl.float32) + 0.5 - start
    inside = (source > -0.5) & (source < length + 0.5) & (number < extent)
    distance = tl.abs(source[None, :] - centre[:, None]) / tl.maximum(scale, 1.0)
    weights = tl.where(inside[None, :], tl.maximum(1 - distance, 0.0), 0.0)
    total = tl.sum(weights, axis=1)
    return weights / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def _crop(pixels, height, width, down, right, ROWS: tl.constexpr, ROW: tl.constexpr):
    """One channel of an image, cropped and resized; pixels in 0-1."""
    line, column = tl.arange(0, ROWS)[:, None], tl.arange(0, ROW)[None, :]
    channel = tl.load(pixels + (line * width + column) * 3, mask=(line < height) & (column < width), other=0)
    lines = tl.dot(down, channel.to(tl.float32) / 255, input_precision="tf32x3")
    return tl.dot(lines, right, input_precision="tf32x3")


@triton.jit
def _luma(red, green, blue):
    return 0.299 * red + 0.587 * green + 0.114 * blue


@triton.jit
def _blend(channel, partner, factor):
    return tl.minimum(tl.maximum(factor * channel + (1 - factor) * partner, 0.0), 1.0)


@triton.jit
def _shift_hue(red, green, blue, turns):
    """`render.shift_hue`."""
    value = tl.maximum(tl.maximum(red, green), blue)
    chroma = value - tl.minimum(tl.minimum(red, green), blue)
    of_others = tl.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    sixth = tl.where(value == red, green - blue, of_others) + 6 * turns * chroma
    sixth = tl.where(sixth < 0, sixth + 6 * chroma, sixth)
    sixth = tl.where(sixth >= 6 * chroma, sixth - 6 * chroma, sixth)
    base = value - chroma
    red = base + tl.minimum(tl.maximum(tl.abs(sixth - 3 * chroma) - chroma, 0.0), chroma)
    green = base + tl.minimum(tl.maximum(2 * chroma - tl.abs(sixth - 2 * chroma), 0.0), chroma)
    blue = base + tl.minimum(tl.maximum(2 * chroma - tl.abs(sixth - 4 * chroma), 0.0), chroma)
    return red, green, blue


@triton.jit
def _band(sigma, size, SIZE: tl.constexpr):
    """[SIZE, SIZE]: what each pixel takes of each, by a Gaussian cut at ceil(3 sigma), edge pixels repeated outwards."""
    pixel = tl.arange(0, SIZE)
    band = tl.zeros([SIZE, SIZE], tl.float32)
    total = 0.0
    radius = tl.ceil(3 * sigma).to(tl.int32)
    for offset in range(-radius, radius + 1):
        steps = offset / sigma
        weight = tl.exp(-0.5 * steps * steps)
        source = tl.minimum(tl.maximum(pixel + offset, 0), size - 1)
        band += tl.where(source[:, None] == pixel[None, :], weight, 0.0)
        total += weight
    return band / total


@triton.jit
def _both_ways(channel, band):
    return tl.dot(tl.dot(band, channel, input_precision="tf32x3"), tl.trans(band), input_precision="tf32x3")
