"""The kernels of the bank, of LARS, of small views and of crops against plain torch, by Triton's interpreter, which needs no GPU.

It has no bfloat16, so factors are float32 here: the mathematics is compared. On a GPU: tests/train/test_gpu_results.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

from caco import fused
from caco.bank import Bank
from caco.slots import Unsharded

INTERPRETED, COMPILED = (Path(__file__).parent / f"{kind}_kernels.py" for kind in ("interpreted", "compiled"))


@pytest.mark.parametrize("part", ["bank", "searches", "lars", "views", "crops", "files"])
def test_kernels_interpreted(part):
    pytest.importorskip("triton", reason="torch brings Triton on Linux only")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # is read when Triton is imported
    done = subprocess.run(
        [sys.executable, str(INTERPRETED), part], capture_output=True, text=True, env=environment, check=False
    )
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("the interpreter of this Triton (up to 3.6) cannot do with this numpy (from 2.4 on)")
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert len(errors) >= 6
    assert {name: error for name, error in errors.items() if not error < 2e-6} == {}


def test_kernels_compile_and_fit_into_gpus_that_are_not_here(tmp_path):
    """Memory next to a processor: 227 KB of an H100, 99 KB of the GPUs of graphics cards."""
    pytest.importorskip("triton", reason="torch brings Triton on Linux only")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, str(COMPILED)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    needed = json.loads(done.stdout)
    assert len(needed["roomy"]) == 8 and len(needed["others"]) == 14
    assert max(needed["roomy"].values()) <= 227 * 1024
    assert max(needed["others"].values()) <= 99 * 1024


def rounded_logits(queries, weight, inverse_length):
    """Return logits as the kernel of the softmax has them: it rounds slots of any length to bfloat16, not their unit rows."""
    return queries.bfloat16().float() @ weight.bfloat16().float().T * inverse_length.T


def rounded_softmax(queries, weight, inverse_length, with_mean=True):
    logits = rounded_logits(queries, weight, inverse_length)
    largest = logits.amax(dim=1, keepdim=True)
    exponentials = (logits - largest).exp()
    return largest, exponentials.sum(dim=1, keepdim=True), exponentials @ (weight * inverse_length)


@pytest.mark.parametrize("length", [1.0, 1.3, 3.0])
def test_positives_are_rounded_as_the_kernels_round(length, monkeypatch):
    """Else a positive that is the nearest slot would not count as hit, whatever the length of the slots."""
    bank_kernels = pytest.importorskip("caco.bank_kernels", reason="needs Triton")
    kernels, asked = ModuleType("kernels"), []
    kernels.softmax = lambda *given, **options: asked.append(given) or rounded_softmax(*given, **options)
    kernels.logits = bank_kernels.logits
    monkeypatch.setattr(fused, "of_parts", lambda weight, products: kernels if products == torch.bfloat16 else None)
    torch.manual_seed(0)
    bank = Bank(500, 128)
    monkeypatch.setattr(Unsharded, "size", 2)  # where one process has all slots, another kernel does it
    bank.weight.data.copy_(length * F.normalize(bank.weight.data, dim=1))
    positives = torch.randint(500, (200, 2))
    queries = F.normalize(bank.weight.data[positives[:, 0]] / length + 0.1 * torch.randn(200, 128), dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        slots = bank.slots()
        hit = bank.loss(queries, slots, positives, torch.full((200, 2), 0.5)).hit
    nearest = rounded_logits(queries, *slots).argmax(dim=1, keepdim=True)
    assert asked and torch.equal(hit, nearest == positives)
    assert hit[:, 0].float().mean() > 0.7
