"""The kernels of the bank, of LARS and of small views against plain torch, by Triton's interpreter, which needs no GPU.

It has no bfloat16, so factors are float32 here: the mathematics is compared. On a GPU: tests/train/test_gpu_results.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="torch brings Triton on Linux only")
INTERPRETED = Path(__file__).parent / "interpreted_kernels.py"


@pytest.mark.parametrize("part", ["bank", "lars", "views"])
def test_kernels_interpreted(part):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # is read when Triton is imported
    done = subprocess.run(
        [sys.executable, str(INTERPRETED), part], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert len(errors) >= 9
    assert {name: error for name, error in errors.items() if not error < 2e-6} == {}
