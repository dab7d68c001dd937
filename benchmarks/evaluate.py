"""The evaluation: kNN search, linear probe and feature extraction, each against the least that torch needs for it.

    python benchmarks/evaluate.py [--quick] [--parts knn linear extract] [--data FOLDER] [--out FILE.json]

knn      `knn_accuracy` on made features against a plain search (normalise once, one product and one topk for each 256
         queries) and against the bare matrix products of the same size, without any search.
linear   an epoch of `train_heads`, ten learning rates at once, against an epoch of one rate with nn.Linear, autograd and
         torch.optim.SGD.
extract  `extract` (decode, resize, normalise, forward, collect) of 224 px pictures against the bare forward pass of the
         same backbone on batches that are ready, at the same precision and with the same threads, in batches of two
         sizes. On a CPU in fp32 also with Winograd's convolutions, as the commands take them for many pictures. --data: real
         pictures; without it, made ones in memory.

In each part the contestants take turns in one process; times are medians over the rounds.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from measure import Others, Seconds, arguments, describe, save, table, take_turns
from torch import Tensor, nn
from torch.nn import functional as F

from caco.backbone import create_backbone
from caco.data.arrays import ArraySource
from caco.data.source import ImageSource, open_source
from caco.device import choose_device
from caco.distributed.world import World
from caco.evaluate.centre_views import CentreViews
from caco.evaluate.features import extract
from caco.evaluate.knn import Voting, knn_accuracy
from caco.evaluate.linear import LEARNING_RATES, train_heads
from caco.precision import PRECISIONS
from caco.train.heap import keep_heap
from caco.views import Preparation
from caco.winograd.network import can_use_winograd, use_winograd

NEIGHBOURS, CLASSES = 20, 100


def made_features(count: int, width: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Return features around class centres, as an encoder's are, and their labels; on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    centres = torch.randn(CLASSES, width, generator=torch.Generator(device).manual_seed(9), device=device)
    labels = torch.randint(CLASSES, (count,), generator=generator, device=device)
    features = torch.randn(count, width, generator=generator, device=device)
    return features.add_(centres[labels], alpha=0.5), labels


def matmul_rate(device: torch.device, precision: torch.dtype = torch.float32) -> float:
    """Return the FLOP/s of a large square product: what the machine can do at best."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=precision) for _ in range(2))
    out = torch.empty_like(a)
    seconds = take_turns({"product": lambda: torch.mm(a, b, out=out)}, rounds=7, warm_up=2, device=device)["product"]
    return 2 * side**3 / seconds.least


