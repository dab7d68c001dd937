"""The views on a GPU: one graph, and plain torch where it cannot be compiled."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from renderers import render_by

from caco.config import Views
from caco.data.augment import draw_parameters, render_with_torch
from caco.data.compiled import DeviceViews

STATISTICS = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def test_the_views_are_one_graph_with_the_same_pixels() -> None:
    """Traced and run without a compiler, which would take half a minute here; in a process without shape checks."""
    program = """
import numpy, torch
from caco.config import Views
from caco.data.augment import draw_parameters
from caco.data.compiled import DeviceViews
from caco.data.render import make_views, to_device

images = torch.from_numpy(numpy.random.default_rng(0).integers(0, 256, (8, 20, 18, 3), dtype=numpy.uint8))
graph = torch.compile(make_views, backend="aot_eager", dynamic=False, fullgraph=True)
augmentation = Views(size=16).augmentations()[1]
stages = DeviceViews(augmentation, (0.0,) * 3, (1.0,) * 3, compiled=False).stages
for epoch in range(2):
    drawn = draw_parameters(augmentation, 20, 18, seed=0, epoch=epoch, indices=numpy.arange(8), view=1)
    work = images, *to_device(images.device, drawn, (0.0,) * 3, (1.0,) * 3), 16, stages
    assert torch.allclose(graph(*work), make_views(*work), atol=1e-5)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("view", [0, 1])
def test_stages_that_no_view_of_a_batch_needs_change_nothing(view: int) -> None:
    augmentation = Views(size=16).augmentations()[view]
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 20, 20, 3), dtype=np.uint8))
    render = DeviceViews(augmentation, *STATISTICS, compiled=False)
    for epoch in range(3):
        drawn = draw_parameters(augmentation, 20, 20, seed=0, epoch=epoch, indices=np.arange(40), view=view)
        for rows in (slice(0, 1), slice(1, 3), slice(0, 40)):
            ours = render(images[rows], drawn.rows(rows))
            theirs = render_by(render_with_torch, images[rows], drawn.rows(rows), augmentation, *STATISTICS)
            assert torch.allclose(ours, theirs, atol=1e-4)


def test_what_cannot_be_compiled_is_done_in_plain_torch_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    augmentation = Views(size=16).augmentations()[0]
    images = torch.zeros(2, 20, 20, 3, dtype=torch.uint8)
    drawn = draw_parameters(augmentation, 20, 20, seed=0, epoch=0, indices=[0, 1], view=0)
    render = DeviceViews(augmentation, *STATISTICS, compiled=True)

    def fail(*work: object) -> torch.Tensor:
        raise RuntimeError("no compiler here\nand a long explanation")

    render._compiled = fail
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(
                render(images, drawn), render_by(render_with_torch, images, drawn, augmentation, *STATISTICS)
            )
    (record,) = caplog.records
    assert record.getMessage() == "the views are not compiled, which is slower: RuntimeError: no compiler here"


def test_what_has_been_compiled_is_used_again_after_torch_refused_it_once(caplog: pytest.LogCaptureFixture) -> None:
    augmentation = Views(size=16).augmentations()[0]
    images = torch.zeros(2, 20, 20, 3, dtype=torch.uint8)
    drawn = draw_parameters(augmentation, 20, 20, seed=0, epoch=0, indices=[0, 1], view=0)
    render, calls = DeviceViews(augmentation, *STATISTICS, compiled=True), []

    def compiled(function: Callable[..., torch.Tensor], *work: object) -> torch.Tensor:
        calls.append(function)
        if len(calls) == 2:
            raise RuntimeError("another thread compiles")
        return function(*work)

    render._compiled = compiled
    plain = render_by(render_with_torch, images, drawn, augmentation, *STATISTICS)
    assert all(torch.equal(render(images, drawn), plain) for _ in range(3))
    assert len(calls) == 3 and not caplog.records


def test_views_stay_compiled_while_another_thread_compiles_a_network() -> None:
    """As the prefetching thread's do while the first step compiles the encoder; torch up to 2.11 refuses them meanwhile."""
    run = subprocess.run([sys.executable, "-c", MEANWHILE, "cpu", "aot_eager"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "not compiled" not in run.stderr


def test_as_many_sizes_as_one_likes_are_compiled_in_a_process() -> None:
    """Of one function torch keeps 8 graphs."""
    run = subprocess.run([sys.executable, "-c", MANY_SIZES], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "not compiled" not in run.stderr


MANY_SIZES = """
import torch
from caco.config import Views
from caco.data.augment import draw_parameters
from caco.data.compiled import DeviceViews

images, statistics = torch.zeros(2, 20, 20, 3, dtype=torch.uint8), ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
for size in range(8, 18):  # by the tracer alone: it is what keeps count
    augmentation = Views(size=size, jitter=0.0, blur=(0.0, 0.0)).augmentations()[0]
    render = DeviceViews(augmentation, *statistics, compiled=True, backend="eager")
    drawn = draw_parameters(augmentation, 20, 20, seed=0, epoch=0, indices=[0, 1], view=0)
    assert render(images, drawn).shape == (2, 3, size, size) and render._compiled is not None, size
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_views_are_compiled_on_a_gpu() -> None:
    """Of images too large for the kernel. In a process of its own: torch compiles nothing whose shapes are checked, and its
    warnings would be errors."""
    run = subprocess.run([sys.executable, "-c", MEANWHILE, "cuda", "inductor"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "Warning" not in run.stderr and "not compiled" not in run.stderr, run.stderr


MEANWHILE = """
import sys, threading
import numpy, torch
from caco.backbone import create_backbone
from caco.config import Views
from caco.data.augment import draw_parameters
from caco.data.compiled import DeviceViews
from caco.data.render import make_views, to_device
from caco.device import choose_device

device, backend = choose_device(sys.argv[1]), sys.argv[2]
statistics = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
images = torch.from_numpy(numpy.random.default_rng(0).integers(0, 256, (8, 80, 70, 3), dtype=numpy.uint8)).to(device)
augmentations = Views(size=16).augmentations()
renders = [DeviceViews(augmentation, *statistics, compiled=True, backend=backend) for augmentation in augmentations]

def views(epoch):
    for number, (augmentation, render) in enumerate(zip(augmentations, renders)):
        drawn = draw_parameters(augmentation, 80, 70, seed=0, epoch=epoch, indices=numpy.arange(8), view=number)
        work = images, *to_device(device, drawn, *statistics), 16, render.stages
        assert torch.allclose(render(images, drawn), make_views(*work), atol=1e-4)

views(0)
done, made, problems = threading.Event(), [], []

def prefetch():
    try:
        while not done.is_set():
            views(len(made))
            made.append(1)
    except BaseException as problem:
        problems.append(problem)

thread = threading.Thread(target=prefetch)
thread.start()
network = create_backbone("resnet10_narrow", 16).to(device)
network.compile(backend=backend, dynamic=False)
network(torch.randn(4, 3, 16, 16, device=device)).sum().backward()
done.set()
thread.join()
assert made and not problems, problems
assert all(render._compiled is not None for render in renders), "the compiled views were given up"
"""
