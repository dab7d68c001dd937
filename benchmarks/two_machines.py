"""Two "machines" for real: network namespaces with their own addresses, joined by a pair of virtual network cards.

    python benchmarks/two_machines.py --out results/two-machines      (Linux, root, the `ip` command)

Five scenes, each a whole `caco pretrain` on the same pictures; their commands, logs and outcome are written to --out:

1. alone      one machine, one process
2. two        the same command on two machines (--distributed.machines 2): the same result, to the rounding of float32
3. killed     machine 1 loses all its processes: machine 0 names the lost rank and exits with an error
4. cut off    the cable is pulled out in the middle: both machines name whom they have lost, and exit with an error
5. torchrun   c10d rendezvous between the machines; machine 1 is killed and comes anew: the run goes on from its last
              checkpoint and has the same result
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from namespaces import ADDRESSES, Machines
from PIL import Image

PORT = 29700

# Without it torchrun (seen with torch 2.14's c10d rendezvous) tells a machine that comes anew nothing of the meeting
# point of the next attempt, and both wait until they time out.
STORE_OF_ITS_OWN = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def make_photos(folder: Path, count: int = 64) -> None:
    generator = np.random.default_rng(0)
    for number in range(count):
        path = folder / ("bright" if number % 2 else "dark") / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        low = 120 if number % 2 else 0
        Image.fromarray(generator.integers(low, low + 100, (24, 24, 3), dtype=np.uint8)).save(path)


def command(out: str, *more: str) -> list[str]:
    return [
        *("-m", "caco", "pretrain", "--data", "photos", "--out", out, "--backbone", "test_resnet"),
        *("--views.size", "16", "--epochs", "4", "--batch-size", "16", "--bank-size", "64"),
        # Small rates: with large ones rounding flips the choice of a positive after some steps, and two runs differ.
        *("--optimizer.name", "lars", "--no-encoder.centred", "--encoder.key-momentum", "0.99", "--lr", "0.003"),
        *("--optimizer.final-lr", "0.003", "--optimizer.warmup-epochs", "10", "--bank.lr", "3", "--bank.final-lr", "3"),
        *("--bank.temperature", "0.08", "--bank.slot-temperature", "0.08", "--bank.warm-start-steps", "4"),
        *("--encoder.projector", "16", "--encoder.embedding", "8", "--monitor.log-steps", "2"),
        *("--monitor.knn-epochs", "2", "--monitor.checkpoint-minutes", "0", "--workers", "1", "--device", "cpu", *more),
    ]


def on_machine(number: int) -> list[str]:
    place = ("--distributed.machine", str(number), "--distributed.address", f"{ADDRESSES[0]}:{PORT}")
    return ["--distributed.machines", "2", *place]


def torchrun(number: int) -> list[str]:
    """Return torchrun's options on a machine, whose name nothing resolves: so who holds the rendezvous is said."""
    return [
        *("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d"),
        *(f"--rdzv-endpoint={ADDRESSES[0]}:{PORT + 1}", "--rdzv-id=caco", f"--rdzv-conf=is_host={int(number == 0)}"),
        f"--local-addr={ADDRESSES[number]}",
    ]


def wait_for_step(run: Path, step: int, processes: list[subprocess.Popen[bytes]]) -> None:
    """Wait until a run has recorded a training step."""
    deadline = time.monotonic() + 180
    while not any(r["kind"] == "train" and r["step"] >= step for r in records(run)):
        if time.monotonic() > deadline or all(process.poll() is not None for process in processes):
            raise RuntimeError(f"{run.name} does not get to step {step}")
        time.sleep(0.01)


def records(run: Path) -> list[dict[str, Any]]:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def largest_deviation(one: Path, other: Path) -> float:
    """Return the largest deviation of the two runs' last weights and banks, as a share of each tensor's largest value."""
    first, second = (
        torch.load(max((run / "checkpoints").glob("step-*.pt")), weights_only=True)["model"] for run in (one, other)
    )
    assert list(first) == list(second)
    pairs = [(first[name], second[name]) for name in first if first[name].is_floating_point()]
    return max(((a - b).abs().max() / a.abs().max().clamp_min(1e-3)).item() for a, b in pairs)