def knn(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Search with made features."""
    images, width, count = (1_281_167, 2048, 50_000) if device.type == "cuda" else (128_000, 512, 5_000)
    if options.quick:
        images, width, count = 20_000, 128, 2_000
    reference, labels = made_features(images, width, device, seed=0)
    queries, truth = made_features(count, width, device, seed=1)

    def ours() -> float:
        return knn_accuracy(reference, labels, queries, truth, Voting([NEIGHBOURS]), CLASSES)[0].top1

    def plain() -> float:
        unit, right = F.normalize(reference, dim=1), 0
        for part, own in zip(queries.split(256), truth.split(256), strict=True):
            cosines, indices = (F.normalize(part, dim=1) @ unit.T).topk(NEIGHBOURS, dim=1)
            votes = torch.zeros(len(part), CLASSES, device=device)
            votes.scatter_add_(1, labels[indices], (cosines / 0.2).exp())
            right += int((votes.argmax(dim=1) == own).sum())
        return right / count

    def products() -> None:
        for part in queries.split(4096):
            for other in reference.split(8192):
                torch.mm(part, other.T)

    assert abs(ours() - plain()) <= 2 / count  # equal but for the rounding of near ties
    times = take_turns(
        {"caco knn_accuracy": ours, "plain torch search": plain, "bare products": products},
        rounds=2 if options.quick else options.rounds,
        warm_up=0,
        device=device,
    )
    operations, ceiling = 2 * images * width * count, matmul_rate(device)
    print(
        f"\nkNN, {count:,} queries in {images:,} x {width} ({NEIGHBOURS} neighbours); matmul {ceiling / 1e9:,.0f} GFLOP/s\n"
    )
    rows = [
        (
            name,
            f"{seconds.median:.2f}",
            f"{count / seconds.median:,.0f}",
            f"{operations / seconds.median / 1e9:,.0f}",
            f"{operations / seconds.median / ceiling:.0%}",
        )
        for name, seconds in times.items()
    ]
    print(table(("", "s", "images/s", "GFLOP/s", "of matmul"), rows))
    return {"images": images, "width": width, "queries": count, "matmul": ceiling, **as_json(times)}


def linear(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Train an epoch of linear heads on made features."""
    images, width = (1_281_167, 2048) if device.type == "cuda" else (50_000, 512)
    if options.quick:
        images, width = 10_000, 128
    batch = 1024
    features, labels = made_features(images, width, device, seed=0)

    def ours(rates: tuple[float, ...]) -> Callable[[], object]:
        return lambda: train_heads(features, labels, CLASSES, rates, 1, batch, 0.9, 0)

    def plain() -> None:
        head = nn.Linear(width, CLASSES).to(device)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
        for chosen in torch.randperm(images).to(device).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(head(features[chosen]), labels[chosen]).backward()
            optimizer.step()

    many, one = f"caco, {len(LEARNING_RATES)} rates", "caco, 1 rate"
    times = take_turns(
        {many: ours(LEARNING_RATES), one: ours(LEARNING_RATES[:1]), "plain torch, 1 rate": plain},
        rounds=2 if options.quick else options.rounds + 2,
        device=device,
    )
    counts = {many: len(LEARNING_RATES), one: 1, "plain torch, 1 rate": 1}
    print(f"\nLinear probe, an epoch of {images:,} x {width}, {CLASSES} classes, batch {batch}\n")
    each = times["plain torch, 1 rate"].median
    rows = [
        (name, f"{seconds.median:.3f}", f"{1 / seconds.median:.2f}", f"{counts[name] * each / seconds.median:.1f}")
        for name, seconds in times.items()
    ]
    print(table(("", "s", "epochs/s", "heads/s x plain"), rows))
    return {"images": images, "width": width, "classes": CLASSES, "batch": batch, **as_json(times)}


def embed(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Extract features of 224 px pictures."""
    result = {}
    if device.type == "cpu":
        keep_heap()  # as the commands do; for all contestants
    for name in ("resnet18",) if options.quick else ("resnet18", "resnet50"):
        for precision in ("fp32", "bf16"):
            result[f"{name} {precision}"] = embed_with(name, precision, options, device)
    return result


def embed_with(name: str, precision: Any, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Extract with one backbone at one precision."""
    size, count = 224, (16 if options.quick else 128) * (16 if device.type == "cuda" else 1)
    torch.manual_seed(0)
    backbone, bare = (create_backbone(name, size).to(device).eval() for _ in range(2))
    backbone.to(memory_format=torch.channels_last)
    source = pictures(options.data, count)
    images = torch.randn(min(count, 256), 3, size, size, device=device)
    rounds = 2 if options.quick else options.rounds

    def ours(network: nn.Module) -> object:
        workers = World(device).worker_count("auto")
        views = CentreViews(source, Preparation(size, resize=256), np.arange(count), workers=workers)
        return extract(network, views, device=device, precision=PRECISIONS[precision])

    def forward(batch: int) -> Callable[[], None]:
        @torch.no_grad()
        def run() -> None:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
                for _ in range(count // len(images)):
                    for part in images.split(batch):
                        bare(part)

        return run

    contestants: dict[str, Callable[[], object]] = {"caco extract": lambda: ours(backbone)}
    if device.type == "cpu" and precision == "fp32" and can_use_winograd():
        winograd = copy.deepcopy(backbone)
        use_winograd(winograd)
        contestants["caco extract, Winograd's convolutions"] = lambda: ours(winograd)
    contestants |= {
        f"bare forward, batches of {batch}": forward(batch)
        for batch in ((64, 256) if device.type == "cuda" else (16, 64))
    }
    times = take_turns(contestants, rounds, device=device)
    print(f"\nExtraction, {name}, {size} px, {precision}, {count} pictures ({options.data or 'made, in memory'})\n")
    fastest = min(seconds.median for name, seconds in times.items() if name.startswith("bare"))
    rows = [
        (title, f"{count / seconds.median:,.1f}", f"{fastest / seconds.median:.2f}") for title, seconds in times.items()
    ]
    print(table(("", "images/s", "x the fastest bare forward"), rows), flush=True)
    return {"pictures": count, **as_json(times)}


def pictures(data: str, count: int) -> ImageSource:
    """Return the source to extract from, with at least `count` pictures."""
    if not data:
        return ArraySource(np.random.default_rng(0).integers(0, 256, (count, 256, 320, 3), dtype=np.uint8))
    source = open_source(data)
    if len(source) < count:
        raise SystemExit(f"--data {data}: {len(source)} pictures; at least {count} are needed")
    return source


def as_json(times: dict[str, Seconds]) -> dict[str, Any]:
    return {"seconds": {name: seconds.as_json() for name, seconds in times.items()}}


PARTS = {"knn": knn, "linear": linear, "extract": embed}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--data", default="", help="pictures to extract features of (default: made ones in memory)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    device = choose_device(options.device)
    print(describe(device))
    result = {}
    for name in options.parts:
        with Others() as others:
            part = PARTS[name](options, device)
        print(f"\n(other programs kept {others.cores} cores busy)", flush=True)
        result[name] = {**part, "others_cores": others.cores}
        save(options, result)


if __name__ == "__main__":
    main()
