"""Whole commands in many processes: the run of one process, however it is started, stopped and gone on with."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from caco.cli import main

EPOCHS, IMAGES, BATCH = 4, 41, 8  # one image is broken, and one is left over in every epoch
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
CACO = [sys.executable, "-m", "caco"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

# Weights of float32 runs, as a share of the largest of a tensor: sums in another order (2^-24 each), which 24 steps of
# training amplify. Measured: 4e-5. Only with small rates (below): with the recipe's, a batch of 8 flips the choice of a
# positive after 7 steps, and from there two runs differ. test_equivalence.py has the same in float64, to 1e-13.
TOLERANCE = 1e-3
CALM = (
    *("--optimizer.name", "lars", "--no-encoder.centred", "--encoder.key-momentum", "0.99", "--lr", "0.003"),
    *("--optimizer.final-lr", "0.003", "--optimizer.warmup-epochs", "10", "--bank.lr", "3", "--bank.final-lr", "3"),
    *("--bank.temperature", "0.08", "--bank.slot-temperature", "0.08"),
    *("--bank.warm-start-temperature", "0.2", "--bank.warm-start-key-momentum", "0.999"),
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        path = folder / ("bright" if number % 2 else "dark") / f"{number:03}.png"
        path.parent.mkdir(exist_ok=True)
        low = 120 if number % 2 else 0
        Image.fromarray(generator.integers(low, low + 100, (20 + number % 5, 24, 3), dtype=np.uint8)).save(path)
    (folder / "dark" / "006.png").write_bytes(b"not a picture")
    return folder


def pretrain(photos: Path, out: Path, *more: str) -> list[str]:
    return [
        *("pretrain", "--data", str(photos), "--out", str(out), "--backbone", "test_resnet", "--views.size", "16"),
        *("--epochs", str(EPOCHS), "--batch-size", str(BATCH), "--bank-size", "24", "--bank.warm-start-steps", "4"),
        *("--encoder.projector", "16", "--encoder.embedding", "8", "--monitor.log-steps", "2", "--device", "cpu"),
        *("--monitor.knn-epochs", "2", "--monitor.checkpoint-minutes", "0", "--workers", "1"),
        *(*CALM, *more),
    ]


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    """Wait for a process, check its exit status, and return what it said."""
    try:
        said = "\n".join(process.communicate(timeout=150))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == status, said
    assert status or "Traceback" not in said
    return said


def wait_for(out: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Wait until the run has recorded a training step."""
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text().partition('"train"')[2]):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run does not begin"
        time.sleep(0.005)


