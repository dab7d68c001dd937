"""The runner of the GPU's benchmarks: what a part has printed is kept however it ends, and it finds the package."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
spec = importlib.util.spec_from_file_location("gpu_benchmarks", BENCHMARKS / "gpu.py")
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)


def test_a_part_that_takes_too_long_leaves_what_it_has_printed(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    program = "import time, caco; print('begun with', caco.__file__); time.sleep(100)"
    result = gpu.run("slow", 5, [sys.executable, "-c", program], tmp_path / "slow.log")
    assert result["outcome"] == "stopped after 5 s"
    assert f"begun with {BENCHMARKS.parent / 'src' / 'caco' / '__init__.py'}" in (tmp_path / "slow.log").read_text()


def test_a_part_that_fails_is_named(tmp_path):
    result = gpu.run("bad", 20, [sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "bad.log")
    assert result["outcome"] == "failed with 3"


def test_all_parts_are_benchmarks_that_are_here():
    for name, (limit, command) in {**gpu.parts(False), **gpu.parts(True)}.items():
        assert limit > 0 and (BENCHMARKS / command.split()[0]).exists(), name


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_part_outlives_the_runner(tmp_path):
    """It would hold the GPU: a part is in a session of its own, which no signal to the runner reaches."""
    line = [sys.executable, BENCHMARKS / "gpu.py", "--device", "cpu", "--quick", "--out", tmp_path, "--only", "bank"]
    runner, part = subprocess.Popen(line, stdout=subprocess.PIPE, text=True), None
    assert "bank.py" in runner.stdout.readline()
    while part is None and runner.poll() is None:
        for child in Path(f"/proc/{runner.pid}/task/{runner.pid}/children").read_text().split():
            part = int(child) if b"bank.py" in Path(f"/proc/{child}/cmdline").read_bytes() else part
        time.sleep(0.05)
    runner.terminate()
    runner.communicate(timeout=20)
    assert runner.returncode == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(part, 0)
