"""What a Python script may get wrong when it starts several processes."""

import subprocess
import sys

import pytest
import torch

from caco.distributed.launch import threads_each
from caco.distributed.world import own_cores

CALL = """
import numpy as np
import caco
from caco.data.arrays import ArraySource

images = np.zeros(({images}, 8, 8, 3), np.uint8)
{guard}
    data = ArraySource(images, np.arange({images}) % 2)
    result = caco.knn("pixels", data, size=8, device="cpu", workers=1, distributed={{"processes": 2}})
    print("judged", result["val_images"])
"""


def run(script: str, folder) -> subprocess.CompletedProcess[str]:
    path = folder / "script.py"
    path.write_text(script)
    return subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("images", [20, 20_000])  # less and more than what the system keeps for a process to read
def test_a_script_without_a_guard_is_told_so_once(images, tmp_path):
    done = run(CALL.format(images=images, guard="if True:"), tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1, done.stderr  # the caller's own, of an error that it does not catch
    assert 'put the call of caco under `if __name__ == "__main__":`' in done.stderr.splitlines()[-1]
    assert "judged" not in done.stdout


def test_a_script_with_a_guard(tmp_path):
    done = run(CALL.format(images=20, guard='if __name__ == "__main__":'), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("judged 4") == 1


SPARE = """
import numpy as np
from torch import nn
import caco

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 10)  # that the features do not go through

    def forward(self, view):
        return self.body(view).mean((2, 3))

if __name__ == "__main__":
    images = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
    small = dict(views={"size": 16}, encoder={"projector": 8, "embedding": 8}, bank={"warm_start_steps": 2}, workers=1)
    path = caco.pretrain(
        images, "run", backbone=Own(), epochs=2, batch_size=8, bank_size=16, device="cpu", distributed={"processes": 2}, **small
    )
    print("trained", path.name)
"""


def test_a_module_with_a_head_that_is_not_used_trains_in_two_processes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(SPARE, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "trained backbone.safetensors" in done.stdout


def test_processes_share_the_threads_they_may_have():
    """No more each than OMP_NUM_THREADS says (here 1), however many cores there are."""
    assert torch.get_num_threads() == 1 and threads_each(1) == 1
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(64)
        assert threads_each(1) == min(64, len(own_cores()))
        assert threads_each(10**6) == 1
    finally:
        torch.set_num_threads(before)
