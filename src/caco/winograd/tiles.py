"""From maps to transformed tiles and back, compiled (numba): what is linear in Winograd's convolution.

Maps are [B, H, W, C]. Every 4 × 4 pixels of an output are a tile; it needs the 6 × 6 pixels of the input around it (with
stride 2, 9 × 9), beyond the border zero. Of a tile, the transforms of rows and columns make 36 (81) products' factors,
for each channel: its places. Tiles lie as `products.py` has matrices: for each place there is a matrix of tiles and
channels, in panels of channels. The way back is the transpose of the way there, so each is the other's gradient.
Python's types mean nothing to numba, hence the no_type_check.
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np
from numba import njit

from caco.winograd.products import ROWS, panel_width, position
from caco.winograd.transforms import SIDE, back, inlined, there
from caco.winograd.vectors import BYTES, load, store, zeros

PIXELS, STEP, MARGIN = (6, 4, 0, 9, 4), (4, 4, 0, 8, 4), (1, 0, 0, 1, 0)
"""Of maps of each kind (`transforms.py`): pixels along a side of a tile, from a tile to the next, before the first pixel."""
CACHE_LINE = 64
"""Bytes."""


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def maps_to_tiles(kind, maps, first, last, tiles, room):
    """Fill the tiles with the transform of the maps of images `first` to `last`.

    tiles: flat, with room for so many tiles in each panel.
    """
    height, width, channels = maps.shape[1:]
    pixels, side, lanes = PIXELS[kind], SIDE[kind], BYTES // maps.itemsize
    patch, half = np.empty(81 * lanes, maps.dtype), np.empty(81 * lanes, maps.dtype)
    where, source, tile, distance = np.empty(81, np.int64), maps.reshape(-1), 0, from_place_to_place(maps, room)
    rows, columns = grid(kind, height, width)
    for image in range(first, last):
        for row in range(rows):
            for column in range(columns):
                locate(where, kind, image, row, column, height, width, channels)
                for channel in range(0, channels, lanes):
                    for pixel in range(pixels * pixels):
                        inside = where[pixel] >= 0
                        value = load(source, where[pixel] + channel) if inside else zeros(source)
                        store(patch, pixel * lanes, value)
                    for j in range(pixels):
                        there(kind, patch, j * lanes, pixels * lanes, half, j * lanes, pixels * lanes)
                    at = position(tile, channel, room, panel_width(maps.itemsize))
                    for i in range(side):
                        there(kind, half, i * pixels * lanes, lanes, tiles, at + i * side * distance, distance)
                tile += 1


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def tiles_to_maps(kind, tiles, room, maps, first, last):
    """Fill the maps of images `first` to `last` with the transpose of `maps_to_tiles`: where tiles overlap, sums."""
    height, width, channels = maps.shape[1:]
    pixels, side, lanes = PIXELS[kind], SIDE[kind], BYTES // maps.itemsize
    patch, half = np.empty(81 * lanes, maps.dtype), np.empty(81 * lanes, maps.dtype)
    where, target, tile, distance = np.empty(81, np.int64), maps.reshape(-1), 0, from_place_to_place(maps, room)
    rows, columns = grid(kind, height, width)
    overlap = pixels > STEP[kind]
    for image in range(first, last):
        if overlap:
            maps[image] = 0
        for row in range(rows):
            for column in range(columns):
                locate(where, kind, image, row, column, height, width, channels)
                for channel in range(0, channels, lanes):
                    at = position(tile, channel, room, panel_width(maps.itemsize))
                    for j in range(side):
                        back(kind, tiles, at + j * distance, side * distance, half, j * lanes, side * lanes)
                    for i in range(pixels):
                        back(kind, half, i * side * lanes, lanes, patch, i * pixels * lanes, lanes)
                    for pixel in range(pixels * pixels):
                        to = where[pixel] + channel
                        if where[pixel] >= 0:
                            value = load(patch, pixel * lanes)
                            store(target, to, value + load(target, to) if overlap else value)
                tile += 1


@inlined
@no_type_check
def locate(where, kind, image, row, column, height, width, channels):
    """Fill in where the pixels of a tile are in the flat maps, beyond the border -1."""
    pixels = PIXELS[kind]
    top, left = row * STEP[kind] - MARGIN[kind], column * STEP[kind] - MARGIN[kind]
    for i in range(pixels):
        for j in range(pixels):
            y, x = top + i, left + j
            inside = 0 <= y < height and 0 <= x < width
            where[i * pixels + j] = ((image * height + y) * width + x) * channels if inside else -1


@inlined
@no_type_check
def grid(kind, height, width):
    """Return the rows and columns of tiles."""
    step = STEP[kind]
    return (height + step - 1) // step, (width + step - 1) // step


@inlined
@no_type_check
def from_place_to_place(maps, room):
    """Return the numbers from one place's matrix to the next: an odd number of cache lines, lest all use the same few."""
    line = CACHE_LINE // maps.itemsize
    return (room * maps.shape[3] // line | 1) * line


@inlined
@no_type_check
def room_for(tiles):
    """Return the rows of a panel of so many tiles: an odd number, for the same reason."""
    return (tiles + ROWS - 1) // ROWS * ROWS | 1
