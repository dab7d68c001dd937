"""What numba compiles, each part against plain products of matrices: transforms, tiles, products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("numba")

from caco.winograd import products, tiles, transforms

# Lavin & Gray 2015, F(4 x 4, 3 x 3)
INPUT = [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
]
FILTER = [
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
]
OUTPUT = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]

PAIRS = {  # what goes in; there, back
    "inputs": (6, transforms.inputs, transforms.inputs_back),
    "filters": (3, transforms.filters, transforms.filters_back),
    "outputs": (6, transforms.outputs, transforms.outputs_back),
    "inputs by two": (9, transforms.inputs_by_two, transforms.inputs_by_two_back),
    "filters by two": (3, transforms.filters_by_two, transforms.filters_by_two_back),
    "outputs by two": (9, transforms.outputs_by_two, transforms.outputs_by_two_back),
}


def matrix(transform, inputs: int) -> np.ndarray:
    """Return a transform as a matrix: what it makes of unit vectors."""
    return np.array(transform.py_func(tuple(np.eye(inputs))))


@pytest.mark.parametrize("name", PAIRS)
def test_the_way_back_is_the_transpose(name):
    inputs, there, back = PAIRS[name]
    forward = matrix(there, inputs)
    np.testing.assert_allclose(matrix(back, len(forward)), forward.T, atol=1e-15)


def test_transforms_are_the_papers():
    for name, expected in (("inputs", INPUT), ("filters", FILTER), ("outputs", OUTPUT)):
        np.testing.assert_allclose(matrix(PAIRS[name][1], PAIRS[name][0]), expected, atol=1e-15)


@pytest.mark.parametrize("stride", [1, 2])
def test_in_one_dimension_they_make_a_convolution(stride):
    end = "" if stride == 1 else " by two"
    of_input, of_filter, of_output = (
        matrix(PAIRS[k + end][1], PAIRS[k + end][0]) for k in ("inputs", "filters", "outputs")
    )
    for pixel in range(of_input.shape[1]):
        for tap in range(3):
            found = of_output @ (of_filter[:, tap] * of_input[:, pixel])
            expected = [float(stride * output + tap == pixel) for output in range(4)]
            np.testing.assert_allclose(found, expected, atol=1e-15)


KINDS = {
    transforms.INPUTS: "inputs",
    transforms.OUTPUTS: "outputs",
    transforms.INPUTS_BY_TWO: "inputs by two",
    transforms.OUTPUTS_BY_TWO: "outputs by two",
}
CHANNELS = 32


def places_of(kind: int, maps: np.ndarray) -> np.ndarray:
    """Return the transformed tiles [places, T, C], out of their panels."""
    rows, columns = tiles.grid(kind, maps)
    count = rows * columns * len(maps)
    room, places = tiles.room_for(count), transforms.SIDE[kind] ** 2
    distance = tiles.from_place_to_place(maps, room)
    flat = np.full(places * distance, np.nan)
    tiles.maps_to_tiles(kind, maps, 0, len(maps) * rows, flat, room)
    width = products.panel_width(8)
    matrices = flat.reshape(places, distance)[:, : room * CHANNELS].reshape(places, CHANNELS // width, room, width)
    return matrices[:, :, :count].swapaxes(1, 2).reshape(places, count, CHANNELS)


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_are_cut_out_and_transformed(kind):
    """Against torch, which cuts them out of padded maps."""
    maps = np.random.default_rng(0).normal(size=(2, 16, 24, CHANNELS))
    pixels, step, margin = tiles.PIXELS[kind], tiles.STEP[kind], tiles.MARGIN[kind]
    padded = F.pad(torch.from_numpy(maps).permute(0, 3, 1, 2), (margin,) * 4)
    cut = F.unfold(padded, pixels, stride=step).view(2, CHANNELS, pixels, pixels, -1).permute(2, 3, 0, 4, 1).numpy()
    inputs, there, back = PAIRS[KINDS[kind]]
    one = matrix(there, inputs) if margin else matrix(back, 4)
    expected = np.einsum("ik,klntc,jl->ijntc", one, cut, one).reshape(transforms.SIDE[kind] ** 2, -1, CHANNELS)
    np.testing.assert_allclose(places_of(kind, maps), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_go_back_by_the_transpose(kind):
    """Of maps that are no whole tiles."""
    draw = np.random.default_rng(0)
    maps, returned = draw.normal(size=(2, 2, 7, 13, CHANNELS))
    rows, columns = tiles.grid(kind, maps)
    count = 2 * rows * columns
    room = tiles.room_for(count)
    flat = np.zeros(transforms.SIDE[kind] ** 2 * tiles.from_place_to_place(maps, room))
    pull = draw.normal(size=flat.shape)
    tiles.maps_to_tiles(kind, maps, 0, 2 * rows, flat, room)
    tiles.tiles_to_maps(kind, pull, room, returned, 0, 2 * rows)
    np.testing.assert_allclose((flat * pull).sum(), (maps * returned).sum(), rtol=1e-12)


def in_panels(matrix: np.ndarray, room: int) -> np.ndarray:
    """Return a matrix as `products.py` has it, flat, each panel with room for so many rows; what is not filled is no number."""
    width = products.panel_width(matrix.itemsize)
    panels = np.full((matrix.shape[1] // width, room, width), np.nan, matrix.dtype)
    panels[:, : len(matrix)] = matrix.reshape(len(matrix), -1, width).swapaxes(0, 1)
    return panels.reshape(-1)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 32, 32), (13, 64, 32), (6, 32, 96), (20, 32, 576)])
def test_products(rows, columns, depth, dtype):
    """Rows that fill no block, terms that do not fit at a time; what is beyond the rows is read by nothing."""
    draw = np.random.default_rng(0)
    left, right = draw.normal(size=(rows, depth)).astype(dtype), draw.normal(size=(depth, columns)).astype(dtype)
    width, room = products.panel_width(left.itemsize), tiles.room_for(rows)
    result = np.full(columns * room, np.nan, dtype)
    products.multiply(
        in_panels(left, room), 0, room * width, in_panels(right, depth), 0, depth * width, result, 0, room * width,
        rows, columns, depth,
    )  # fmt: skip
    found = result.reshape(-1, room, width)[:, :rows].swapaxes(0, 1).reshape(rows, columns)
    assert error(found, left.astype(float) @ right) < 4 * np.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("add", [False, True])
def test_transposed_products(add, dtype):
    draw = np.random.default_rng(0)
    left, right = draw.normal(size=(13, 64)).astype(dtype), draw.normal(size=(13, 32)).astype(dtype)
    width, room = products.panel_width(left.itemsize), 19
    result = np.full(64 * 32, 1 if add else np.nan, dtype)
    products.multiply_transposed(
        in_panels(left, room), 0, room * width, in_panels(right, room), 0, room * width, result, 0, 64 * width,
        64, 32, 13, add,
    )  # fmt: skip
    found = result.reshape(-1, 64, width).swapaxes(0, 1).reshape(64, 32)
    assert error(found, left.T.astype(float) @ right + add) < 4 * np.finfo(dtype).eps