def processes_of(out: Path) -> list[int]:
    """Return every process that was started for the run in `out`, by its command line or its parent's."""
    found = subprocess.run(["ps", "-ww", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in found.splitlines()[1:]]
    own = {pid for pid, _, command in rows if str(out) in command and not command.startswith("ps ")}
    return [int(pid) for pid, parent, _ in rows if pid in own or parent in own]


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def last_checkpoint(run: Path) -> dict:
    return torch.load(max((run / "checkpoints").glob("step-*.pt")), weights_only=True)


def assert_same_run(one: Path, other: Path) -> None:
    """The same records, weights, bank and velocity, to the rounding of float32.

    Of the records all but the feature spread, which is the mean of each process's own.
    """
    first, second = records(one), records(other)
    assert [(r["kind"], r["step"]) for r in first] == [(r["kind"], r["step"]) for r in second]
    for a, b in zip(first, second, strict=True):
        assert list(a) == list(b)
        for name in a:
            if name in ("loss", "positive_probability", "slot_perplexity", "lr", "bank_lr"):
                assert b[name] == pytest.approx(a[name], rel=TOLERANCE), (a["step"], name)
    assert (one / "skipped.txt").read_text() == (other / "skipped.txt").read_text() != ""
    first, second = last_checkpoint(one), last_checkpoint(other)
    assert first["step"] == second["step"] == EPOCHS * (IMAGES // BATCH)
    tensors = [(name, first["model"][name], second["model"][name]) for name in first["model"]]
    tensors.append(("velocity", *(c["bank_optimizer"]["state"][0]["momentum_buffer"] for c in (first, second))))
    deviations = {}
    for name, a, b in tensors:
        if a.is_floating_point():
            deviations[name] = ((a - b).abs().max() / a.abs().max().clamp_min(1e-3)).item()
        else:
            assert torch.equal(a, b), name
    worst = max(deviations, key=deviations.__getitem__)
    print(f"{other.name} against {one.name}: largest deviation {deviations[worst]:.1e} ({worst})")
    assert deviations[worst] < TOLERANCE, worst


@pytest.fixture(scope="module")
def alone(photos, tmp_path_factory):
    """The run of a single process."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    assert main(pretrain(photos, out)) == 0
    return out


@pytest.fixture(scope="module")
def pair(photos, tmp_path_factory):
    """The same command, with two processes."""
    out = tmp_path_factory.mktemp("runs") / "pair"
    assert main(pretrain(photos, out, "--distributed.processes", "2")) == 0
    return out


def test_two_processes_are_one_run(alone, pair):
    assert_same_run(alone, pair)
    assert (pair / "skipped.txt").read_text().startswith("dark/006.png\t")
    assert json.loads((pair / "environment.json").read_text())[0]["processes"] == 2
    assert len(last_checkpoint(pair)["random"]) == 2 and len(last_checkpoint(alone)["random"]) == 1


def test_each_process_draws_its_own_random_numbers(pair):
    """Else all would drop the same units and paths, image for image."""
    one, other = last_checkpoint(pair)["random"]
    assert not torch.equal(one["cpu"], other["cpu"])


def test_torchrun_restarts_a_sharded_run_after_a_kill(photos, alone, tmp_path):
    """torchrun starts the same command; each process keeps half of the slots, the checkpoint has them all.

    One worker is killed in the middle: torchrun starts both again, and they go on from the last checkpoint.
    """
    out = tmp_path / "restarted, sharded"
    torchrun = [*TORCHRUN, "--standalone", "--nproc-per-node=2", "--max-restarts=1", "-m", "caco"]
    process = start(*torchrun, *pretrain(photos, out, "--bank.sharded"))
    wait_for(out, 4, process)
    workers = [pid for pid in processes_of(out) if pid != process.pid]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    said = finish(process)
    assert "resumed at step" in said
    assert len(json.loads((out / "environment.json").read_text())) == 2
    assert last_checkpoint(out)["model"]["bank.weight"].shape == (24, 8)
    assert_same_run(alone, out)


def test_a_restarted_run_needs_its_folder_on_the_main_machine_only(photos, tmp_path):
    """Two machines, each in a folder of its own, are started again by torchrun: only the first has the run."""
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    assert main(pretrain(photos, here / "run")) == 0
    (here / "run/export/backbone.safetensors").unlink()
    max((here / "run/checkpoints").glob("step-*.pt")).unlink()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    places = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "TORCHELASTIC_RESTART_COUNT": "1"}
    machines = [
        subprocess.Popen(
            [*CACO, *pretrain(photos, Path("run"))],
            **{"cwd": folder, "env": {**ENVIRONMENT, **meeting, **places, "RANK": str(rank)}},
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True},
        )
        for rank, folder in enumerate((here, there))
    ]
    said = [finish(machine) for machine in machines]
    assert f"resumed at step {EPOCHS * (IMAGES // BATCH) - 1}" in said[0]
    assert (here / "run/export/backbone.safetensors").exists() and list(there.iterdir()) == []


def test_a_signal_saves_and_another_number_of_processes_goes_on(photos, alone, tmp_path):
    """SIGTERM to the parent alone: all stop at the same step, saved. One process goes on with the same images."""
    out = tmp_path / "two, then one"
    minutes = ("--monitor.checkpoint-minutes", "1000")
    process = start(*CACO, *pretrain(photos, out, "--distributed.processes", "2", *minutes))
    wait_for(out, 4, process)
    process.send_signal(signal.SIGTERM)
    said = finish(process, status=75)
    assert "asked to stop (SIGTERM) at step" in said and "--resume" in said and "Traceback" not in said
    assert processes_of(out) == []
    assert 0 < last_checkpoint(out)["step"] < EPOCHS * (IMAGES // BATCH)
    assert main(["pretrain", "--out", str(out), "--resume", "--distributed.processes", "1"]) == 0
    assert_same_run(alone, out)


def test_ctrl_c_at_a_terminal_saves_once(photos, tmp_path):
    """A terminal sends it to the parent and to its processes: they must not take the parent's word for a second one."""
    out = tmp_path / "ctrl-c"
    process = start(*CACO, *pretrain(photos, out, "--distributed.processes", "2", "--epochs", "1000"))
    wait_for(out, 4, process)
    os.killpg(process.pid, signal.SIGINT)
    said = finish(process, status=75)
    assert "stopped by Ctrl-C at step" in said and "--resume" in said and "Traceback" not in said
    assert processes_of(out) == []


def test_a_second_ctrl_c_ends_what_cannot_save(photos, tmp_path):
    """One process is stopped, so the others wait for it for ever."""
    out = tmp_path / "stuck"
    process = start(*CACO, *pretrain(photos, out, "--distributed.processes", "2", "--epochs", "1000"))
    wait_for(out, 4, process)
    children = [pid for pid in processes_of(out) if pid != process.pid and is_worker(pid)]
    assert len(children) == 2
    os.kill(children[1], signal.SIGSTOP)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(2)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    said = finish(process, status=130)
    assert said.splitlines()[-1] == "caco: stopped" and "Traceback" not in said
    assert processes_of(out) == []


@pytest.mark.parametrize("seconds", [0.0, 1.0, 4.0])
def test_ctrl_c_ends_a_command_that_does_not_save(seconds, tmp_path):
    """At any moment: while the processes start, too."""
    out = tmp_path / "result.json"
    line = ["knn", "random", "--backbone", "test_resnet", "--data", "textures:50000", "--out", str(out)]
    process = start(*CACO, *line, "--device", "cpu", "--workers", "1", "--distributed.processes", "2")
    deadline = time.monotonic() + 60
    while len([pid for pid in processes_of(out) if is_worker(pid)]) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    said = finish(process, status=130)
    assert said.splitlines()[-1] == "caco: stopped" and "Traceback" not in said
    assert processes_of(out) == []


def is_worker(pid: int) -> bool:
    """Return whether a process is one that caco has started for its work."""
    try:
        return "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


def test_a_killed_parent_leaves_nobody_behind(photos, tmp_path):
    out = tmp_path / "orphans"
    process = start(*CACO, *pretrain(photos, out, "--distributed.processes", "2", "--epochs", "1000"))
    wait_for(out, 2, process)
    children = [pid for pid in processes_of(out) if pid != process.pid]
    assert len(children) >= 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while alive := [pid for pid in children if Path(f"/proc/{pid}").exists() and not is_zombie(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


def is_zombie(pid: int) -> bool:
    """Return whether a process has ended and only waits for its parent (in a container, perhaps nobody) to look."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture(scope="module")
def judged(photos, alone, tmp_path_factory):
    """kNN, embed and the published linear protocol, in one and in two processes."""
    folder = tmp_path_factory.mktemp("judged")
    common = [str(alone), "--data", str(photos), "--device", "cpu", "--workers", "1", "--batch-size", "7"]
    for command, suffix in (("knn", "json"), ("embed", "npz")):
        assert main([command, *common, "--out", str(folder / f"1.{suffix}")]) == 0
        two = ("--out", str(folder / f"2.{suffix}"), "--distributed.processes", "2")
        assert main([command, *common, *two]) == 0
    linear = ["linear", *common, "--protocol", "reference", "--epochs", "3", "--probe-batch-size", "10", "--lr", "3"]
    for number in ("1", "2"):
        files = ("--out", str(folder / f"linear {number}.json"), "--head", str(folder / f"{number}.safetensors"))
        assert main([*linear, *files, "--distributed.processes", number]) == 0
    return folder


def test_embed_counts_every_image_once(judged):
    one, two = (np.load(judged / f"{number}.npz") for number in (1, 2))
    assert sorted(one.files) == sorted(two.files)
    for name in one.files:
        if one[name].dtype == np.float32:
            assert one[name].shape[0] == IMAGES - 1
            np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-6)
        else:
            assert (one[name] == two[name]).all(), name


def test_knn_is_the_same(judged):
    one, two = (json.loads((judged / f"{number}.json").read_text()) for number in (1, 2))
    assert one == two
    assert one["train_images"] + one["val_images"] == IMAGES - 1 and len(one["broken"]) == 1


def test_the_reference_protocol_is_the_same(judged):
    """The processes share the features of every epoch's crops, in order, and leave out the broken image alike."""
    one, two = (json.loads((judged / f"linear {number}.json").read_text()) for number in (1, 2))
    assert one == two
    assert one["train_images"] + one["val_images"] == IMAGES - 1 and len(one["broken"]) == 1
    heads = [load_file(judged / f"{number}.safetensors") for number in (1, 2)]
    for name in ("weight", "bias"):
        torch.testing.assert_close(heads[1][name], heads[0][name], rtol=1e-4, atol=1e-6)
