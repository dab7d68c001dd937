"""The bank's part of a step: search of the positives, loss, both gradients, and the bank's own step; time and memory.

    python benchmarks/bank.py [--quick] [--out FILE.json]
    python benchmarks/bank.py --slots 1048576 --width 256 --batch 256 --only streamed

Embeddings of two views are given; nothing is learnt from them. Contestants, each with fresh memory in its own process:

- streamed: what caco does (`caco.bank`), in fp32 and with bfloat16 products (under autocast; streamed-bf16), these with
  kernels of its own, where it has some, and without;
- dense: the plain form with one matrix of queries and slots, the oracle of the tests (`tests/dense_bank.py`);
- published-order: the operations in the published code's order, as docs/method.md tells them: each view by itself, the bank
  normalised anew for each use, softmax and cross-entropy apart, the bank's gradient written out by hand.

On a CPU caco has the environment of a run and keeps freed memory (with `--give-back` it does not, which shows what is really
held: a kept heap has gaps, by up to one more gradient); the others have what comes with torch. Memory is what the process
grew by from the moment the bank, its gradient and its velocity were there (these are 3 x 4 x K x D bytes).
The times of one size are taken in turns by processes that follow each other; ratios are of medians.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import arguments, as_a_run, describe, fresh, save, synchronise, table, take_turns
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from dense_bank import dense_loss, dense_nearest

from caco import fused
from caco.bank import Bank
from caco.device import choose_device
from caco.train.heap import keep_heap

TEMPERATURE = 0.08
RATE, MOMENTUM = 3.0, 0.9
WITHOUT_KERNELS = "streamed-bf16-without-kernels"
CONTESTANTS = ("streamed", "streamed-bf16", WITHOUT_KERNELS, "dense", "published-order")


def embeddings(batch: int, width: int, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return queries and keys of two views, unit rows."""
    generator = torch.Generator().manual_seed(0)
    views = [F.normalize(torch.randn(batch, width, generator=generator), dim=1).to(device) for _ in range(4)]
    return [view.requires_grad_() for view in views[:2]], views[2:]


def streamed(bank: Bank, queries: list[Tensor], keys: list[Tensor], products: torch.dtype) -> None:
    with torch.autocast(bank.weight.device.type, dtype=torch.bfloat16, enabled=products == torch.bfloat16):
        slots = bank.slots()
        positives = bank.nearest(torch.cat(keys), slots).view(2, -1)
        weights = torch.full((len(keys[0]), 1), 1 / len(keys[0]), device=bank.weight.device)
        pulls = []
        for query, chosen in zip(queries, positives.flip(0), strict=True):
            result = bank.loss(query, slots, chosen[:, None], weights)
            result.loss.backward()
            pulls.append(result.pull)
        bank.slot_term(slots, pulls).backward()


def dense(bank: Bank, queries: list[Tensor], keys: list[Tensor]) -> None:
    positives = dense_nearest(torch.cat(keys), bank.weight.detach()).view(2, -1)
    weights = torch.full((2 * len(keys[0]), 1), 1 / len(keys[0]), device=bank.weight.device)
    flipped = positives.flip(0).reshape(-1, 1)
    dense_loss(torch.cat(queries), bank.weight, flipped, weights, TEMPERATURE, TEMPERATURE).backward()


def published_order(bank: Bank, queries: list[Tensor], keys: list[Tensor]) -> None:
    loss, gradient = torch.zeros(()), torch.zeros(())
    for query, key in ((queries[0], keys[1]), (queries[1], keys[0])):
        with torch.no_grad():
            positives = (key @ F.normalize(bank.weight, dim=1).T).argmax(dim=1)
        logits = query @ F.normalize(bank.weight.detach(), dim=1).T / TEMPERATURE
        loss = loss.to(logits.device) + F.cross_entropy(logits, positives)
        with torch.no_grad():
            norms = bank.weight.norm(dim=1, keepdim=True)
            unit = bank.weight / norms
            probability = torch.softmax(query @ unit.T / TEMPERATURE, dim=1)
            chosen = torch.zeros_like(probability).scatter_(1, positives[:, None], 1)
            signed = torch.where(chosen > 0, 1 - probability, probability)
            of_unit = -(signed.T @ query) / (len(query) * TEMPERATURE)
            tangent = (of_unit - (of_unit * unit).sum(dim=1, keepdim=True) * unit) / norms
            gradient = gradient.to(tangent.device) + tangent
    loss.backward()
    bank.weight.grad = gradient


