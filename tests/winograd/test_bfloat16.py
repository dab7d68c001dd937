"""bfloat16: how it is read, rounded, paired and multiplied, and what a convolution of such maps computes."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from maps import in_panels, maps_of, relative
from torch.nn import functional as F

pytest.importorskip("numba")

from numba import njit

from caco.cpu_kernels import bfloat16, pairs, processor, products
from caco.cpu_kernels.memory import LARGE
from caco.cpu_kernels.processor import BYTES
from caco.cpu_kernels.vectors import add_products, load, store, store_all, store_past_caches, zeros_all
from caco.winograd.convolution import WinogradConvolution, convolve

LANES = BYTES // 4


def rounded(numbers: np.ndarray) -> np.ndarray:
    """Return numbers as bfloat16, in uint16, by torch."""
    return torch.from_numpy(numbers.astype(np.float32)).bfloat16().view(torch.uint16).numpy()


def float32_of(numbers: np.ndarray) -> np.ndarray:
    return (numbers.astype(np.uint32) << 16).view(np.float32)


EDGES = [
    0.0,
    -0.0,
    1.0,
    1 + 2**-8,
    1 + 3 * 2**-8,
    -1 - 2**-8,
    1 + 2**-9,
    3.4e38,
    -3.4e38,
    np.inf,
    -np.inf,
    np.nan,
    -np.nan,
    1e-30,
]
"""Among them ties, which go to the even one, what becomes infinite, and what must stay so."""


@pytest.mark.parametrize("by_hand", [False, True], ids=["as the processor does", "by whole numbers"])
def test_it_is_rounded_as_by_torch_and_read_as_it_is(by_hand, monkeypatch):
    if by_hand:
        monkeypatch.setattr(bfloat16, "MULTIPLIES_PAIRS", False)

    @njit
    def there_and_back(numbers, short, past, again):
        for at in range(0, len(numbers), LANES):
            store(short, at, load(numbers, at))
            store_past_caches(past, at, load(numbers, at))
            store(again, at, load(short, at))

    draw = np.random.default_rng(0)
    numbers = np.concatenate([draw.normal(size=16 * LANES - len(EDGES)), EDGES]).astype(np.float32)
    line = np.empty(len(numbers) + 32, np.uint16)
    past = line[-(line.ctypes.data // 2) % 32 :][: len(numbers)]
    short, again = np.empty(len(numbers), np.uint16), np.empty(len(numbers), np.float32)
    there_and_back(numbers, short, past, again)
    expected, is_number = rounded(numbers), ~np.isnan(numbers)
    for found in (short, past):
        np.testing.assert_array_equal(found[is_number], expected[is_number])
    np.testing.assert_array_equal(again[is_number], float32_of(expected)[is_number])
    assert np.isnan(again[~is_number]).all()


def out_of_pairs(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and the upper half of each, as float32."""
    return float32_of((numbers & 0xFFFF).astype(np.uint16)), float32_of((numbers >> 16).astype(np.uint16))


