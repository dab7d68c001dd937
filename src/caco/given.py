"""What a command was given, opened: an encoder to judge or use, and images."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from caco.after_training import Evaluation
from caco.data.source import ImageSource, open_source
from caco.distributed.world import World
from caco.evaluate.encoder import UsableEncoder, find_weights, load_encoder
from caco.precision import choose_precision


def open_encoder(world: World, options: Evaluation, module: nn.Module | None) -> UsableEncoder:
    """Return the encoder that the options name, or the caller's module as one. Raises UsageError."""
    backbone, card = load_encoder(options, module)
    if world.is_main:
        say_unfinished(options.run)
    if backbone is not None:
        backbone.to(world.device).to(memory_format=torch.channels_last)
    return UsableEncoder(
        backbone=backbone,
        preparation=card.preparation(),
        world=world,
        precision=choose_precision(options.precision, world.device),
        workers=world.worker_count(options.workers),
        batch_size=options.batch_size,
        card=card,
    )


def open_images(options: Evaluation, source: ImageSource | None, data: str, split: str) -> ImageSource:
    """Return the caller's images, or those that `data` names. Raises UsageError."""
    return open_source(data, split=split, download=options.download) if source is None else source


def say_unfinished(run: str) -> None:
    """Say so when the encoder of a run folder is not the finished one."""
    if Path(run).is_dir() and (weights := find_weights(Path(run))).suffix == ".pt":
        print(f"{run} is not finished: its latest checkpoint is used, {weights.name}", file=sys.stderr)


def say_broken(source: ImageSource, broken: list[tuple[str, str]]) -> None:
    """Say how many images were left out, and why the first."""
    if broken:
        key, reason = broken[0]
        print(f"{len(broken):,} of {len(source):,} images were skipped, the first: {key} ({reason})", file=sys.stderr)
