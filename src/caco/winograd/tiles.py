"""From maps to transformed tiles and back, compiled (numba): what is linear in Winograd's convolution.

Every 4 × 4 pixels of an output are a tile; it needs the 6 × 6 pixels of the input around it (with stride 2, 9 × 9). Of a
tile, the transforms of rows and columns make 36 (81) products' factors, for each channel: its places. Tiles lie as
`products.py` has matrices: for each place there is a matrix of tiles and channels, in panels of channels. The way back is
the transpose of the way there, so each is the other's gradient. Maps are read and written in strips (`strips.py`).
Python's types mean nothing to numba, hence the no_type_check.
"""

from __future__ import annotations

from typing import no_type_check

from caco.compiled_code import kept
from caco.cpu_kernels.memory import CACHE_LINE, aligned, inlined
from caco.cpu_kernels.processor import BYTES
from caco.cpu_kernels.products import ROWS, panel_width, position
from caco.cpu_kernels.vectors import computed_bytes
from caco.winograd.strips import PIXELS, STEP, begin, begin_sums, cut_out, end_sums, grid, inside, put_back
from caco.winograd.transforms import SIDE, back, back_added, there


@kept()
@no_type_check
def maps_to_tiles(kind, maps, factors, others, first, last, strip, tiles, room):
    """Fill the tiles with the transform of the maps' rows of tiles `first` to `last`, counted through all images.

    factors, others: what the maps are read with (`cut_out`). tiles: flat, with room for so many tiles in each panel.
    """
    channels, pixels, side = maps.shape[3], PIXELS[kind], SIDE[kind]
    lanes, panel, distance = BYTES // tiles.itemsize, panel_width(tiles.itemsize), from_place_to_place(maps, room)
    row_size, half, tile = inside(kind, maps)[0], aligned(81 * lanes, tiles), 0
    for row in range(first, last):
        cut_out(kind, maps, factors, others, row, strip)
        for column in range(grid(kind, maps)[1]):
            for channel in range(0, channels, lanes):
                pixel, place = column * STEP[kind] * channels + channel, position(tile, channel, room, panel)
                there(kind, pixels, strip, pixel, channels, row_size, half, 0, lanes, pixels * lanes)
                there(kind, side, half, 0, pixels * lanes, lanes, tiles, place, side * distance, distance)
            tile += 1


@kept()
@no_type_check
def tiles_to_maps(kind, tiles, room, maps, added, factors, others, sums, first, last, strip):
    """Fill the maps' rows of tiles with the transpose of `maps_to_tiles`: where tiles overlap, sums.

    Rows come one after the other, an image's from its first on; the strip stays as it is between two calls. added: none, or maps
    that are added (`put_back`). sums: none, or [2, C], to which those of the maps are added (`put_back`).
    """
    channels, pixels, side = maps.shape[3], PIXELS[kind], SIDE[kind]
    lanes, panel, distance = BYTES // tiles.itemsize, panel_width(tiles.itemsize), from_place_to_place(maps, room)
    row_size, half, tile = inside(kind, maps)[0], aligned(81 * lanes, tiles), 0
    sums_now, count = aligned(3 * channels if len(sums) else 0, tiles), 0
    for row in range(first, last):
        if pixels > STEP[kind]:
            begin(kind, maps, row, strip)
        for column in range(grid(kind, maps)[1]):
            for channel in range(0, channels, lanes):
                pixel, place = column * STEP[kind] * channels + channel, position(tile, channel, room, panel)
                back(kind, side, tiles, place, distance, side * distance, half, 0, lanes, side * lanes)
                if pixels > STEP[kind]:
                    back_added(kind, pixels, half, 0, side * lanes, lanes, strip, pixel, row_size, channels)
                else:
                    back(kind, pixels, half, 0, side * lanes, lanes, strip, pixel, row_size, channels)
            tile += 1
        if row == first and len(sums):
            begin_sums(kind, strip, maps, others, row, sums_now)
        count += put_back(kind, strip, maps, added, factors, others, sums_now, row)
    if len(sums):
        end_sums(sums_now, count, len(others) > 0, sums)


@inlined
@no_type_check
def from_place_to_place(maps, room):
    """Return the numbers from one place's matrix to the next: an odd number of cache lines, lest all use the same few."""
    line = CACHE_LINE // computed_bytes(maps)
    return (room * maps.shape[3] // line | 1) * line


@inlined
@no_type_check
def room_for(tiles):
    """Return the rows of a panel of so many tiles: an odd number, for the same reason."""
    return (tiles + ROWS - 1) // ROWS * ROWS | 1
