"""Everything that wants a GPU: tests, steps against the limit, bank, memory table, data, evaluation, tests of whole runs.

A call takes as many parts as fit into 8 minutes, and names the others.

    python benchmarks/gpu.py --out FOLDER
    python benchmarks/gpu.py --out FOLDER --device cpu --quick      (a dry run: does every part work?)

Each part is one of the other benchmarks with its own command, which is printed, limited in time, and whose output goes
into FOLDER/NAME.log and FOLDER/NAME.json as it comes. A part that fails or takes too long is said so; the others go on.
Exit status 1 if any failed. Parts for which no time is left are named, to be taken with --only. ResNet-50 at batch 1024
needs some 50 GiB (`memory.py`); on a smaller GPU --batch 256 is taken. The package need not be installed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

HERE = Path(__file__).parent
WHOLE_RUNS = "killed"
"""What tests of whole runs, which take longest, have in their names."""
NOT_ON_CPU = ("bank-4-million", "bank-kernels")
RESNET50 = "--backbone resnet50 --size 224 --embedding 256 --projector 2048 --precision bf16 --plain-views"


def parts(quick: bool, batch: int = 1024) -> dict[str, tuple[int, str]]:
    """Return for each part its limit in seconds and its command (a benchmark and its options; pytest for the tests)."""
    small = " --quick" if quick else ""
    compiled = "--compile --no-limit --no-stages"
    steps = {
        "step-resnet18": (150, "step.py --batch 512 --steps 20 --precision bf16 fp32"),
        "step-resnet50": (150, f"step.py {RESNET50} --batch {batch} --rounds 3 --steps 3"),
        "step-resnet18-compiled": (200, f"step.py --batch 512 --steps 20 --precision bf16 {compiled}"),
        "step-resnet50-compiled": (250, f"step.py {RESNET50} --batch {batch} --rounds 3 --steps 3 {compiled}"),
        "multi-crop": (150, f"step.py {RESNET50} --batch 256 --rounds 3 --steps 3 --small 6 --no-stages"),
    }
    others = {
        "bank": (150, "bank.py --slots 65536 1048576 --width 128 --batch 512 --rounds 5"),
        "bank-4-million": (
            150,
            "bank.py --slots 4194304 --width 256 --batch 1024 --rounds 3 --only streamed streamed-bf16",
        ),
        "bank-kernels": (90, "bank_kernels.py"),
        "large-batches": (300, "large_batches.py"),
        "loader": (90, "loader.py"),
        "data": (200, "data.py --parts nvjpeg augment --rounds 5"),
        "evaluate": (180, "evaluate.py"),
    }
    if quick:  # tiny sizes: what is tried is that each part runs
        steps = {
            name: (120, command.replace("--batch 1024", "--batch 4").replace("--batch 512", "--batch 8"))
            for name, (_, command) in steps.items()
        }
        steps = {
            name: (
                limit,
                command.replace("--batch 256", "--batch 4")
                .replace("--size 224", "--size 64")
                .replace("steps 20", "steps 2")
                + " --small-size 32" * (name == "multi-crop"),
            )
            for name, (limit, command) in steps.items()
        }
        others = {name: (120, command.split()[0]) for name, (_, command) in others.items() if name not in NOT_ON_CPU}
    bank = {"bank": others.pop("bank")}
    all_parts = {**steps, **bank, **others}
    return {name: (limit, command + small) for name, (limit, command) in all_parts.items()}


def environment() -> dict[str, str]:
    """Return a part's environment: it finds the package beside this file, and what it prints is there if it is killed."""
    paths = [str(HERE.parent / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def largest_batch(device: str) -> int:
    """Return the batch of ResNet-50 at 224 px whose activations a device holds at once: 1024 at some 50 GiB."""
    large = device == "cpu" or torch.cuda.get_device_properties(device).total_memory > 60 * 2**30
    return 1024 if large else 256


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and numbers")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, default=470, help="time for all parts (default: %(default)s)")
    parser.add_argument("--only", nargs="+", help="names of parts")
    options = parser.parse_args()
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu --quick tries the parts on the CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    began, seen = time.monotonic(), {}
    tests = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-m", "gpu", str(HERE.parent / "tests")]
    tests += ["-n", "4", "-p", "no:benchmark"] if find_spec("xdist") else []  # pytest-benchmark does not bear the other
    tests += ["-k"]
    commands = {"tests": (200, [*tests, f"not {WHOLE_RUNS}"])}
    for name, (limit, command) in parts(options.quick, largest_batch(options.device)).items():
        out = ["--device", options.device, "--out", str(options.out / f"{name}.json")]
        script, *arguments = command.split()
        commands[name] = (limit, [sys.executable, str(HERE / script), *arguments, *out])
    commands["tests-of-runs"] = (350, [*tests, WHOLE_RUNS])
    if unknown := set(options.only or ()) - set(commands):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(commands)}")
    for name, (limit, line) in commands.items():
        if options.only and name not in options.only:
            continue
        limit = min(limit, int(options.seconds - (time.monotonic() - began)))
        if limit <= 5:
            print(f"({name}: no time is left; take it with --only {name})")
            continue
        seen[name] = run(name, limit, line, options.out / f"{name}.log")
        (options.out / "summary.json").write_text(json.dumps(seen, indent=2) + "\n")
    print(f"{len(seen)} parts in {time.monotonic() - began:.0f} s; logs and numbers are in {options.out}")
    return int(any(part["outcome"] != "done" for part in seen.values()))


def run(name: str, limit: int, line: list[str], log: Path) -> dict[str, object]:
    """Run one part and return how it ended."""
    shown = " ".join(["python", *(word.replace(str(HERE.parent) + "/", "") for word in line[1:])])
    print(f"$ {shown}", flush=True)
    began = time.monotonic()
    with log.open("w") as file:
        file.write(f"$ {shown}\n")
        file.flush()
        process = subprocess.Popen(
            line, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=environment()
        )
        try:
            status = process.wait(limit)
            outcome = "done" if status == 0 or ("tests" in name and status == 5) else f"failed with {status}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {limit} s"
        finally:
            if process.poll() is None:  # also when this program is told to end
                os.killpg(process.pid, signal.SIGKILL)  # its own children hold the GPU, too
                process.wait()
    print(log.read_text()[-1500:])
    print(f"({name}: {outcome}, {time.monotonic() - began:.0f} s)", flush=True)
    return {"command": shown, "outcome": outcome, "seconds": round(time.monotonic() - began, 1)}


if __name__ == "__main__":
    sys.exit(main())
