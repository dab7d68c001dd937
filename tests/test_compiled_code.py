"""What numba compiles: whether it can be had, whether it is checked, and that no code of other sources is used."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import caco
from caco.compiled_code import SOURCES, hash_of_sources
from caco.data import augment
from caco.data.render import render_with_torch
from caco.winograd import agreement
from caco.winograd.network import use_winograd
from caco.winograd.residual import residual_block

pytest.importorskip("numba")

PACKAGE = Path(caco.__file__).parent

PAIRS = """
import numpy
from caco.cpu_kernels.pairs import pair_rows
from caco.cpu_kernels.products import panel_width
width = panel_width(4)
matrix = numpy.arange(4 * width, dtype=numpy.float32) / 3
target = numpy.zeros(2 * width, numpy.uint32)
pair_rows(matrix, 0, 4 * width, 4, width, target, 2 * width)
print(target.tolist())
"""

LOADED = """
import sys
import caco.cpu_kernels.slots, caco.data.jpeg_header, caco.data.kernel.views, caco.winograd.joins, caco.winograd.passes
print(*(module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "caco"), sep="\\n")
"""

VIEWS = """
import logging, sys
logging.basicConfig()
import numpy, torch
from caco.config import Views
from caco.data.augment import choose_renderer, draw_parameters, render_views
from caco.fused import of_search
from caco.winograd.network import can_use_winograd
augmentation = Views(size=24).augmentations()[0]
drawn = draw_parameters(augmentation, 40, 48, seed=0, epoch=0, indices=[0], view=0)
views = render_views(torch.zeros(1, 40, 48, 3, dtype=torch.uint8), drawn, augmentation, (0.5,) * 3, (0.2,) * 3)
assert views.shape == (1, 3, 24, 24)
print(choose_renderer(torch.device("cpu")).__name__, of_search(torch.ones(2**15, 4)), can_use_winograd())
"""


def run(program: str, **variables: str) -> subprocess.CompletedProcess:
    """Run a program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **variables}, capture_output=True, text=True, check=True
    )


def copy_of_package(folder: Path) -> Path:
    """Copy the package without what has been compiled."""
    return Path(shutil.copytree(PACKAGE, folder / "caco", ignore=shutil.ignore_patterns("__pycache__")))


def test_all_that_is_compiled_is_hashed(tmp_path):
    """Every file that numba is in, and every one of ours that such a file imports and that may hold a constant."""
    hashed = {path for pattern in SOURCES for path in PACKAGE.glob(pattern)}
    text = {path: path.read_text("utf-8") for path in PACKAGE.rglob("*.py")}
    assert {path for path, code in text.items() if "from numba" in code or "@kept(" in code} <= hashed
    loaded = {Path(line) for line in run(LOADED).stdout.splitlines()}
    others = (
        "__init__.py",
        "data/__init__.py",
        "compiled_code.py",
        "views.py",
    )  # views: for what is Python in `parameters`
    assert loaded <= hashed | {PACKAGE / name for name in others}
    copied, before = copy_of_package(tmp_path), hash_of_sources(PACKAGE)
    assert hash_of_sources(copied) == before
    for path in sorted(hashed):
        other = copied / path.relative_to(PACKAGE)
        other.write_text(text[path] + "\n", "utf-8")
        assert hash_of_sources(copied) != before
        other.write_text(text[path], "utf-8")


