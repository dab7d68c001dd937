"""What an encoder has learned after the same epochs on the same images: caco, and other methods made of lightly's parts.

    pip install lightly
    python benchmarks/accuracy.py --data cifar10-train.parquet --val cifar10-test.parquet --epochs 10 [--out FILE.json]
    python benchmarks/accuracy.py ... --backbone resnet18 --epochs 200                                    (a GPU)
    python benchmarks/accuracy.py --recipe small-photos --size 64 --data photos/train --val photos/val --epochs 60

All methods: the same backbone from the same start, the same two views of each image in the same order (caco's loader, the
views of the recipe), the same batch, judged by `caco.knn` (20 neighbours). All but caco have lightly's heads, losses and momentum
updates, and the settings of lightly's CIFAR-10 benchmark: SGD of 0.06 per 128 images, cosine to 0, weight decay 5e-4;
SimCLR at temperature 0.5; MoCo symmetric, at temperature 0.1, with a memory bank of 4,096 keys; BYOL. caco trains by its
recipe, in fp32, with the size, backbone, epochs and batch that are asked for. A step of caco, MoCo and BYOL has two query
and two key passes, one of SimCLR two query passes. The seconds are those of training, without the judging.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import arguments, describe, fresh, save, table
from torch import Tensor, nn

import caco
from caco.backbone import create_backbone, stem_of
from caco.config import Pretrain
from caco.data.broken import BrokenImages
from caco.data.loader import TrainingViews
from caco.data.source import open_source
from caco.device import choose_device
from caco.distributed.world import World
from caco.recipes import find_recipe
from caco.train.engine import search_kernels
from caco.train.heap import keep_heap
from caco.weights import BackboneCard, save_backbone

LR, WEIGHT_DECAY, KEY_MOMENTUM, MEMORY_BANK = 0.06 / 128, 5e-4, 0.99, 4096
NEIGHBOURS = 20


class Method(NamedTuple):
    """A method that is not ours: what it trains beside the backbone, its loss, and what follows its copies."""

    heads: list[nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    """Of the two views of a batch."""
    followers: list[tuple[nn.Module, nn.Module]]
    """Pairs of a module and its momentum copy."""


def follower(module: nn.Module) -> nn.Module:
    """Return a copy that has no gradient."""
    from lightly.models.utils import deactivate_requires_grad

    copied = copy.deepcopy(module)
    deactivate_requires_grad(copied)
    return copied


def simclr(backbone: nn.Module, width: int) -> Method:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    head, contrast = SimCLRProjectionHead(width, 512, 128), NTXentLoss(temperature=0.5)
    return Method([head], lambda first, second: contrast(head(backbone(first)), head(backbone(second))), [])


def moco(backbone: nn.Module, width: int) -> Method:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead

    head = MoCoProjectionHead(width, 512, 128)
    key_backbone, key_head = follower(backbone), follower(head)
    contrast = NTXentLoss(temperature=0.1, memory_bank_size=(MEMORY_BANK, 128))

    def one_way(query_view: Tensor, key_view: Tensor) -> Tensor:
        with torch.no_grad():
            key = key_head(key_backbone(key_view))
        return contrast(head(backbone(query_view)), key)  # type: ignore[no-any-return]

    def both_ways(first: Tensor, second: Tensor) -> Tensor:
        return (one_way(first, second) + one_way(second, first)) / 2

    return Method([head, contrast], both_ways, [(backbone, key_backbone), (head, key_head)])


def byol(backbone: nn.Module, width: int) -> Method:
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead

    head, predictor = BYOLProjectionHead(width, 1024, 256), BYOLPredictionHead(256, 1024, 256)
    key_backbone, key_head = follower(backbone), follower(head)
    distance = NegativeCosineSimilarity()

    def one_way(query_view: Tensor, key_view: Tensor) -> Tensor:
        with torch.no_grad():
            key = key_head(key_backbone(key_view))
        return distance(predictor(head(backbone(query_view))), key)  # type: ignore[no-any-return]

    def both_ways(first: Tensor, second: Tensor) -> Tensor:
        return (one_way(first, second) + one_way(second, first)) / 2

    return Method([head, predictor], both_ways, [(backbone, key_backbone), (head, key_head)])


OTHERS: dict[str, Callable[[nn.Module, int], Method]] = {"SimCLR": simclr, "MoCo": moco, "BYOL": byol}


def configuration(options: argparse.Namespace) -> Pretrain:
    """Return caco's recipe at the size asked for; its views, batch and backbone are those of all methods."""
    recipe = find_recipe(options.recipe)
    stem = "standard" if options.backbone == "resnet10_narrow" else recipe.encoder.stem
    return replace(
        recipe,
        **{
            "data": options.data,
            "val": options.val,
            "device": options.device,
            "seed": options.seed,
            "precision": "fp32",
        },
        **{"backbone": options.backbone, "epochs": options.epochs, "batch_size": options.batch or recipe.batch_size},
        views=replace(recipe.views, size=options.size or recipe.views.size),
        encoder=replace(recipe.encoder, stem=stem),
        monitor=replace(recipe.monitor, knn_epochs=0),
    )


