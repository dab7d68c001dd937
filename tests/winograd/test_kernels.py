"""What numba compiles, each part against plain products of matrices: transforms, tiles, products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from maps import in_panels
from torch.nn import functional as F

pytest.importorskip("numba")

from caco.cpu_kernels import products
from caco.cpu_kernels.memory import aligned
from caco.winograd import strips, tiles, transforms

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
    return np.array(transform(tuple(np.eye(inputs))))


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


def no_factors(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.empty((0, CHANNELS)), maps[:0]


def places_of(kind: int, maps: np.ndarray, factors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the transformed tiles [places, T, C], out of their panels."""
    rows, columns = strips.grid(kind, maps)
    count = rows * columns * len(maps)
    room, places = tiles.room_for(count), transforms.SIDE[kind] ** 2
    distance = tiles.from_place_to_place(maps, room)
    flat = np.full(places * distance, np.nan)
    tiles.maps_to_tiles(kind, maps, factors, others, 0, rows * len(maps), strips.strip_of(kind, maps, maps), flat, room)
    width = products.panel_width(8)
    matrices = flat.reshape(places, distance)[:, : room * CHANNELS].reshape(places, CHANNELS // width, room, width)
    return matrices[:, :, :count].swapaxes(1, 2).reshape(places, count, CHANNELS)


READ = ["as they are", "rectified", "with others"]


def as_read(maps: np.ndarray, factors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return what the docstring of `cut_out` says."""
    if not len(factors):
        return maps
    return maps + factors[0] * others + factors[1] if len(others) else np.maximum(factors[0] * maps + factors[1], 0)


def factors_and_others(read: str, maps: np.ndarray, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    if read == "as they are":
        return no_factors(maps)
    return draw.normal(size=(2, CHANNELS)), draw.normal(size=maps.shape) if read == "with others" else maps[:0]


@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_are_cut_out_and_transformed(kind, read):
    """Against torch, which cuts them out of padded maps: beyond the border is zero, whatever is done to the maps."""
    draw = np.random.default_rng(0)
    maps = draw.normal(size=(2, 16, 24, CHANNELS))
    given = factors_and_others(read, maps, draw)
    pixels, step, margin = strips.PIXELS[kind], strips.STEP[kind], strips.MARGIN[kind]
    padded = F.pad(torch.from_numpy(as_read(maps, *given)).permute(0, 3, 1, 2), (margin,) * 4)
    cut = F.unfold(padded, pixels, stride=step).view(2, CHANNELS, pixels, pixels, -1).permute(2, 3, 0, 4, 1).numpy()
    inputs, there, back = PAIRS[KINDS[kind]]
    one = matrix(there, inputs) if margin else matrix(back, 4)
    expected = np.einsum("ik,klntc,jl->ijntc", one, cut, one).reshape(transforms.SIDE[kind] ** 2, -1, CHANNELS)
    np.testing.assert_allclose(places_of(kind, maps, *given), expected, rtol=1e-12, atol=1e-12)


def put_back(
    kind: int,
    pull: np.ndarray,
    room: int,
    maps: np.ndarray,
    given: tuple,
    sums: np.ndarray,
    added: np.ndarray | None = None,
) -> None:
    """Fill the maps, a row of tiles at a time."""
    added = maps[:0] if added is None else added
    strip = strips.strip_of(kind, maps, maps)
    for row in range(len(maps) * strips.grid(kind, maps)[0]):
        flat = pull[row].copy()
        tiles.tiles_to_maps(kind, flat, room, maps, added, *given, sums, row, row + 1, strip)


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_go_back_by_the_transpose(kind):
    """Of maps that are no whole tiles; what rows of tiles have in common is left for the next call."""
    draw = np.random.default_rng(0)
    maps, returned = draw.normal(size=(2, 2, 7, 13, CHANNELS))
    rows, columns = strips.grid(kind, maps)
    room = tiles.room_for(columns)
    flat = np.zeros((2 * rows, transforms.SIDE[kind] ** 2 * tiles.from_place_to_place(maps, room)))
    pull = draw.normal(size=flat.shape)
    for row in range(2 * rows):
        strip = strips.strip_of(kind, maps, maps)
        tiles.maps_to_tiles(kind, maps, *no_factors(maps), row, row + 1, strip, flat[row], room)
    put_back(kind, pull, room, returned, no_factors(maps), np.empty((0, CHANNELS)))
    np.testing.assert_allclose((flat * pull).sum(), (maps * returned).sum(), rtol=1e-12)
    more = np.empty_like(returned)
    put_back(kind, pull, room, more, no_factors(maps), np.empty((0, CHANNELS)), added=maps)
    np.testing.assert_array_equal(more, returned + maps)


@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_taken_of_what_is_put_back(kind):
    draw = np.random.default_rng(0)
    plain, summed, rectified = draw.normal(size=(3, 2, 7, 13, CHANNELS))
    rows, columns = strips.grid(kind, plain)
    room, (factors, others) = tiles.room_for(columns), (draw.normal(size=(2, CHANNELS)), draw.normal(size=plain.shape))
    pull = draw.normal(size=(2 * rows, transforms.SIDE[kind] ** 2 * tiles.from_place_to_place(plain, room)))
    sums, of_factors = np.ones((2, 2, CHANNELS))
    put_back(kind, pull, room, plain, no_factors(plain), np.empty((0, CHANNELS)))
    put_back(kind, pull, room, summed, no_factors(plain), sums)
    put_back(kind, pull, room, rectified, (factors, others), of_factors)
    np.testing.assert_array_equal(summed, plain)
    np.testing.assert_allclose(sums - 1, [plain.sum((0, 1, 2)), np.square(plain).sum((0, 1, 2))], rtol=1e-10)
    through = np.where(factors[0] * others + factors[1] > 0, plain, 0)
    np.testing.assert_allclose(rectified, factors[0] * through, rtol=1e-12)
    np.testing.assert_allclose(of_factors - 1, [(through * others).sum((0, 1, 2)), through.sum((0, 1, 2))], rtol=1e-10)


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
        rows, columns, depth, False,
    )  # fmt: skip
    found = result.reshape(-1, room, width)[:, :rows].swapaxes(0, 1).reshape(rows, columns)
    assert error(found, left.astype(float) @ right) < 4 * np.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("add", "past"), [(False, False), (True, False), (False, True)])
def test_transposed_products(add, past, dtype):
    draw = np.random.default_rng(0)
    left, right = draw.normal(size=(13, 64)).astype(dtype), draw.normal(size=(13, 32)).astype(dtype)
    width, room = products.panel_width(left.itemsize), 19
    result = aligned(64 * 32, left)
    result[:] = 1 if add else np.nan
    products.multiply_transposed(
        in_panels(left, room), 0, room * width, in_panels(right, room), 0, room * width, result, 0, 64 * width,
        64, 32, 13, add, past,
    )  # fmt: skip
    found = result.reshape(-1, 64, width).swapaxes(0, 1).reshape(64, 32)
    assert error(found, left.T.astype(float) @ right + add) < 4 * np.finfo(dtype).eps