@contextlib.contextmanager
def ended(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Leave no process behind."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run_alone(machines: Machines, out: Path) -> dict[str, Any]:
    process = machines.start(0, out / "1-alone.log", *command("alone"))
    with ended([process]):
        return {"exit status": process.wait(300)}


def run_two(machines: Machines, out: Path) -> dict[str, Any]:
    logs = [out / f"2-two-machine{number}.log" for number in range(2)]
    processes = [machines.start(n, logs[n], *command("two", *on_machine(n))) for n in range(2)]
    with ended(processes):
        statuses = [process.wait(300) for process in processes]
    return {"exit statuses": statuses, "largest deviation from alone": largest_deviation(Path("alone"), Path("two"))}


def run_killed(machines: Machines, out: Path) -> dict[str, Any]:
    logs = [out / f"3-killed-machine{number}.log" for number in range(2)]
    long = ("--epochs", "4000")
    processes = [machines.start(n, logs[n], *command("killed", *on_machine(n), *long)) for n in range(2)]
    with ended(processes):
        wait_for_step(Path("killed"), 4, processes)
        machines.kill(1)
        began = time.monotonic()
        status = processes[0].wait(120)
        seconds = time.monotonic() - began
    return {"exit status of machine 0": status, "seconds until then": round(seconds, 1), "said": last_line(logs[0])}


def run_cut_off(machines: Machines, out: Path) -> dict[str, Any]:
    logs = [out / f"4-cut-off-machine{number}.log" for number in range(2)]
    long = ("--epochs", "4000")
    processes = [machines.start(n, logs[n], *command("cut-off", *on_machine(n), *long)) for n in range(2)]
    with ended(processes):
        wait_for_step(Path("cut-off"), 4, processes)
        machines.cable("down")
        began = time.monotonic()
        try:
            statuses, seconds = [], []
            for process in processes:
                statuses.append(process.wait(120))
                seconds.append(round(time.monotonic() - began, 1))
        finally:
            machines.cable("up")
    said = [last_line(log) for log in logs]
    return {"exit statuses": statuses, "seconds until then": seconds, "said": said}


def run_torchrun(machines: Machines, out: Path) -> dict[str, Any]:
    logs = [out / f"5-torchrun-machine{number}.log" for number in range(2)]
    arguments = [[*torchrun(number), *command("elastic")] for number in range(2)]
    processes = [machines.start(n, logs[n], *arguments[n], **STORE_OF_ITS_OWN) for n in range(2)]
    with ended(processes):
        wait_for_step(Path("elastic"), 4, processes)
        machines.kill(1)
        processes[1].wait()
        began = time.monotonic()
        with logs[1].open("a") as file:
            file.write("(all processes of this machine killed; the same command again)\n")
        processes[1] = machines.start(1, logs[1], *arguments[1], **STORE_OF_ITS_OWN)
        statuses = [process.wait(240) for process in processes]
        seconds = time.monotonic() - began
    starts = len(json.loads(Path("elastic/environment.json").read_text()))
    deviation = largest_deviation(Path("alone"), Path("elastic"))
    return {
        "exit statuses": statuses,
        "starts": starts,
        "seconds from the loss to the end": round(seconds, 1),
        "largest deviation from alone": deviation,
    }


def last_line(log: Path) -> str:
    """Return the last line of a log in which caco says something."""
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    return next((line for line in reversed(lines) if line.startswith("caco: ")), "")


SCENES = {
    "alone": run_alone,
    "two": run_two,
    "killed": run_killed,
    "cut off": run_cut_off,
    "torchrun": run_torchrun,
}


def clean(log: Path) -> None:
    """Keep of progress bars only their last state, and no path or name of this machine."""
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in log.read_text(errors="replace").rstrip("\r\n").split("\n")]
    text = "\n".join(line for line in lines if line) + "\n"
    packages = str(Path(torch.__file__).parent.parent)
    source = str(Path(__file__).resolve().parents[1])
    for path, name in (
        (packages, "site-packages"),
        (sys.prefix, "VENV"),
        (sys.base_prefix, "PYTHON"),
        (source, "CACO"),
        (os.uname().nodename, "HOST"),
    ):
        text = text.replace(path, name)
    log.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the logs and result.json")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the machines are removed then, too
    parser.add_argument("--scenes", nargs="+", choices=SCENES, default=list(SCENES), help="alone comes first")
    options = parser.parse_args()
    if os.geteuid() != 0 or shutil.which("ip") is None:
        sys.exit("two_machines.py: network namespaces need root and the `ip` command")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for log in out.glob("[0-9]-*.log"):
        log.unlink()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path.cwd()
        os.chdir(folder)
        make_photos(Path("photos"))
        try:
            for name in options.scenes:
                with Machines() as machines:
                    results[name] = SCENES[name](machines, out)
                print(json.dumps({name: results[name]}, indent=1), flush=True)
        finally:
            os.chdir(home)
            for log in out.glob("[0-9]-*.log"):
                clean(log)
    (out / "result.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
