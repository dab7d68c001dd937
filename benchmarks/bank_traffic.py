"""What a step of the bank costs many processes: bytes exchanged and memory kept, replicated and sharded.

Real gloo processes on this machine take the method's real steps (positives, loss, backward, SGD with momentum) with an
encoder that has nothing to learn. Every collective is wrapped and its tensors are counted, so the bytes are those of the
algorithm, not of a network card. Run:

    python benchmarks/bank_traffic.py --out results/bank-traffic
    python benchmarks/bank_traffic.py --quick

A row says, for each process: `received` and `reduced` bytes in a step (all_gather: what comes from the others; all_reduce:
the tensor, which a ring sends and receives 2(N − 1)/N times), `on_wire` (what a ring sends, computed from these two), the
bytes of slots and velocity, and the seconds of a step on this machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from caco.bank import Bank
from caco.config import DistributedOptions
from caco.distributed.bank_shards import ProcessShards
from caco.distributed.data_parallel import data_parallel
from caco.distributed.launch import launch
from caco.distributed.world import World
from caco.model import CaCo, view_pairs
from caco.train.step import compute_gradients

BATCH = 32
"""Images per step, over all processes; two queries each."""


class Counter:
    """Counts the bytes of every collective that Python calls."""

    def __init__(self) -> None:
        self.received = self.reduced = 0
        self._all_gather, self._all_reduce = dist.all_gather, dist.all_reduce

    def __enter__(self) -> Counter:
        def all_gather(tensors: list[Tensor], tensor: Tensor, *rest: Any, **options: Any) -> Any:
            self.received += tensor.nbytes * (len(tensors) - 1)
            return self._all_gather(tensors, tensor, *rest, **options)

        def all_reduce(tensor: Tensor, *rest: Any, **options: Any) -> Any:
            self.reduced += tensor.nbytes
            return self._all_reduce(tensor, *rest, **options)

        dist.all_gather, dist.all_reduce = all_gather, all_reduce  # type: ignore[assignment]
        return self

    def __exit__(self, *error: object) -> None:
        dist.all_gather, dist.all_reduce = self._all_gather, self._all_reduce


def measure(world: World, slots: int, width: int, sharded: bool, steps: int) -> dict[str, Any]:
    """Take steps with a bank of the given size; return bytes and seconds of one, on average."""
    bank = Bank(slots, width, shards=ProcessShards(world) if sharded else None)
    kept = bank.weight.nbytes
    # The whole step of the method, with an encoder that has nothing to learn: what is left is the bank's.
    model = CaCo(nn.Identity(), bank, view_pairs(2, 0))
    network: nn.Module = model
    counter = Counter()
    optimizer = torch.optim.SGD(bank.parameters(), lr=0.1, momentum=0.9)
    if not sharded:
        network = data_parallel(network, world)

        def counted(state: Counter, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations as text
            """DDP's own hook (the mean over all processes), with its bytes counted."""
            tensor = bucket.buffer()
            state.reduced += tensor.nbytes
            work = dist.all_reduce(tensor.div_(world.size), async_op=True)
            return work.get_future().then(lambda future: future.value()[0])

        network.register_comm_hook(counter, counted)  # type: ignore[operator]
    share = BATCH // world.size
    generator = torch.Generator().manual_seed(world.rank)

    began = 0.0
    for step in range(steps + 1):
        if step == 1:  # the first makes buffers, and DDP's buckets
            counter.received = counter.reduced = 0
            world.wait()
            began = time.perf_counter()
        views = [torch.randn(share, width, generator=generator, requires_grad=True) for _ in range(2)]
        optimizer.zero_grad(set_to_none=True)
        with counter if sharded else nullcontext():
            compute_gradients(model, network, views, torch.float32)
        optimizer.step()
    seconds = (time.perf_counter() - began) / steps
    received, reduced = counter.received / steps, counter.reduced / steps
    velocity = next(iter(optimizer.state.values()))["momentum_buffer"].nbytes
    return {
        "slots": slots,
        "width": width,
        "processes": world.size,
        "bank": "sharded" if sharded else "replicated",
        "batch": BATCH,
        "received_bytes": round(received),
        "reduced_bytes": round(reduced),
        "on_wire_bytes": round(received + 2 * (world.size - 1) / world.size * reduced),
        "bank_bytes": kept + velocity,
        "with_gradient_bytes": 2 * kept + velocity,
        "peak_process_bytes": peak_memory(),
        "seconds": round(seconds, 4),
    }


def peak_memory() -> int | None:
    """Return the most memory this process has had at a time, bytes; None where Linux does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def megabytes(count: float) -> str:
    return f"{count / 2**20:,.2f}" if count < 2**30 / 100 else f"{count / 2**20:,.0f}"


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown; MiB are 2^20 bytes."""
    lines = [
        "| slots K | width D | processes N | bank | on wire per step, MiB | slots + velocity, MiB | peak of process, MiB "
        "| s per step |",
        "|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        peak = "" if row["peak_process_bytes"] is None else megabytes(row["peak_process_bytes"])
        lines.append(
            f"| {row['slots']:,} | {row['width']} | {row['processes']} | {row['bank']} "
            f"| {megabytes(row['on_wire_bytes'])} | {megabytes(row['bank_bytes'])} | {peak} | {row['seconds']:.3g} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for result.json and table.md")
    parser.add_argument("--quick", action="store_true", help="banks of 1,024 and 4,096 slots, 2 processes")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1)
    options = parser.parse_args()
    sizes = (1024, 4096) if options.quick else (65_536, 1_048_576)
    rows = []
    for processes in (2,) if options.quick else (2, 4):
        for slots in sizes:
            for sharded in (False, True):
                many = DistributedOptions(processes=processes)
                row = launch(measure, many, "cpu", slots, options.width, sharded, options.steps)
                assert row is not None and math.isfinite(row["seconds"])
                rows.append(row)
                print(json.dumps(row), flush=True)
    print(table(rows))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        machine = {"cores": os.cpu_count(), "torch": torch.__version__, "backend": "gloo, one machine"}
        content = json.dumps({"machine": machine, "rows": rows}, indent=1)
        (options.out / "result.json").write_text(content + "\n")
        (options.out / "table.md").write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()
