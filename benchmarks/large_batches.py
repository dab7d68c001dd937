"""Large batches on one GPU: batch, parts and checkpointing against memory and images/s.

    python benchmarks/large_batches.py [--quick] [--batch 1024] [--out FILE.json]

ResNet-50, 224 px, bf16 (--quick: ResNet-18, 32 px; on a CPU fp32). A whole step as in `step.py`, on views that a loader makes
meanwhile. All in one process, one after the other: what a GPU's libraries have chosen for a shape is then known to those that
follow. Reckoned without a GPU: `memory.py`.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from measure import arguments, describe, gigabytes, save, table, take_turns
from step import Step, configuration, repeat, step_memory

from caco.data.source import open_source

ROWS = [(256, 1, False), (256, 1, True), (1024, 4, False), (1024, 8, False), (1024, 1, True), (1024, 4, True)]
"""Batch, parts, checkpointing."""


def measure(options: Any, batch: int, parts: int, checkpointing: bool) -> dict[str, Any]:
    """Return the seconds of a step and its peak memory in bytes."""
    options.batch, options.accumulate, options.checkpointing = batch, parts, checkpointing
    config = configuration(options, "fp32" if options.device == "cpu" else "bf16")
    step = Step(config, open_source(config.data), plain_views=True)
    on_gpu = step.loader.device.type == "cuda"
    memory = step_memory(step) if on_gpu else None
    steps = 1 if options.quick else 3
    work = {"step": lambda: repeat(step.whole, steps)}
    seconds = take_turns(work, 3, warm_up=1, device=step.loader.device)["step"].median / steps
    return {
        "batch": batch,
        "parts": parts,
        "checkpointing": checkpointing,
        "seconds": seconds,
        "bytes": memory,
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--batch", type=int, nargs="+", choices=sorted({row[0] for row in ROWS}), help="only rows of these"
    )
    options = parser.parse_args()
    wanted = options.batch
    given = {"backbone": "resnet50", "size": 224, "embedding": 256, "projector": 2048, "bank": 65_536}
    if options.quick:
        given |= {"backbone": "resnet18", "size": 32, "embedding": 128, "projector": 128, "bank": 4096}
    plain = {
        "small": 0,
        "data": "",
        "decoder": "cpu",
        "small_size": 96,
        "convolution": "direct",
        "compile": False,
        "no_cuda_graph": False,
        "give_back": False,
    }
    vars(options).update(given | plain)
    print(describe(options.device))
    results, rows = [], []
    for batch, parts, checkpointing in ROWS:
        if wanted and batch not in wanted:
            continue
        batch = batch // 64 if options.quick else batch
        try:
            row = measure(options, batch, parts, checkpointing)
        except torch.OutOfMemoryError:
            print(f"batch {batch} in {parts} parts does not fit")
            continue
        finally:
            gc.collect()
            if options.device != "cpu":
                torch.cuda.empty_cache()
        results.append(row)
        name = f"{batch}" + f", in {parts} parts" * (parts > 1) + ", checkpointing" * checkpointing
        rows.append((name, gigabytes(row["bytes"]), f"{batch / row['seconds']:,.0f}"))
        print(*rows[-1], flush=True)
        save(options, {"results": results})
    print(table(("batch", "peak, GB", "images/s"), rows))


if __name__ == "__main__":
    main()
