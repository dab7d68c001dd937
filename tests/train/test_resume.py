"""A run that is stopped anywhere and resumed is, to the last bit, the run that was never stopped. Real processes, killed."""

import contextlib
import io
import json
import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import Command
from PIL import Image

from caco.cli import main
from caco.distributed import launch

EPOCHS, IMAGES, BATCH, WARM_START = 5, 40, 8, 7
STEPS = EPOCHS * (IMAGES // BATCH)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of noisy pictures of different sizes (so that they are decoded as the run goes on), one broken."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        path = folder / ("bright" if number % 2 else "dark") / f"{number:03}.jpg"
        path.parent.mkdir(exist_ok=True)
        low = 120 if number % 2 else 0
        size = (20 + number % 5, 24, 3)
        Image.fromarray(generator.integers(low, low + 100, size, dtype=np.uint8)).save(path)
    (folder / "dark" / "006.jpg").write_bytes(b"not a picture")
    return folder


def pretrain(photos: Path, out: Path, *more: str) -> list[str]:
    return [
        *("pretrain", "--data", str(photos), "--out", str(out), "--epochs", str(EPOCHS)),
        *("--backbone", "test_resnet", "--views.size", "16"),
        *("--batch-size", str(BATCH), "--bank-size", "24", "--bank.warm-start-steps", str(WARM_START)),
        *("--encoder.projector", "16", "--encoder.embedding", "8", "--monitor.log-steps", "2", "--device", "cpu"),
        *("--monitor.knn-epochs", "2", "--monitor.checkpoint-minutes", "0", "--workers", "2", *more),
    ]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, here: another process than the stopped one, but not one more to start."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        status = main(arguments)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), error.getvalue())


@pytest.fixture(scope="module")
def uninterrupted(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = run(pretrain(photos, out))
    assert done.returncode == 0, done.stderr
    return out


def assert_equal_runs(one: Path, other: Path) -> None:
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    assert (one / "skipped.txt").read_text() == (other / "skipped.txt").read_text()
    assert (one / "export/backbone.safetensors").read_bytes() == (other / "export/backbone.safetensors").read_bytes()
    names = {path.name for path in (one / "checkpoints").iterdir()}
    assert names == {path.name for path in (other / "checkpoints").iterdir()} and "best.pt" in names
    for name in names:
        first, second = (torch.load(run / "checkpoints" / name, weights_only=True) for run in (one, other))
        assert_identical(first, second, name)


def assert_identical(one, other, where: str) -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_identical(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_identical(a, b, f"{where}/{number}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def begun(out: Path, process: Command, checkpoints_before: set[str]) -> bool:
    """Wait until the process has written a checkpoint of its own, or ended; return whether it still runs."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.returncode is None:
        if {path.name for path in (out / "checkpoints").glob("step-*.pt")} - checkpoints_before:
            return True
        time.sleep(0.005)
    return process.returncode is None


def test_killed_at_random_moments_many_times(photos, uninterrupted, tmp_path):
    """`kill -9` again and again, each time a random moment after the first new checkpoint, until a run comes through."""
    out, kills = tmp_path / "killed", 0
    generator = random.Random(time.time_ns())
    while kills < 40:
        before = {path.name for path in (out / "checkpoints").glob("step-*.pt")}
        resume = ["--resume"] if (out / "config.json").exists() and before else ["--overwrite"]
        process = Command(pretrain(photos, out, *resume))
        if begun(out, process, before) and kills < 4:
            time.sleep(generator.uniform(0, 0.25))
            process.kill()
        error = process.finish()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, error
        kills += 1
    assert kills >= 2, "the process was too quick to be killed"
    assert_equal_runs(uninterrupted, out)


@pytest.mark.parametrize("moment", ["config.json", "metrics.jsonl"])
def test_killed_before_the_first_checkpoint(photos, uninterrupted, tmp_path, moment):
    """`kill -9` as soon as the run's folder has its settings, or its first record: the same run begins anew."""
    out = tmp_path / "early"
    process = Command(pretrain(photos, out, "--monitor.checkpoint-minutes", "1000", "--monitor.knn-epochs", "5"))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not ((out / moment).exists() and (out / moment).stat().st_size):
        time.sleep(0.002)
    process.kill()
    process.finish()
    assert not list((out / "checkpoints").glob("*.pt")), "killed too late"
    again = ["pretrain", "--out", str(out), "--resume"]
    refused = run([*again, "--lr", "0.7"])
    assert refused.returncode == 2 and "--resume cannot change --lr 0.7" in refused.stderr
    done = run([*again, "--monitor.checkpoint-minutes", "0", "--monitor.knn-epochs", "2"])
    assert done.returncode == 0, done.stderr
    assert "had saved no checkpoint yet: it begins anew" in done.stderr
    assert_equal_runs(uninterrupted, out)


@pytest.mark.parametrize(
    ("number", "told"),
    [(signal.SIGTERM, "asked to stop (SIGTERM) at step "), (signal.SIGINT, "stopped by Ctrl-C at step ")],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_signals_save_first_and_resume_exactly(photos, uninterrupted, tmp_path, monkeypatch, number, told):
    out = tmp_path / "stopped"
    # No timed checkpoints: what is resumed from is what the signal saved, in the middle of an epoch.
    process = Command(pretrain(photos, out, "--monitor.checkpoint-minutes", "1000"))
    deadline = time.monotonic() + 120
    metrics = out / "metrics.jsonl"
    while time.monotonic() < deadline and not (metrics.exists() and b'"train"' in metrics.read_bytes()):
        time.sleep(0.002)
    process.send_signal(number)
    error = process.finish(60)
    assert process.returncode == 75, error
    assert "saved" in error and "--resume" in error and "Traceback" not in error
    assert told in error and told in (out / "train.log").read_text()
    saved = sorted((out / "checkpoints").glob("step-*.pt"))
    assert saved
    if number == signal.SIGTERM:  # a job of one task that SLURM starts again gives the same command
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        resumed = run(pretrain(photos, out, "--overwrite"))
    else:
        resumed = run(["pretrain", "--out", str(out), "--resume", "--monitor.checkpoint-minutes", "0"])
    assert resumed.returncode == 0, resumed.stderr
    assert_equal_runs(uninterrupted, out)


@pytest.mark.parametrize(
    "engine",
    [
        ("--engine.layout", "contiguous"),
        ("--engine.convolution", "winograd"),
        ("--engine.convolution", "winograd", "--precision", "bf16"),
    ],
)
def test_a_run_goes_on_as_it_was_computed(photos, tmp_path, engine):
    """A resume begins in the run's own layout; a run whose kNN check had changed it would go on with other sums."""
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    more = (*engine, "--backbone", "resnet10_narrow", "--views.size", "32")
    done = run(pretrain(photos, whole, *more))
    assert done.returncode == 0, done.stderr
    process = Command(pretrain(photos, out, *more))
    deadline = time.monotonic() + 120
    metrics = out / "metrics.jsonl"
    while time.monotonic() < deadline and not (metrics.exists() and b'"knn"' in metrics.read_bytes()):
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    error = process.finish(60)
    assert process.returncode == 75, error
    resumed = run(["pretrain", "--out", str(out), "--resume"])
    assert resumed.returncode == 0, resumed.stderr
    assert_equal_runs(whole, out)


def test_the_uninterrupted_run_is_complete(uninterrupted):
    records = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    by_kind = {kind: [r for r in records if r["kind"] == kind] for kind in ("warm start", "train", "epoch", "knn")}
    assert [r["step"] for r in by_kind["warm start"]] == [2, 4, 6, 7]
    assert len(by_kind["epoch"]) == EPOCHS and [r["epoch"] for r in by_kind["knn"]] == [1, 3, 4]
    assert by_kind["train"][-1]["step"] == STEPS
    assert (uninterrupted / "skipped.txt").read_text().startswith("dark/006.jpg\t")


def test_resume_of_a_finished_run_changes_nothing(photos, uninterrupted):
    before = (uninterrupted / "export/backbone.safetensors").read_bytes()
    done = run(["pretrain", "--out", str(uninterrupted), "--resume"])
    assert done.returncode == 0, done.stderr
    assert (uninterrupted / "export/backbone.safetensors").read_bytes() == before


def test_a_finished_run_needs_its_images_no_more(photos, uninterrupted, tmp_path, capfd, monkeypatch):
    """Nothing is left to do: it says so and where the backbone is, opens no image, and writes nothing."""
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(uninterrupted, moved)
    configuration = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**configuration, "data": str(tmp_path / "gone"), "out": str(moved)}))
    before = {path: path.read_bytes() for path in moved.rglob("*") if path.is_file() and path.name != ".lock"}
    resume = ["pretrain", "--out", str(moved), "--resume"]
    monkeypatch.setattr(launch, "START_METHOD", "spawn")  # what a fork server's children say is not captured here
    for more in ([], ["--distributed.processes", "2"]):
        assert main([*resume, *more]) == 0
        said = capfd.readouterr()  # of all processes
        assert said.err.count("the run is finished; nothing to do\n") == 1
        assert f"The backbone is {moved / 'export/backbone.safetensors'}." in said.out
    after = {path: path.read_bytes() for path in moved.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before
    refused = run([*resume, "--lr", "9"])
    assert refused.returncode == 2 and "--resume cannot change --lr 9.0" in refused.stderr


def test_resume_refuses_other_images(photos, uninterrupted, tmp_path):
    import shutil

    fewer, unfinished = tmp_path / "fewer", tmp_path / "run"
    shutil.copytree(photos, fewer)
    (fewer / "dark" / "000.jpg").unlink()
    shutil.copytree(uninterrupted, unfinished)
    (unfinished / "export" / "backbone.safetensors").unlink()
    done = run(pretrain(fewer, unfinished, "--resume"))
    assert done.returncode == 2 and "the same images" in done.stderr and "Traceback" not in done.stderr
