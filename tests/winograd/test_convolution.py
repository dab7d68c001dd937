"""Winograd's convolution against the direct one: results, gradients, rounding, threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from maps import maps_of, relative
from torch.nn import functional as F

from caco.winograd import convolution as module
from caco.winograd.convolution import WinogradConvolution, convolve, filters_back, transform_filters

pytest.importorskip("numba")
from caco.cpu_kernels.memory import LARGE

SHAPES = [(2, 64, 64, 32, 32), (3, 32, 64, 9, 6), (1, 64, 32, 4, 7), (250, 32, 32, 5, 1), (5, 32, 32, 1, 3)]
"""Images, channels in and out, height, width: whole tiles, parts of tiles, more images than a thread takes at a time."""


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_and_gradients_are_those_of_the_direct_convolution(shape, stride):
    torch.manual_seed(0)
    images, inputs, outputs, height, width = shape
    maps = maps_of(images, inputs, height, width).requires_grad_()
    weight = torch.randn(outputs, inputs, 3, 3, dtype=torch.float64, requires_grad=True)
    direct = F.conv2d(maps, weight, padding=1, stride=stride)
    winograd = convolve(maps, weight, stride)
    assert relative(winograd.detach(), direct.detach()) < 1e-13
    pull = torch.randn_like(direct)
    for found, true in zip(
        torch.autograd.grad(winograd, (maps, weight), pull),
        torch.autograd.grad(direct, (maps, weight), pull),
        strict=True,
    ):
        assert found.shape == true.shape and relative(found, true) < 1e-13


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_are_those_of_finite_differences(stride):
    torch.manual_seed(0)
    maps = maps_of(2, 32, 5, 4).requires_grad_()
    weight = torch.randn(64, 32, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(convolve, (maps, weight, stride), fast_mode=True)


def with_sums(result: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return result, torch.stack([result.sum((0, 2, 3)), result.square().sum((0, 2, 3))])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kind", ["stride 1", "stride 2", "stride 2, and one of 1 x 1"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_maps_are_read_with_factors_and_summed(shape, kind):
    """The same as a rectified normalisation in front of it, sums behind it, and the other convolution beside it."""
    torch.manual_seed(0)
    images, inputs, outputs, height, width = shape
    stride, two = (1 if kind == "stride 1" else 2), "1 x 1" in kind
    maps = maps_of(images, inputs, height, width).requires_grad_()
    weight = torch.randn(outputs, inputs, 3, 3, dtype=torch.float64, requires_grad=True)
    other = torch.randn(outputs, inputs, 1, 1, dtype=torch.float64, requires_grad=True)
    factors = torch.randn(2, inputs, dtype=torch.float64, requires_grad=True)
    read = F.relu(maps * factors[0][:, None, None] + factors[1][:, None, None])
    true = with_sums(F.conv2d(read, weight, padding=1, stride=stride))
    if two:
        true += with_sums(F.conv2d(read, other, stride=2))
    found = WinogradConvolution.apply(maps, weight, stride, factors, True, other if two else None)
    assert found[len(true) :] == (None,) * (5 - len(true))
    pulls = [torch.randn_like(tensor) for tensor in true]
    leaves = (maps, weight, factors, *([other] if two else []))
    some = [list(range(len(true))), *([number] for number in range(len(true)))]  # all, and each alone
    for pulled in some:
        gradients = [
            torch.autograd.grad(
                [results[number] for number in pulled],
                leaves,
                [pulls[number] for number in pulled],
                retain_graph=True,
                allow_unused=results is true,
                materialize_grads=results is true,
            )
            for results in (found, true)
        ]
        for one, exact in zip((*found[: len(true)], *gradients[0]), (*true, *gradients[1]), strict=True):
            assert one.shape == exact.shape
            assert float((one - exact).detach().norm()) <= 1e-12 * float(exact.detach().norm())


@pytest.mark.parametrize("wanted", ["maps and filters", "filters", "maps"])
@pytest.mark.parametrize("used", ["both", "the result", "what is carried"])
def test_what_it_carries_has_its_gradient_added(used, wanted):
    torch.manual_seed(0)
    leaves = maps_of(3, 32, 9, 6), maps_of(64, 32, 3, 3)
    for leaf, name in zip(leaves, ("maps", "filters"), strict=True):
        leaf.requires_grad_(name in wanted)
    wanted_leaves = [leaf for leaf in leaves if leaf.requires_grad]

    def gradients(result: torch.Tensor, carried: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss = 0 * sum(leaf.sum() for leaf in wanted_leaves)
        if used != "what is carried":
            loss = loss + result.sin().sum()
        if used != "the result":
            loss = loss + carried.cos().sum()
        return torch.autograd.grad(loss, wanted_leaves)

    result, *_, carried = WinogradConvolution.apply(*leaves, 1, None, False, None, True)
    assert torch.equal(carried, leaves[0])
    found, true = gradients(result, carried), gradients(F.conv2d(*leaves, padding=1), leaves[0])
    for one, exact in zip(found, true, strict=True):
        assert float((one - exact).norm()) <= 1e-12 * float(exact.norm())


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", [(9, 64, 64, 55, 57), (2, 256, 256, 8, 7)], ids=["maps", "filters"])
def test_what_is_large_is_written_past_the_caches(shape):
    images, inputs, outputs, height, width = shape
    torch.manual_seed(0)
    maps, weight = (
        maps_of(images, inputs, height, width).requires_grad_(),
        maps_of(outputs, inputs, 3, 3).requires_grad_(),
    )
    assert max(maps.nbytes, transform_filters(weight, 1).nbytes) >= LARGE > min(maps.nbytes, weight.nbytes)
    found, true = convolve(maps, weight), F.conv2d(maps, weight, padding=1)
    pull = torch.randn_like(true)
    assert relative(found, true) < 1e-12
    for one, exact in zip(
        *(torch.autograd.grad(result, (maps, weight), pull) for result in (found, true)), strict=True
    ):
        assert relative(one, exact) < 1e-12


@pytest.mark.parametrize("wanted", [(0,), (1,), (3,), (5,), (0, 5), (1, 3)])
def test_with_another_beside_it_only_what_is_asked_for_has_a_gradient(wanted):
    torch.manual_seed(0)
    given = [maps_of(2, 32, 9, 6), maps_of(64, 32, 3, 3), 2, torch.rand(2, 32).double(), True, maps_of(64, 32, 1, 1)]
    for number in wanted:
        given[number].requires_grad_()
    read = F.relu(given[0] * given[3][0][:, None, None] + given[3][1][:, None, None])
    true = F.conv2d(read, given[1], padding=1, stride=2).sin().sum() + F.conv2d(read, given[5], stride=2).cos().sum()
    expected = torch.autograd.grad(
        true, [given[number] for number in wanted], allow_unused=True, materialize_grads=True
    )
    found = WinogradConvolution.apply(*given)
    (found[0].sin().sum() + found[2].cos().sum()).backward()
    for number, exact in zip(wanted, expected, strict=True):
        assert relative(given[number].grad, exact) < 1e-12
    assert [number for number in (0, 1, 3, 5) if given[number].grad is not None] == list(wanted)


@pytest.mark.parametrize("shape", [(32, 20), (20, 32)])
def test_channels_that_fill_no_panel_are_refused(shape):
    """Compiled code would write beyond its arrays."""
    inputs, outputs = shape
    with pytest.raises(ValueError, match="channels must be multiples of"):
        convolve(maps_of(2, inputs, 6, 6), torch.randn(outputs, inputs, 3, 3, dtype=torch.float64))


@pytest.mark.parametrize("wanted", ["maps", "weight"])
def test_only_what_is_asked_for_has_a_gradient(wanted):
    torch.manual_seed(0)
    both = {"maps": maps_of(2, 32, 6, 6), "weight": torch.randn(32, 32, 3, 3, dtype=torch.float64)}
    both[wanted].requires_grad_()
    true = torch.autograd.grad(F.conv2d(*both.values(), padding=1).square().sum(), both[wanted])[0]
    convolve(*both.values()).square().sum().backward()
    assert relative(both[wanted].grad, true) < 1e-13
    assert [name for name, tensor in both.items() if tensor.grad is not None] == [wanted]


def test_rounding_is_that_of_float32_and_not_of_a_shorter_format():
    """cuDNN's float32 on a GPU is TensorFloat-32 by default, of 1e-3; bfloat16's is 4e-3."""
    torch.manual_seed(0)
    maps, weight = maps_of(4, 256, 8, 8).requires_grad_(), torch.randn(256, 256, 3, 3, dtype=torch.float64) / 48
    weight.requires_grad_()
    true = F.conv2d(maps, weight, padding=1)
    pull = torch.randn_like(true)
    expected = true.detach(), *torch.autograd.grad(true, (maps, weight), pull)
    short = [tensor.detach().float().requires_grad_() for tensor in (maps, weight)]
    for convolution in (convolve, lambda maps, weight: F.conv2d(maps, weight, padding=1)):
        found = convolution(*short)
        errors = [
            relative(one, other)
            for one, other in zip(
                (found.detach(), *torch.autograd.grad(found, short, pull.float())), expected, strict=True
            )
        ]
        assert max(errors) < 4e-6


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (32, 32)])
def test_transposed_filters_are_those_of_the_transposed(stride, shape):
    weight = torch.randn(*shape, 3, 3)
    found = transform_filters(weight, stride, transposed=True)[:, : shape[0] * shape[1]]
    assert torch.equal(found, transform_filters(weight.transpose(0, 1), stride)[:, : shape[0] * shape[1]])


@pytest.mark.parametrize("stride", [1, 2])
def test_filters_go_back_by_the_transpose_of_a_sum(stride):
    torch.manual_seed(0)
    weight = torch.randn(64, 32, 3, 3, dtype=torch.float64)
    there = transform_filters(weight, stride)
    there[:, 64 * 32 :] = 0  # nothing is in there, nor is it read
    pull = torch.randn(3, *there.shape, dtype=torch.float64)
    torch.testing.assert_close((there * pull.sum(0)).sum(), (weight * filters_back(pull, stride, 64, 32)).sum())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(wrong):
    """In a pixel, or in the gradient: in all that the direct convolution makes not finite, and some of its neighbours."""
    maps = torch.ones(1, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    maps[0, 1, 2, 3] = wrong
    maps.requires_grad_()
    weight = torch.ones(32, 32, 3, 3, requires_grad=True)
    direct, winograd = F.conv2d(maps, weight, padding=1), convolve(maps, weight)
    assert not winograd[~direct.isfinite()].isfinite().any()
    pull = torch.ones_like(direct)
    pull[0, 0, 5, 5] = wrong
    for one, other in zip(
        torch.autograd.grad(direct, (maps, weight), pull),
        torch.autograd.grad(winograd, (maps, weight), pull),
        strict=True,
    ):
        assert not other[~one.isfinite()].isfinite().any()


def test_threads_change_rounding_only_and_torchs_own_stay():
    torch.manual_seed(0)
    maps, weight = maps_of(64, 32, 8, 8).requires_grad_(), torch.randn(32, 32, 3, 3, dtype=torch.float64)
    weight.requires_grad_()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            result = convolve(maps, weight)
            found.append((result.detach(), *torch.autograd.grad(result.square().sum(), (maps, weight))))
            assert torch.get_num_threads() == threads
            of_a_new_thread: list[int] = []
            other = threading.Thread(target=lambda: of_a_new_thread.append(torch.get_num_threads()))  # noqa: B023
            other.start()
            other.join()
            assert of_a_new_thread == [threads]
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(relative(other, one) < 1e-13 for one, other in zip(found[0], others, strict=True))


COLD = """
import threading, torch
from caco.winograd.convolution import convolve
torch.set_num_threads(3)
maps = torch.randn(64, 32, 8, 8).contiguous(memory_format=torch.channels_last)
weight = torch.randn(32, 32, 3, 3)
results, numbers, start = [], [], threading.Barrier(4)
def work():
    start.wait()
    results.append(convolve(maps, weight))
    numbers.append(torch.get_num_threads())
