"""How long one waits for caco: the help, an import, a wrong option, and the first training step.

    python benchmarks/start.py [--quick] [--out FILE.json]

Each line is the median over fresh processes that take turns: `python -c pass`, `import torch` and `import torch, timm`
(what no program on them can go below), `import caco`, `caco --help`, `caco pretrain --help`, a misspelt option, and from
the command to the first record of `caco pretrain` on drawn pictures with a tiny model (resnet10_narrow, 16 px, batch 16,
no warm start), whose process is then stopped. The first run of each, which fills the file cache and compiles, is not
counted.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from measure import Others, arguments, describe, save, table, take_turns

CACO = [sys.executable, "-m", "caco"]
TRAIN = (
    "--data textures:64 --backbone resnet10_narrow --epochs 1000 --batch-size 16 --views.size 16 --bank-size 64 "
    "--encoder.embedding 16 --encoder.projector 16 --bank.warm-start-steps 0 --monitor.log-steps 1 --overwrite"
)


def command(arguments: list[str], status: int = 0) -> Callable[[], None]:
    """Return a call that runs a command to its end."""

    def run() -> None:
        done = subprocess.run(arguments, capture_output=True, text=True)
        assert done.returncode == status, f"{arguments}: exit {done.returncode}\n{done.stderr}"

    return run


def first_step(folder: Path, device: str) -> Callable[[], None]:
    """Return a call that starts a training and comes back when its first step is on record."""
    metrics = folder / "metrics.jsonl"

    def run() -> None:
        metrics.unlink(missing_ok=True)
        process = subprocess.Popen(
            [*CACO, "pretrain", *TRAIN.split(), "--out", str(folder), "--device", device],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            while not (metrics.exists() and '"train"' in metrics.read_text()):
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.005)
        finally:
            process.kill()
            process.communicate()

    return run


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print(describe(options.device), flush=True)
    python = [sys.executable, "-c"]
    with tempfile.TemporaryDirectory() as folder, Others() as others:
        contestants = {
            "python, nothing": command([*python, "pass"]),
            "import torch": command([*python, "import torch"]),
            "import torch, timm": command([*python, "import torch, timm"]),
            "import caco": command([*python, "import caco"]),
            "import caco, use caco.Bank": command([*python, "import caco; caco.Bank"]),
            "caco --help": command([*CACO, "--help"]),
            "caco pretrain --help": command([*CACO, "pretrain", "--help"]),
            "caco pretrain, option misspelt": command([*CACO, "pretrain", "--epoch", "3"], status=2),
            "caco pretrain, first step": first_step(Path(folder) / "run", options.device),
        }
        times = take_turns(contestants, rounds=2 if options.quick else options.rounds)
    rows = [(name, f"{all_.median:.3f}", f"{all_.least:.3f}", f"{all_.most:.3f}") for name, all_ in times.items()]
    print(table(("", "s", "least", "most"), rows))
    print(f"\n(other programs kept {others.cores} cores busy)")
    save(options, {"seconds": {name: all_.as_json() for name, all_ in times.items()}, "others_cores": others.cores})


if __name__ == "__main__":
    main()
