"""All that a run of pre-training needs, built from its configuration before anything is written."""

from __future__ import annotations

import math
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from caco.backbone import SMALL_VIEW, adopt_backbone, create_backbone, create_encoder, stem_of, try_size
from caco.bank import Bank
from caco.checkpointing import checkpoint_blocks
from caco.config import Pretrain
from caco.data.broken import BrokenImages
from caco.data.folder import say_left_out
from caco.data.loader import TrainingViews, check_batch_size
from caco.data.source import ImageSource, open_source
from caco.distributed.bank_shards import ProcessShards
from caco.distributed.batch_norm import synchronise_batch_norm
from caco.distributed.world import World
from caco.errors import UsageError
from caco.memory import free_on, in_words
from caco.model import CaCo, view_pairs
from caco.objects import Objects
from caco.optim import encoder_optimizer
from caco.precision import choose_precision
from caco.train.captured import is_captured
from caco.train.decoders import choose_decoder
from caco.train.engine import choose_engine, layout_of
from caco.train.meters import Meters
from caco.train.monitor import KnnMonitor, check_readable, create_monitor
from caco.train.run_folder import check_same_mathematics, read_config
from caco.train.start import load_start, start_from
from caco.train.state import TrainingState
from caco.train.step import warm_start_steps
from caco.train.trials import compile_module
from caco.weights import BackboneCard
from caco.winograd.network import can_use_winograd

SMALL_PICTURE = 32
"""Side of views, in pixels, up to which nobody would want the usual stem."""
RANDOM_STRIDE = 0x5851F42D4C957F2D
"""Between the seeds of two processes: no process of a run has the seed of another run that one may compare it with."""


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start; nothing has been written yet."""

    config: Pretrain
    """Without "auto"."""
    state: TrainingState
    loader: TrainingViews
    broken: BrokenImages
    monitor: KnnMonitor | None
    card: BackboneCard
    precision: torch.dtype
    engine: str
    """How the encoder is computed, and images are decoded, and why, in words."""
    objects: Objects
    """What the run was given in place of names."""


def prepare(world: World, config: Pretrain, objects: Objects, index: Path) -> Prepared:
    """Build all that a run needs, without touching its folder. index: where the listing of a folder is to be written.

    Raises UsageError for all that can be wrong with the options, the images and the weights to start from.
    """
    backbone = _start_backbone(config, objects.backbone)
    kept = Path(config.out) / index.name
    if config.resume and kept.exists():
        shutil.copy2(kept, index)
    source = objects.data if objects.data is not None else _open(config, config.data, world, index_cache=index)
    if world.is_main:
        say_left_out(source)
        _say_stem(config, backbone)
    val = _open_val(config, objects.val, world)
    world.wait()  # to list or unpack images may take one machine much longer than another
    check_batch_size(source, config.batch_size, world.size)
    config = _resolve_epochs(config, len(source) // config.batch_size)
    steps = (int(config.epochs) - config.start_epoch) * (len(source) // config.batch_size)
    config, why = _choose_engine(config, backbone, world, steps)
    if config.resume:
        saved = world.decide_in_main(lambda: read_config(Path(config.out)))  # others may not see the folder
        check_same_mathematics(saved, config)
    precision = choose_precision(config.precision, world.device)
    monitor = _create_monitor(config, source, val, world, precision)
    broken = BrokenImages(len(source), config.monitor.broken_share)
    loader = _create_loader(config, source, world, broken)
    config, words = _choose_decoder(config, loader, backbone, world, steps)
    why = "; ".join(filter(None, [why, words]))
    state = create_state(config, backbone, world)
    if not config.resume:
        start_from(state, config, loader.steps_per_epoch, warm_start_steps(config, loader.steps_per_epoch), world)
    if world.rank:  # all have drawn the same weights; what is dropped in training, each draws for itself
        torch.manual_seed((config.seed + world.rank * RANDOM_STRIDE) % 2**63)
    return Prepared(config, state, loader, broken, monitor, _backbone_card(config, backbone), precision, why, objects)


def check_division(config: Pretrain, world: World) -> None:
    """Raise UsageError when the batch or a sharded bank cannot be divided among the processes."""
    parts = world.size * config.accumulate
    if config.batch_size % parts:
        near = max(config.batch_size // parts, 1) * parts
        among = " x ".join(
            [f"{world.size} processes"] * (world.size > 1)
            + [f"--accumulate {config.accumulate}"] * (config.accumulate > 1)
        )
        raise UsageError(f"--batch-size {config.batch_size} cannot be divided among {among}; {near} can")
    if config.batch_size == config.accumulate:
        raise UsageError("--batch-size: batch norm needs at least 2 images at a time; lower --accumulate")
    if config.bank.sharded and config.bank_size % world.size:
        raise UsageError(f"--bank-size {config.bank_size} cannot be divided among {world.size} processes")


def check_bank_fits(config: Pretrain, world: World) -> None:
    """Raise UsageError when the bank, with its gradient and velocity, is larger than this process's free memory."""
    slots = config.bank_size // (world.size if config.bank.sharded else 1)
    needed = 3 * 4 * slots * config.encoder.embedding
    free = free_on(world.device) // (world.local_size if world.device.type == "cpu" else 1)
    if needed > free:
        raise UsageError(
            f"--bank-size {config.bank_size} x --encoder.embedding {config.encoder.embedding}: with gradient and velocity "
            f"{in_words(needed)} a process, and {in_words(free)} are free; lower one, or divide the bank with --bank.sharded"
        )