threads = [threading.Thread(target=work) for _ in range(4)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
late = threading.Thread(target=lambda: numbers.append(torch.get_num_threads()))
late.start(); late.join()
assert len(results) == 4 and all(torch.equal(results[0], other) for other in results[1:])
print(numbers)
"""


def test_several_threads_may_be_the_first():
    """None of them, and no later one, is left with the single thread that those of the convolution have."""
    done = subprocess.run([sys.executable, "-c", COLD], capture_output=True, text=True)
    assert done.stdout == "[3, 3, 3, 3, 3]\n", done.stderr


@pytest.mark.usefixtures("threads")
def test_the_gradient_of_large_filters_takes_few_parts(monkeypatch):
    torch.manual_seed(0)
    maps, weight = maps_of(64, 32, 8, 8).requires_grad_(), torch.randn(32, 32, 3, 3, dtype=torch.float64)
    weight.requires_grad_()
    true = torch.autograd.grad(F.conv2d(maps, weight, padding=1).square().sum(), (maps, weight))
    monkeypatch.setattr(module, "MOST_GRADIENT_BYTES", 1)
    found = torch.autograd.grad(convolve(maps, weight).square().sum(), (maps, weight))
    assert all(relative(one, other) < 1e-13 for one, other in zip(found, true, strict=True))


PROGRAM = """
import hashlib, torch
from caco.winograd.convolution import convolve
torch.manual_seed(0)
maps = torch.randn(3, 64, 9, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
weight = torch.randn(32, 64, 3, 3, requires_grad=True)
result = convolve(maps, weight)
for tensor in (result.detach(), *torch.autograd.grad(result.square().sum(), (maps, weight))):
    print(hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest())
"""


def test_a_process_that_compiles_computes_what_one_does_that_need_not(tmp_path: Path):
    """Else the run of the first process would not be the one that a later process resumes."""
    variables = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    first, second = (
        subprocess.run(
            [sys.executable, "-c", PROGRAM], env=variables, check=True, capture_output=True, text=True
        ).stdout
        for _ in range(2)
    )
    assert list(tmp_path.rglob("*.nbi")) and len(first.split()) == 3 and first == second