def ours(config: Pretrain, out: Path) -> float:
    """Train as `caco pretrain` does; return the seconds. The backbone is then in `out`."""
    from caco.commands import pretrain

    began = time.perf_counter()
    pretrain(replace(config, out=str(out)))
    return time.perf_counter() - began


def other(make: Callable[[nn.Module, int], Method], config: Pretrain, out: Path) -> float:
    """Train another method on the same views; return the seconds. The backbone is then in `out`."""
    device = choose_device(config.device)
    if device.type == "cpu":
        keep_heap()
    search_kernels(device)
    torch.manual_seed(config.seed)
    backbone = create_backbone(config.backbone, config.views.size, config.encoder.stem)
    method = make(backbone, int(backbone.num_features))  # type: ignore[arg-type]
    trained = nn.ModuleList([backbone, *method.heads]).to(device, memory_format=torch.channels_last).train()
    for _, key_module in method.followers:
        key_module.to(device, memory_format=torch.channels_last).train()
    loader = views_of(config, device)
    lr = LR * config.batch_size
    optimizer = torch.optim.SGD(trained.parameters(), lr=lr, momentum=0.9, weight_decay=WEIGHT_DECAY)
    began = time.perf_counter()
    steps = int(config.epochs) * loader.steps_per_epoch
    for step, batch in enumerate(loader.batches(0, 0, steps)):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * (step // loader.steps_per_epoch) / int(config.epochs))) / 2
        follow(method.followers)
        first, second = batch.views
        loss = method.loss(first, second)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - began
    views = config.views
    card = BackboneCard(config.backbone, stem_of(backbone), views.size, views.resize(), views.mean, views.std)
    save_backbone(out, backbone, card)
    return seconds


def follow(pairs: Iterable[tuple[nn.Module, nn.Module]]) -> None:
    """Move each momentum copy a little toward its module."""
    from lightly.models.utils import update_momentum

    for module, key_module in pairs:
        update_momentum(module, key_module, m=KEY_MOMENTUM)


def views_of(config: Pretrain, device: torch.device) -> TrainingViews:
    """Return the loader that `caco pretrain` would have."""
    source, views = open_source(config.data), config.views
    return TrainingViews.create(
        source,
        views.augmentations(),
        views.mean,
        views.std,
        batch_size=config.batch_size,
        seed=config.seed,
        workers=World(device).worker_count(config.workers),
        device=device,
        broken=BrokenImages(len(source), 0.0),
    )


def contestant(name: str, config: Pretrain) -> dict[str, Any]:
    """Train and judge one method, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run" if name == "caco" else "backbone.safetensors")
        train = ours if name == "caco" else partial(other, OTHERS[name])
        seconds = train(config, out)
        judged = caco.knn(out, data=config.data, val=config.val, neighbours=NEIGHBOURS, device=config.device)
    assert judged is not None
    return {"seconds": seconds, "top1": judged["top1"], "interval": judged["top1_interval"]}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", required=True, help="labelled pictures, as --data of caco takes them")
    parser.add_argument("--val", required=True, help="labelled pictures to judge with")
    parser.add_argument(
        "--recipe", default="cifar", help="caco's; views, batch and size are for all (default: %(default)s)"
    )
    parser.add_argument("--size", type=int, help="side of the views in pixels (default: the recipe's)")
    parser.add_argument("--epochs", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--batch", type=int, help="default: the recipe's")
    parser.add_argument("--backbone", default="resnet10_narrow", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=["caco", *OTHERS], default=["caco", *OTHERS])
    options = parser.parse_args()
    if options.quick:
        options.epochs, options.batch = 1, 128
    print(describe(options.device), flush=True)
    config = configuration(options)
    rows = {}
    for name in options.only:
        rows[name] = fresh(contestant, name, config).result
        print(f"{name}: kNN {rows[name]['top1']:.1f} % after {rows[name]['seconds']:.0f} s", flush=True)
    cells = [
        (name, f"{row['top1']:.1f}", "-".join(f"{bound:.1f}" for bound in row["interval"]), f"{row['seconds']:,.0f}")
        for name, row in rows.items()
    ]
    print(f"\n{config.backbone}, {config.epochs} epochs, batch {config.batch_size}, seed {config.seed}\n")
    print(table(("method", "kNN top-1, %", "95 % interval", "seconds"), cells))
    options.data, options.val = Path(options.data).name, Path(options.val).name  # not where they lie on this machine
    save(options, {"methods": rows})


if __name__ == "__main__":
    main()
