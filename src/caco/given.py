"""What a command was given, opened: an encoder to judge or use, and images."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from caco.after_training import Evaluation
from caco.data.source import ImageSource, open_source
from caco.distributed.world import World, choose_precision
from caco.evaluate.encoder import UsableEncoder, find_weights, load_encoder


@dataclass(frozen=True)
class Own:
    """What a Python caller gave as an object, in the place of what the options name; None: as they name it."""

    backbone: nn.Module | None = None
    data: ImageSource | None = None
    val: ImageSource | None = None


NOTHING = Own()


def open_encoder(world: World, options: Evaluation, own: nn.Module | None) -> UsableEncoder:
    """Return the encoder that the options name, or the user's own. Raises UsageError."""
    backbone, card = load_encoder(options, own)
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
    )


def open_images(options: Evaluation, own: ImageSource | None, data: str, split: str) -> ImageSource:
    """Return the user's own images, or those that `data` names. Raises UsageError."""
    return open_source(data, split=split, download=options.download) if own is None else own


def say_unfinished(run: str) -> None:
    """Say so when the encoder of a run folder is not the finished one."""
    if Path(run).is_dir() and (weights := find_weights(Path(run))).suffix == ".pt":
        print(f"{run} is not finished: its latest checkpoint is used, {weights.name}", file=sys.stderr)


def say_broken(source: ImageSource, broken: list[tuple[str, str]]) -> None:
    """Say how many images were left out, and why the first."""
    if broken:
        key, reason = broken[0]
        print(f"{len(broken):,} of {len(source):,} images were skipped, the first: {key} ({reason})", file=sys.stderr)