def create_state(config: Pretrain, backbone: nn.Module, world: World) -> TrainingState:
    """Return the networks, bank and optimizers at the start of a run."""
    encoder = create_encoder(
        backbone, config.encoder.projector, config.encoder.embedding, centred=config.encoder.centred
    )
    bank = Bank(
        config.bank_size,
        config.encoder.embedding,
        config.bank.temperature,
        config.bank.slot_temperature,
        ProcessShards(world) if config.bank.sharded else None,
    )
    model = CaCo(synchronise_batch_norm(encoder, world), bank, view_pairs(config.views.large, config.views.small))
    model.to(world.device).to(memory_format=layout_of(config))
    if config.engine.checkpointing:
        checkpoint_blocks(backbone)
    if config.engine.compile == "on":
        compile_module(model.encoder)
        compile_module(model.key_encoder)
    lr = config.lr * config.batch_size / 256
    options = config.optimizer
    return TrainingState(
        model=model,
        optimizer=encoder_optimizer(options.name, model.encoder, lr, options.momentum, options.weight_decay),
        bank_optimizer=torch.optim.SGD(
            [model.bank.weight],
            lr=config.bank.lr,
            momentum=config.bank.momentum,
            fused=True if world.device.type == "cuda" else None,  # bank, gradient and velocity are read once
        ),
        meters=Meters(config.bank_size, world.device),
    )


def _open(config: Pretrain, data: str, world: World, **options: Any) -> ImageSource:
    """Open a set of images; one process of each machine downloads it first, where that is asked for."""
    if config.download and world.local_rank == 0:
        open_source(data, download=True, **options)
    if config.download:
        world.wait()
    try:
        return open_source(data, **options)
    except UsageError as error:
        if not config.resume:
            raise
        told = str(error)
        end = "" if told.endswith((".", "?")) else "."
        moved = "If the images have moved since the run began, name them anew: --data, --val"
        raise UsageError(f"{told}{end} {moved}") from error


def _choose_engine(config: Pretrain, backbone: nn.Module, world: World, steps: int) -> tuple[Pretrain, str]:
    passes = steps * config.accumulate * (config.views.large + config.views.small)
    batch = config.batch_size // (world.size * config.accumulate)
    (lacking,) = world.vote(not can_use_winograd())
    return world.decide_in_main(
        lambda: choose_engine(
            config, backbone, world.device, passes, batch, _say, not lacking, is_captured(config, world)
        )
    )


