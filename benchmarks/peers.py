"""The same training work through caco and through lightly (MoCo with its memory bank): images/s end to end, and memory.

    pip install lightly
    python benchmarks/peers.py [--quick] [--data FILE.parquet] [--out FILE.json]

Both sides: the same decoded 32 px pictures in memory, ResNet-18 with the small stem, the same batch, a bank of the same
size, two query and two key passes for each image (lightly's MoCo made symmetric by calling it twice with the views
exchanged). An image is one sample, that is two views. A step is timed from having the last batch trained to having this
one trained, so waiting for data counts. Each contestant runs in a fresh process and they take turns over the rounds;
the rate is that of the median step after the warm-up.

lightly runs as shipped: its transforms on Pillow images, its projection head (two layers; caco's has three), its
NTXentLoss, SGD, a torch DataLoader with 2 workers, fp32; a second row has bf16 autocast, which we added. caco runs as
`caco pretrain --recipe cifar` would: its loader, its step, the environment it gives itself. Memory is the peak of the
resident memory of the process, with what its workers add (a worker's part of shared pages); on a GPU also torch's peak
there.

solo-learn is left out: its packaged version (1.0.2) asks for torch 1.9.1 and cannot be installed beside a current one.
"""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from measure import arguments, as_a_run, describe, fresh, gigabytes, save, synchronise, table

SIZE, EMBEDDING = 32, 128
CONTESTANTS = {
    "lightly fp32 (as shipped)": ("lightly", "fp32", "direct"),
    "lightly bf16 (autocast added)": ("lightly", "bf16", "direct"),
    "caco fp32": ("caco", "fp32", "direct"),
    "caco fp32, winograd (CPU)": ("caco", "fp32", "winograd"),
    "caco bf16": ("caco", "bf16", "direct"),
    "caco bf16, winograd (CPU)": ("caco", "bf16", "winograd"),
}
"""System, precision, how its convolutions are computed."""


@dataclass(frozen=True)
class Work:
    """What every contestant does."""

    data: str
    batch: int
    bank: int
    steps: int
    warm_up: int
    device: str


def contestant(name: str, work: Work) -> dict[str, Any]:
    """Run in a process of its own: return the seconds of each step after the warm-up."""
    system, precision, convolution = CONTESTANTS[name]
    images = pictures(work)
    seconds = []
    if system == "caco":
        steps = caco_steps(images, work, precision, convolution)
    else:
        steps = lightly_steps(images, work, torch.bfloat16 if precision == "bf16" else torch.float32)
    began = time.perf_counter()
    for _ in range(work.warm_up + work.steps):
        next(steps)
        synchronise(work.device)
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
    steps.close()
    on_gpu = torch.cuda.max_memory_allocated() if work.device.startswith("cuda") else None
    return {"seconds": seconds[work.warm_up :], "gpu_bytes": on_gpu}


def pictures(work: Work) -> np.ndarray:
    """Return decoded pictures, uint8 [N, 32, 32, 3]: as many as the steps need, so that no epoch ends on the way."""
    from caco.data.source import open_source

    count = work.batch * (work.warm_up + work.steps + 6)
    source = open_source(work.data or f"textures:{count}")
    images = np.stack([source.load(index % len(source)) for index in range(count)])
    assert images.shape[1:] == (SIZE, SIZE, 3), f"--data: pictures must be {SIZE} x {SIZE}, not {images.shape[1:]}"
    return images


def caco_steps(images: np.ndarray, work: Work, precision: str, convolution: str) -> Iterator[None]:
    """Take training steps as `caco pretrain` does."""
    from dataclasses import replace

    from step import Step

    from caco.data.arrays import ArraySource
    from caco.recipes import find_recipe

    recipe = find_recipe("cifar")
    config = replace(
        recipe,
        batch_size=work.batch,
        bank_size=work.bank,
        device=work.device,
        precision=precision,  # type: ignore[arg-type]
        engine=replace(recipe.engine, convolution=convolution),  # type: ignore[arg-type]
    )
    assert config.views.size == SIZE and config.encoder.embedding == EMBEDDING
    step = Step(config, ArraySource(images))
    while True:
        step.whole()
        yield


class Pictures(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """lightly's side of the same pictures: a Pillow image through lightly's transform."""

    def __init__(self, images: np.ndarray, transform: Callable[[Any], Any]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index]))


