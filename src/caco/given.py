"""What a command was given, opened: an encoder to judge or use, and images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from caco.after_training import BASELINES, Evaluation
from caco.data.source import ImageSource, open_source
from caco.distributed.world import World
from caco.evaluate.encoder import UsableEncoder, find_weights, load_encoder
from caco.evaluate.fast_convolutions import use_fast_convolutions
from caco.foreign import named_preparation
from caco.precision import choose_precision
from caco.views import Preparation, usual_resize


def open_encoder(world: World, options: Evaluation, module: nn.Module | None, images: int) -> UsableEncoder:
    """Return the encoder that the options name, or the caller's module as one. Raises UsageError.

    images: how many all processes together will show it.
    """
    backbone, card = load_encoder(options, module)
    precision = choose_precision(options.precision, world.device)
    if world.is_main:
        say_unfinished(options.run)
        if backbone is not None:
            say_prepared(options, card.preparation())
    if backbone is not None:
        backbone.to(world.device).to(memory_format=torch.channels_last)
        use_fast_convolutions(backbone, card.size, images // world.size, world.device, precision)
    return UsableEncoder(
        backbone=backbone,
        preparation=card.preparation(),
        world=world,
        precision=precision,
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


def say_prepared(options: Evaluation, preparation: Preparation) -> None:
    """Say how pictures are prepared where that is not the usual way, or where it is and the model's is another."""
    usual = Preparation(preparation.size, usual_resize(preparation.size))
    if preparation != usual or options.mean or options.std:
        print(f"pictures are prepared so: {_in_words(preparation)}", file=sys.stderr)
        return
    theirs = named_preparation(options.backbone) if options.backbone and options.run not in BASELINES else None
    if theirs is not None and (theirs.mean, theirs.std) != (usual.mean, usual.std):
        print(
            f"pictures are normalised by ImageNet's mean and std; timm's own weights of {options.backbone} have mean "
            f"{_numbers(theirs.mean)} and std {_numbers(theirs.std)}: if those of {options.run} do, give --mean and --std",
            file=sys.stderr,
        )


def prepared_as(encoder: UsableEncoder) -> dict[str, Any]:
    """Return how pictures are prepared, as a result says it."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(encoder.preparation).items()}


def _in_words(how: Preparation) -> str:
    sides = "both sides" if how.squash else "shorter side"
    normalised = f"mean {_numbers(how.mean)}, std {_numbers(how.std)}"
    return f"{sides} {how.resize} px ({how.interpolation}), of which {how.size} px, {normalised}"


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(map(str, values))


def say_broken(source: ImageSource, broken: list[tuple[str, str]]) -> None:
    """Say how many images were left out, and why the first."""
    if broken:
        key, reason = broken[0]
        print(f"{len(broken):,} of {len(source):,} images were skipped, the first: {key} ({reason})", file=sys.stderr)
