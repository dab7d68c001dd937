"""From maps to transformed tiles and back, compiled (numba): what is linear in Winograd's convolution.

Maps are [B, H, W, C]. Every 4 × 4 pixels of an output are a tile; it needs the 6 × 6 pixels of the input around it, beyond
the border zero. Transformed tiles are [36, T, C], T counting them image by image and row by row. The way back is the
transpose of the way there, so each is the other's gradient. Python's types mean nothing to numba, hence the no_type_check.
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np
from numba import njit

# Sums may be reordered and multiply-adds fused: what vector code needs. Numbers that are not finite may come: inf or NaN
# in a pixel makes NaN of the tiles it is in.
OPTIONS = {"nogil": True, "fastmath": {"contract", "reassoc", "nsz"}, "error_model": "numpy"}

STEP, SIDE = 4, 6
"""Pixels from one tile to the next, and along a side of a transformed tile."""


@njit(forceinline=True, **OPTIONS)
@no_type_check
def weighted_sum(weights, row0, row1, row2, row3, row4, row5, result):
    """result = the sum of six rows of channels. One result at a time, or the compiler makes no vector code of it."""
    w0, w1, w2, w3, w4, w5 = weights[0], weights[1], weights[2], weights[3], weights[4], weights[5]
    for c in range(len(result)):
        result[c] = w0 * row0[c] + w1 * row1[c] + w2 * row2[c] + w3 * row3[c] + w4 * row4[c] + w5 * row5[c]


@njit(forceinline=True, **OPTIONS)
@no_type_check
def pixel(maps, image, row, column, zeros):
    """One pixel's channels; beyond the border zeros."""
    inside = 0 <= row < maps.shape[1] and 0 <= column < maps.shape[2]
    return maps[image, row, column] if inside else zeros


@njit(cache=True, **OPTIONS)
@no_type_check
def maps_to_tiles(maps, tiles, matrix, side):
    """Fill the tiles with matrix · pixels · matrixᵀ, pixels the `side` × `side` ones of each tile.

    matrix: [6, 6], its columns from `side` on zero.
    """
    images, height, width, channels = maps.shape
    half, zeros = np.empty((SIDE, SIDE, channels), maps.dtype), np.zeros(channels, maps.dtype)
    margin, tile = (side - STEP) // 2, 0
    for image in range(images):
        for top in range(-margin, height - margin, STEP):
            for left in range(-margin, width - margin, STEP):
                for j in range(side):
                    row0 = pixel(maps, image, top, left + j, zeros)
                    row1 = pixel(maps, image, top + 1, left + j, zeros)
                    row2 = pixel(maps, image, top + 2, left + j, zeros)
                    row3 = pixel(maps, image, top + 3, left + j, zeros)
                    row4 = pixel(maps, image, top + 4, left + j, zeros) if side > 4 else zeros
                    row5 = pixel(maps, image, top + 5, left + j, zeros) if side > 4 else zeros
                    for i in range(SIDE):
                        weighted_sum(matrix[i], row0, row1, row2, row3, row4, row5, half[i, j])
                for i in range(SIDE):
                    row4 = half[i, 4] if side > 4 else zeros
                    row5 = half[i, 5] if side > 4 else zeros
                    for j in range(SIDE):
                        weighted_sum(
                            matrix[j],
                            half[i, 0],
                            half[i, 1],
                            half[i, 2],
                            half[i, 3],
                            row4,
                            row5,
                            tiles[SIDE * i + j, tile],
                        )
                tile += 1


@njit(cache=True, **OPTIONS)
@no_type_check
def tiles_to_maps(maps, tiles, matrix, side):
    """Fill the maps with the sum of matrix · tile · matrixᵀ over tiles, each where its `side` × `side` pixels are.

    matrix: [6, 6], of which the first `side` rows count.
    """
    images, height, width, channels = maps.shape
    half, result = np.empty((SIDE, SIDE, channels), maps.dtype), np.empty(channels, maps.dtype)
    margin, tile = (side - STEP) // 2, 0
    for image in range(images):
        if side > STEP:
            maps[image] = 0
        for top in range(-margin, height - margin, STEP):
            for left in range(-margin, width - margin, STEP):
                for j in range(SIDE):
                    for i in range(side):
                        weighted_sum(
                            matrix[i],
                            tiles[j, tile],
                            tiles[SIDE + j, tile],
                            tiles[2 * SIDE + j, tile],
                            tiles[3 * SIDE + j, tile],
                            tiles[4 * SIDE + j, tile],
                            tiles[5 * SIDE + j, tile],
                            half[i, j],
                        )
                for i in range(max(0, -top), min(side, height - top)):
                    one = half[i]
                    for j in range(max(0, -left), min(side, width - left)):
                        target = maps[image, top + i, left + j]
                        if side > STEP:
                            weighted_sum(matrix[j], one[0], one[1], one[2], one[3], one[4], one[5], result)
                            for c in range(channels):
                                target[c] += result[c]
                        else:
                            weighted_sum(matrix[j], one[0], one[1], one[2], one[3], one[4], one[5], target)
                tile += 1