def _choose_decoder(
    config: Pretrain, loader: TrainingViews, backbone: nn.Module, world: World, steps: int
) -> tuple[Pretrain, str]:
    """Let the loader's images be decoded as configured; return the configuration without "auto", and why, in words."""
    is_graph = is_captured(config, world)
    decoder, why = world.decide_in_main(lambda: choose_decoder(config, loader, backbone, steps, _say, is_graph))
    if decoder == "gpu":
        on_gpu = loader.gpu_maker()
        (lacking,) = world.vote(on_gpu is None)
        if on_gpu is None or lacking:
            decoder, why = "cpu", "images decoded by threads, for the GPU of some process cannot"
        else:
            loader.use(on_gpu)
    return replace(config, engine=replace(config.engine, decoder=decoder)), why


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _start_backbone(config: Pretrain, module: nn.Module | None) -> nn.Module:
    """Return the backbone the run starts from: seeded at random, or from --weights. module: the caller's own."""
    torch.manual_seed(config.seed)
    size, stem = config.views.size, config.encoder.stem
    if config.backbone == "own" and module is None:
        raise UsageError(
            "the run trains a module of your own: go on from Python, caco.pretrain(..., backbone=module, resume=True)"
        )
    backbone = create_backbone(config.backbone, size, stem) if module is None else adopt_backbone(module, size)
    if not any(parameter.requires_grad for parameter in backbone.parameters()):
        raise UsageError("the backbone has no parameter to train: requires_grad is False for all, or there is none")
    if config.views.small:
        try_size(backbone, config.views.small_size)
    if config.weights and not config.resume:
        load_start(backbone, config.weights)
    return backbone


def _say_stem(config: Pretrain, backbone: nn.Module) -> None:
    """Say which stem a ResNet was given where the views' size decides, and the other one is many times as fast."""
    if config.encoder.stem == "auto" and config.views.size > SMALL_PICTURE and stem_of(backbone) == "small":
        _say(
            f"views of at most {SMALL_VIEW} px: the ResNet gets the stem for small pictures, with which a step takes many "
            "times as long (--encoder.stem standard: the usual one)"
        )


def _open_val(config: Pretrain, val: ImageSource | None, world: World) -> ImageSource | None:
    """Return the images of --val, of which one at least can be read. Raises UsageError."""
    if val is None and config.val:
        val = _open(config, config.val, world, split="val")
    if val is not None and config.monitor.knn_epochs > 0:
        check_readable(val)
    return val


def _create_monitor(
    config: Pretrain, source: ImageSource, val: ImageSource | None, world: World, precision: torch.dtype
) -> KnnMonitor | None:
    options, views, workers = config.monitor, config.views, world.worker_count(config.workers)
    return create_monitor(source, val, options, views, config.seed, world, precision, workers)


def _backbone_card(config: Pretrain, backbone: nn.Module) -> BackboneCard:
    views = config.views
    return BackboneCard(
        backbone=config.backbone,
        stem=stem_of(backbone),
        size=views.size,
        resize=views.resize(),
        mean=views.mean,
        std=views.std,
    )


def _create_loader(config: Pretrain, source: ImageSource, world: World, broken: BrokenImages) -> TrainingViews:
    return TrainingViews.create(
        source,
        config.views.augmentations(),
        config.views.mean,
        config.views.std,
        batch_size=config.batch_size,
        seed=config.seed,
        workers=world.worker_count(config.workers),
        device=world.device,
        broken=broken,
        rank=world.rank,
        world_size=world.size,
        local_size=world.local_size,
        layout=layout_of(config),
        hold=config.engine.decoder != "gpu",
    )


def _resolve_epochs(config: Pretrain, steps_per_epoch: int) -> Pretrain:
    """Put a number in place of --epochs auto. Raises UsageError when --start-epoch leaves nothing of it."""
    if config.epochs != "auto":
        return config
    epochs = min(max(math.ceil(20_000 / steps_per_epoch), 50), 800)
    if config.start_epoch >= epochs:
        raise UsageError(
            f"--start-epoch {config.start_epoch}: nothing is left of {epochs} epochs (--epochs auto); name a number"
        )
    return replace(config, epochs=epochs)
