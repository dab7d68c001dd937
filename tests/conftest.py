"""Shape and dtype annotations of the package are enforced in every test; outside the tests they cost nothing.

Where beartype is not installed (a lent GPU machine, which nothing can be fetched to) they are not, which is said.
"""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # the suite runs one process per core, and all must sum alike
for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
    del os.environ[name]  # that the suite itself is a job is nobody's business

from jaxtyping import install_import_hook

import caco

COMPILED = (
    "caco.bank_kernels",
    "caco.lars_kernels",
    "caco.data.crop_kernel",
    "caco.data.jpeg_header",
    "caco.data.view_kernel",
    "caco.data.kernel",
    *(
        f"caco.cpu_kernels.{name}"
        for name in ("bfloat16", "formulas", "memory", "pairs", "products", "slots", "vectors")
    ),
    *(f"caco.winograd.{name}" for name in ("filters", "joins", "passes", "strips", "tiles", "transforms")),
)
"""What Triton or numba compiles cannot be wrapped, which jaxtyping's release for Python 3.10 does in spite of no_type_check."""


def checked_modules() -> list[str]:
    """Return the modules whose annotations are enforced: all but COMPILED and packages, whose names would name all below."""
    root = Path(caco.__file__).parent
    names = [".".join(path.relative_to(root.parent).with_suffix("").parts) for path in root.rglob("*.py")]
    return [name for name in names if not name.startswith(COMPILED) and not name.endswith(".__init__")]


if find_spec("beartype"):
    install_import_hook(checked_modules(), "typechecker.checked")

import multiprocessing

import numpy as np
import pytest
import torch
from torch.utils._triton import has_triton

import caco.distributed.launch

# Processes that tests start by a call (not by a command) are forked from one that has imported everything, in which
# no threads run: importing torch and timm takes each of them some seconds of both cores. They have the environment of the
# first start, and what they print is not captured by a test's capfd.
if "forkserver" in multiprocessing.get_all_start_methods():
    caco.distributed.launch.START_METHOD = "forkserver"
    multiprocessing.get_context("forkserver").set_forkserver_preload(["caco.commands", "caco.train.run", "caco.judge"])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Let only tests that are marked with gpu see one; all others have the same machine everywhere, as have their processes."""
    if item.get_closest_marker("gpu"):
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        try:
            return (yield)
        finally:
            has_triton.cache_clear()


torch.cuda.is_available()  # before a test hides it: a process that has once been told of no GPU never finds one

SLOWEST = (
    "test_runs",
    "test_resume",
    "test_equivalence",
    "test_launch",
    "test_published_main",
    "test_heartbeat",
    "test_kernel",
)
"""Files that take longest, the longest first: begun last, one of them would keep a single core busy to the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slowest files first; all others stay as they are."""
    items.sort(key=lambda item: SLOWEST.index(item.path.stem) if item.path.stem in SLOWEST else len(SLOWEST))


def pytest_report_header() -> str:
    return "shapes: checked" if find_spec("beartype") else "shapes: NOT checked, beartype is not installed"


GOLDEN = os.path.join(os.path.dirname(__file__), "golden")


@pytest.fixture
def golden():
    """Return a function that reads a file of the reference's inputs and outputs: name → {array name: float64 tensor}."""

    def read(name: str) -> dict[str, torch.Tensor]:
        with np.load(os.path.join(GOLDEN, f"{name}.npz")) as file:
            return {key: torch.from_numpy(np.asarray(file[key])) for key in file}

    return read


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the largest deviation as a share of the reference's largest value."""
    return float((ours.detach() - reference).abs().max() / reference.abs().max())


@pytest.fixture(params=[1, 3], ids=["1 thread", "3 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Let torch, and compiled code of ours, have so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