@pytest.mark.parametrize("rows", [8, 7])
def test_pairs_are_of_neighbouring_rows_or_columns(rows):
    matrix, width = np.random.default_rng(0).normal(size=(rows, 64)).astype(np.float32), products.panel_width(4)
    room, short = 11, float32_of(rounded(matrix))
    target = np.full(3 + 64 * 6, 7, np.uint32)
    pairs.pair_rows(in_panels(matrix, room), 0, room * width, rows, 64, target[3:], 6 * width)
    low, high = out_of_pairs(target[3:].reshape(-1, 6, width)[:, : (rows + 1) // 2].swapaxes(0, 1).reshape(-1, 64))
    np.testing.assert_array_equal(low, short[::2])
    np.testing.assert_array_equal(high[: rows // 2], short[1::2])
    assert not high[rows // 2 :].any() and (target[:3] == 7).all()
    target = np.full(32 * room, 7, np.uint32)
    pairs.pair_columns(in_panels(matrix, room), 0, room * width, rows, 64, target, room * width // 2)
    low, high = out_of_pairs(target.reshape(-1, room, width // 2)[:, :rows].swapaxes(0, 1).reshape(rows, 32))
    np.testing.assert_array_equal(low, short[:, ::2])
    np.testing.assert_array_equal(high, short[:, 1::2])


@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 32, 32), (13, 64, 32), (20, 32, 1152)])
def test_products_of_pairs_are_those_of_rounded_numbers(rows, columns, depth):
    """Along columns of the left matrix and rows of the right one, and, transposed, along rows of both."""
    draw, width = np.random.default_rng(0), products.panel_width(4)
    left, right = (
        draw.normal(size=(rows, depth)).astype(np.float32),
        draw.normal(size=(depth, columns)).astype(np.float32),
    )
    room = rows // products.ROWS * products.ROWS + products.ROWS
    of_left, of_right = np.zeros(room * depth // 2, np.uint32), np.zeros(depth * columns // 2, np.uint32)
    pairs.pair_columns(in_panels(left, room), 0, room * width, rows, depth, of_left, room * width // 2)
    pairs.pair_rows(in_panels(right, depth), 0, depth * width, depth, columns, of_right, depth // 2 * width)
    result = np.full(columns * room, np.nan, np.float32)
    products.multiply(
        of_left, 0, room * width // 2, of_right, 0, depth // 2 * width, result, 0, room * width,
        rows, columns, depth // 2, False,
    )  # fmt: skip
    found = result.reshape(-1, room, width)[:, :rows].swapaxes(0, 1).reshape(rows, columns)
    true = float32_of(rounded(left)).astype(float) @ float32_of(rounded(right)).astype(float)
    assert np.linalg.norm(found - true) < 1e-6 * np.linalg.norm(true)

    of_left, of_right = (np.zeros((depth + 1) // 2 * each, np.uint32) for each in (64, columns))
    left, half = draw.normal(size=(depth - 1, 64)).astype(np.float32), depth // 2 * width
    for matrix, target in ((left, of_left), (right[1:], of_right)):
        pairs.pair_rows(in_panels(matrix, depth), 0, depth * width, depth - 1, matrix.shape[1], target, half)
    result = np.ones(64 * columns, np.float32)
    products.multiply_transposed(
        of_left, 0, half, of_right, 0, half, result, 0, 64 * width, 64, columns, depth // 2, True, False
    )
    found = result.reshape(-1, 64, width).swapaxes(0, 1).reshape(64, columns)
    true = float32_of(rounded(left)).astype(float).T @ float32_of(rounded(right[1:])).astype(float) + 1
    assert np.linalg.norm(found - true) < 1e-6 * np.linalg.norm(true)


def test_where_no_instruction_multiplies_pairs_others_do(monkeypatch):
    monkeypatch.setattr(bfloat16, "MULTIPLIES_PAIRS", False)

    @njit
    def multiply(left, right, result):
        sums = zeros_all(result, 4)  # of two rows
        for term in range(len(left) // 2):
            sums = add_products(sums, left, term, len(left) // 2, right, term * 2 * LANES)
        store_all(result, 0, LANES, sums)

    draw = np.random.default_rng(0)
    left, right = (draw.normal(size=size).astype(np.float32) for size in ((2, 10), (10, 2 * LANES)))
    halves = [rounded(matrix).astype(np.uint32) for matrix in (left, right)]
    of_left, of_right = halves[0][:, ::2] | halves[0][:, 1::2] << 16, halves[1][::2] | halves[1][1::2] << 16
    result = np.empty(4 * LANES, np.float32)
    multiply(of_left.ravel(), of_right.ravel(), result)
    true = float32_of(rounded(left)).astype(float) @ float32_of(rounded(right)).astype(float)
    np.testing.assert_allclose(result.reshape(2, -1), true, rtol=1e-5, atol=1e-5)


LARGE_MAPS = (50, 64, 64, 45, 47)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("by_pairs", [False, True])  # multiplied as the processor does
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(2, 64, 64, 32, 32), (3, 32, 64, 9, 6), (61, 64, 32, 5, 1), LARGE_MAPS], ids=str)
def test_a_convolution_of_such_maps(shape, stride, by_pairs, monkeypatch):
    """Forward the result is rounded once; backward what is multiplied is, too, and the transforms multiply that by some ten."""
    monkeypatch.setattr(processor, "MULTIPLIES_PAIRS", by_pairs)
    torch.manual_seed(0)
    images, inputs, outputs, height, width = shape
    maps = maps_of(images, inputs, height, width).bfloat16().requires_grad_()
    assert (maps.nbytes >= LARGE) == (shape == LARGE_MAPS)
    weight = torch.randn(outputs, inputs, 3, 3, requires_grad=True)
    exact = [tensor.detach().double().requires_grad_() for tensor in (maps, weight)]
    found, true = convolve(maps, weight, stride), F.conv2d(*exact, padding=1, stride=stride)
    pull = torch.randn_like(found)
    of_maps, of_weight = torch.autograd.grad(found, (maps, weight), pull, retain_graph=True)
    to_maps, to_weight = torch.autograd.grad(true, exact, pull.double())
    assert found.dtype == of_maps.dtype == torch.bfloat16 and of_weight.dtype == torch.float32
    assert relative(found, true) < 2.5e-3  # half of bfloat16's 2⁻⁸, at most
    assert relative(of_maps, to_maps) < (2.5e-2 if by_pairs else 2.5e-3)
    assert (4e-4 if by_pairs else 0) < relative(of_weight, to_weight) < (2.5e-2 if by_pairs else 1e-5)
    for leaf, both in ((maps, of_maps), (weight, of_weight)):
        (alone,) = torch.autograd.grad(found, leaf, pull, retain_graph=True)
        assert relative(alone, both.double()) < 1e-6  # parts of images may be others, and so sums


@pytest.mark.parametrize("wanted", [(0,), (1,), (3,), (5,), (0, 5), (1, 3)])
def test_with_another_beside_it_what_is_asked_for_has_its_gradient(wanted, monkeypatch):
    """Maps read with factors, and the convolution of 1 x 1 that meets them: an odd number of tiles in the last block."""
    monkeypatch.setattr(processor, "MULTIPLIES_PAIRS", True)
    torch.manual_seed(0)
    maps, weight, few = maps_of(7, 32, 9, 5).bfloat16(), torch.randn(64, 32, 3, 3), torch.randn(64, 32, 1, 1)
    given = [maps, weight, 2, torch.rand(2, 32).double(), True, few]
    exact = [each.double() if isinstance(each, torch.Tensor) else each for each in given]
    for number in wanted:
        given[number].requires_grad_()
        exact[number] = given[number].detach().double().requires_grad_()
    read = F.relu(exact[0] * exact[3][0][:, None, None] + exact[3][1][:, None, None])
    true = F.conv2d(read, exact[1], padding=1, stride=2), F.conv2d(read, exact[5], stride=2)
    found = WinogradConvolution.apply(*given)
    pulls = [torch.randn(true[0].shape).bfloat16().double() for _ in range(2)]
    ours, exactly = (
        torch.autograd.grad(
            sum((result.double() * pull).sum() for result, pull in zip(results, pulls, strict=True)),
            [tensors[number] for number in wanted],
        )
        for results, tensors in (((found[0], found[2]), given), (true, exact))
    )
    assert all(relative(one, other) < 3e-2 for one, other in zip(ours, exactly, strict=True))


FEATURES = {  # what numba is told: whether vectors are long, and pairs multiplied
    "NUMBA_ENABLE_AVX=0": (32, False),
    "NUMBA_CPU_NAME=haswell": (32, False),
    "NUMBA_CPU_NAME=generic NUMBA_CPU_FEATURES=+avx2,+avx512f": (64, False),
    "NUMBA_CPU_NAME=generic NUMBA_CPU_FEATURES=+avx512f,+avx512bf16": (64, True),
}


@pytest.mark.parametrize("told", FEATURES)
def test_what_numba_compiles_for_is_heeded(told):
    variables = {**os.environ, **dict(word.split("=", 1) for word in told.split())}
    program = "from caco.cpu_kernels.processor import *; print((BYTES, MULTIPLIES_PAIRS))"
    done = subprocess.run([sys.executable, "-c", program], env=variables, check=True, capture_output=True, text=True)
    assert done.stdout == f"{FEATURES[told]}\n"