def lightly_steps(images: np.ndarray, work: Work, precision: torch.dtype) -> Iterator[None]:
    """Take training steps of lightly's MoCo, symmetric, on caco's backbone."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.transforms import MoCoV2Transform

    from caco.backbone import create_backbone

    torch.manual_seed(0)
    device = torch.device(work.device)
    backbone = create_backbone("resnet18", SIZE).to(device).train()
    head = MoCoProjectionHead(512, 512, EMBEDDING).to(device)
    key_backbone, key_head = copy.deepcopy(backbone), copy.deepcopy(head)
    deactivate_requires_grad(key_backbone)
    deactivate_requires_grad(key_head)
    loss_of = NTXentLoss(temperature=0.1, memory_bank_size=(work.bank, EMBEDDING)).to(device)
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.06, momentum=0.9, weight_decay=5e-4)
    loader = torch.utils.data.DataLoader(
        Pictures(images, MoCoV2Transform(input_size=SIZE, gaussian_blur=0.0)),  # no blur at 32 px, as caco's recipe
        batch_size=work.batch,
        shuffle=True,
        drop_last=True,
        num_workers=2,
        pin_memory=device.type == "cuda",
    )

    def one_way(query_view: torch.Tensor, key_view: torch.Tensor) -> torch.Tensor:
        query = head(backbone(query_view))
        with torch.no_grad():
            key = key_head(key_backbone(key_view))
        return loss_of(query, key)  # type: ignore[no-any-return]

    for views in loader:
        first, second = (view.to(device, non_blocking=True) for view in views)
        update_momentum(backbone, key_backbone, m=0.99)
        update_momentum(head, key_head, m=0.99)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
            loss = one_way(first, second) + one_way(second, first)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", default="", help="32 px pictures, as --data of caco takes them (default: textures)")
    parser.add_argument("--steps", type=int, help="timed steps of each contestant in a round (default: 4)")
    parser.add_argument("--rounds", type=int, default=1, help="how often each contestant starts anew")
    parser.add_argument("--batch", type=int, help="default: 256")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=("fp32", "bf16"))
    parser.add_argument("--bank", type=int, help="slots, or entries of the memory bank (default: 65536)")
    options = parser.parse_args()
    quick = options.quick
    work = Work(
        data=str(Path(options.data).resolve()) if Path(options.data).exists() and options.data else options.data,
        batch=options.batch or (32 if quick else 256),
        bank=options.bank or (4096 if quick else 65_536),
        steps=options.steps or (2 if quick else 4),
        warm_up=1 if options.device == "cpu" else 10,
        device=options.device,
    )
    names = [
        name
        for name, (_, precision, convolution) in CONTESTANTS.items()
        if precision in options.precision and (convolution == "direct" or options.device == "cpu")
    ]
    if importlib.util.find_spec("lightly") is None:
        print("lightly is not installed, so there is nothing to compare with: pip install lightly")
        names = [name for name in names if CONTESTANTS[name][0] != "lightly"]

    print(describe(options.device), flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(options.rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            is_ours = CONTESTANTS[name][0] == "caco" and options.device == "cpu"
            answer = fresh(contestant, name, work, environment=as_a_run() if is_ours else {})
            seconds[name] += answer.result["seconds"]
            rounds[name].append(
                {
                    "main": answer.main_bytes,
                    "all": answer.family_bytes,
                    "gpu": answer.result["gpu_bytes"],
                    "others": answer.others,
                }
            )
            took = ", ".join(f"{value:.2f}" for value in answer.result["seconds"])
            print(f"{name}: {took} s a step, while other programs kept {answer.others} cores busy", flush=True)
    rows = {name: summary(name, seconds[name], rounds[name], work) for name in names}
    show(rows, work)
    data = Path(work.data).name  # not where it lies on this machine
    options.data = data
    save(options, {"work": {**vars(work), "data": data}, "contestants": rows})


def summary(name: str, seconds: list[float], rounds: list[dict[str, Any]], work: Work) -> dict[str, Any]:
    """Return one contestant's numbers over all rounds."""

    def most(kind: str) -> Any:
        known = [one[kind] for one in rounds if one[kind] is not None]
        return max(known) if known else None

    return {
        "system": CONTESTANTS[name][0],
        "precision": CONTESTANTS[name][1],
        "images_per_second": work.batch / median(seconds),
        "slowest": work.batch / max(seconds),
        "fastest": work.batch / min(seconds),
        "main_bytes": most("main"),
        "all_bytes": most("all"),
        "gpu_bytes": most("gpu"),
        "others_cores": most("others"),
        "seconds": seconds,
    }


def show(rows: dict[str, dict[str, Any]], work: Work) -> None:
    """Print the table, with ratios to lightly as shipped and to lightly at the same precision."""
    peers = {row["precision"]: row for row in rows.values() if row["system"] == "lightly"}

    def times(row: dict[str, Any], precision: str, quantity: str) -> str | None:
        peer = peers.get(precision)
        if peer is None or not peer[quantity] or not row[quantity]:
            return None
        return f"{row[quantity] / peer[quantity]:.2f}"

    print(f"\nResNet-18, {SIZE} px, batch {work.batch}, bank {work.bank:,} x {EMBEDDING}; ratios to lightly\n")
    columns = (
        "",
        "images/s",
        "slowest - fastest",
        "x as shipped",
        "x same precision",
        "main GB",
        "all GB",
        "GPU GB",
        "memory x as shipped",
    )
    cells = [
        (
            name,
            f"{row['images_per_second']:,.1f}",
            f"{row['slowest']:,.1f} - {row['fastest']:,.1f}",
            times(row, "fp32", "images_per_second"),
            times(row, row["precision"], "images_per_second"),
            gigabytes(row["main_bytes"]),
            gigabytes(row["all_bytes"]),
            gigabytes(row["gpu_bytes"]),
            times(row, "fp32", "gpu_bytes" if row["gpu_bytes"] else "all_bytes"),
        )
        for name, row in rows.items()
    ]
    print(table(columns, cells))


if __name__ == "__main__":
    main()