def contestant(
    name: str, size: int, width: int, batch: int, rounds: int, device: str, give_back: bool
) -> dict[str, Any]:
    """Run in a process of its own: return the seconds of a step and the bytes it takes beside bank and velocity."""
    if device == "cpu" and name.startswith("streamed") and not give_back:
        keep_heap()
    if name == WITHOUT_KERNELS:
        fused.of_parts = fused.of_loss = lambda weight, products: None
        fused.of_search = lambda weight: None
    choose_device(device)  # float32 products are float32's
    bank = Bank(size, width, TEMPERATURE, TEMPERATURE).to(device)
    at_once = True if device != "cpu" and name.startswith("streamed") else None  # as in a run
    optimizer = torch.optim.SGD([bank.weight], lr=RATE, momentum=MOMENTUM, fused=at_once)
    bank.weight.grad = torch.zeros_like(bank.weight)
    optimizer.step()
    queries, keys = embeddings(batch, width, device)
    work: dict[str, Callable[[], None]] = {
        "streamed": lambda: streamed(bank, queries, keys, torch.float32),
        "streamed-bf16": lambda: streamed(bank, queries, keys, torch.bfloat16),
        WITHOUT_KERNELS: lambda: streamed(bank, queries, keys, torch.bfloat16),
        "dense": lambda: dense(bank, queries, keys),
        "published-order": lambda: published_order(bank, queries, keys),
    }

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for query in queries:
            query.grad = None
        work[name]()
        optimizer.step()

    before = resident(device)
    reset_peak(device)
    seconds = take_turns({name: step}, rounds, warm_up=1, device=device)[name]
    return {**seconds.as_json(), "extra_bytes": peak(device) - before}


def resident(device: str) -> int:
    """Return the memory held now, bytes."""
    if device != "cpu":
        synchronise(device)
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS")


def reset_peak(device: str) -> None:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> int:
    """Return the most memory held since `reset_peak`, bytes."""
    return torch.cuda.max_memory_allocated(device) if device != "cpu" else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--slots", type=int, nargs="+")
    parser.add_argument("--width", type=int, nargs="+")
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--rounds", type=int)
    parser.add_argument(
        "--give-back", action="store_true", help="CPU: caco, too, gives freed memory back to the system"
    )
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    options = parser.parse_args()
    quick = options.quick
    sizes = options.slots or ([4096] if quick else [4096, 65_536, 262_144])
    widths, batches = options.width or [128], options.batch or ([64] if quick else [256])
    rounds = options.rounds or (2 if quick else 7)
    print(describe(options.device))
    results, rows = [], []
    for size, width, batch in [(s, w, b) for s in sizes for w in widths for b in batches]:
        plain = None
        for name in reversed(options.only):
            is_ours = options.device == "cpu" and name.startswith("streamed")
            environment = as_a_run(not options.give_back) if is_ours else {}
            how = rounds, options.device, options.give_back
            run = fresh(contestant, name, size, width, batch, *how, environment=environment)
            results.append(
                {"name": name, "slots": size, "width": width, "batch": batch, "others": run.others, **run.result}
            )
            plain = plain or run.result["median"]
            rows.append(
                (
                    f"{size:,} x {width}, batch {batch}: {name}",
                    f"{1000 * run.result['median']:,.1f}",
                    f"{plain / run.result['median']:.2f}",
                    f"{run.result['extra_bytes'] / 2**20:,.0f}",
                    f"{3 * 4 * size * width / 2**20:,.0f}",
                    run.others,
                )
            )
            save(options, {"results": results})
    columns = (
        "bank and contestant",
        "ms",
        "times as fast",
        "extra MiB",
        "bank, gradient, velocity MiB",
        "others, cores",
    )
    print(table(columns, rows))


if __name__ == "__main__":
    main()