def test_code_of_another_source_is_not_used_even_if_no_time_tells(tmp_path):
    """numba looks at the file of a function alone, and at its time; here another file changes, and keeps its time."""
    copied = copy_of_package(tmp_path)
    variables = {"PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    before = run(PAIRS, **variables).stdout
    assert run(PAIRS, **variables).stdout == before
    other = copied / "cpu_kernels" / "bfloat16.py"
    stat, text = other.stat(), other.read_text("utf-8")
    assert "def pairs(builder: Any, low: Any, high: Any)" in text
    other.write_text(text.replace("builder: Any, low: Any, high: Any", "builder: Any, high: Any, low: Any"), "utf-8")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    swapped = [(pair >> 16) | (pair & 0xFFFF) << 16 for pair in json.loads(before)]
    assert json.loads(run(PAIRS, **variables).stdout) == swapped != json.loads(before)


def with_lost_gradient(maps):
    maps.register_hook(lambda gradient: gradient * float("nan"))
    return maps


@pytest.mark.parametrize(
    ("spoiled", "by"), [(lambda maps: maps * 1.01, "0.0"), (with_lost_gradient, "nan")], ids=["result", "gradients"]
)
def test_kernels_that_compute_something_else_are_not_used(spoiled, by, monkeypatch, caplog):
    """Torch's own convolutions take their place, and it is told."""
    maps = torch.randn(2, 64, 8, 8).contiguous(memory_format=torch.channels_last)
    layer = nn.Conv2d(64, 64, 3, padding=1)
    true = layer(maps)
    use_winograd(layer)
    assert layer(maps).sub(true).abs().amax() > 0  # of another rounding, so these are ours
    monkeypatch.setattr(agreement, "residual_block", lambda *given: spoiled(residual_block(*given)))
    agreement._agrees.cache_clear()
    try:
        assert torch.equal(layer(maps), true)
    finally:
        agreement._agrees.cache_clear()
    assert (
        f"Winograd's convolutions of torch.float32 are not used, which is slower: they deviate by {by}" in caplog.text
    )


def test_compiled_views_that_are_others_are_not_used(monkeypatch, caplog):
    def darker(images, parameters, mean, std, out):
        render_with_torch(images, parameters, mean, std, out)
        out *= 0.99

    monkeypatch.setattr(augment, "render_with_numba", darker)
    augment._numba_renders.cache_clear()
    try:
        assert augment.choose_renderer(torch.device("cpu")) is render_with_torch
    finally:
        augment._numba_renders.cache_clear()
    assert "compiled views are not used, which is slower: they deviate by 0.0" in caplog.text


@pytest.mark.parametrize("variables", [{"NUMBA_DISABLE_JIT": "1"}, {}])
def test_without_a_numba_that_works_all_is_plain_torch(tmp_path, variables):
    """It is there and cannot be imported, as with a version of numpy that it does not know; or is told not to compile."""
    if not variables:
        (tmp_path / "numba").mkdir()
        (tmp_path / "numba" / "__init__.py").write_text('raise ImportError("Numba needs NumPy 2.2 or less.")')
        variables = {"PYTHONPATH": str(tmp_path)}
    done = run(VIEWS, **variables)
    assert done.stdout.split() == ["render_with_torch", "None", "False"]
    told = done.stderr.count("numba is not used, which is slower: ImportError: Numba needs NumPy 2.2 or less.")
    assert told == ("PYTHONPATH" in variables)


HOMELESS = """
import os, pwd
pwd.getpwuid = lambda number: (_ for _ in ()).throw(KeyError(number))
from caco.data.jpeg_header import plain_size
import numpy
print(plain_size(numpy.zeros(99, numpy.uint8)))
"""


def test_a_user_without_a_home():
    """As in a container with --user 12345: there is no entry for it."""
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    done = subprocess.run([sys.executable, "-c", HOMELESS], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["(0,", "0,", "0)"], done.stderr


CHECKPOINTED = """
import logging
logging.basicConfig()
import torch
from caco.backbone import create_backbone
from caco.checkpointing import checkpoint_blocks
from caco.winograd.network import use_winograd
torch.manual_seed(0)
network = create_backbone("resnet18", 32).train()
checkpoint_blocks(network)
use_winograd(network)
with torch.autocast("cpu", dtype=torch.bfloat16, enabled=AUTOCAST):
    network(torch.randn(2, 3, 32, 32)).float().sum().backward()
from caco.winograd import agreement
print(agreement._agrees.cache_info().currsize, agreement.agrees(torch.bfloat16 if AUTOCAST else torch.float32))
"""


@pytest.mark.parametrize("autocast", [False, True])
def test_the_first_use_may_be_inside_a_checkpointed_block(autocast):
    """Whose hooks would take what the comparison keeps for its own gradient."""
    done = run(CHECKPOINTED.replace("AUTOCAST", str(autocast)))
    assert done.stdout.split() == ["1", "True"], done.stderr
    assert "not used" not in done.stderr


def test_the_comparison_leaves_random_numbers_alone():
    before = torch.get_rng_state()
    assert agreement._problem(torch.float32) == ""
    assert torch.equal(torch.get_rng_state(), before)
