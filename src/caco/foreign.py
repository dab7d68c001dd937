"""Encoders from elsewhere: how timm prepares pictures for them, and their tensors by a module's names and shapes."""

from __future__ import annotations

import logging
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from caco.backbone import timm_configuration
from caco.views import Preparation

# What comes with an encoder in a file and is no part of it: classifiers, projectors, what masked training needs.
HEADS = ("fc.", "head.", "head_dist.", "classifier.", "projection_head.", "prototypes.", "decoder_", "mask")


def named_preparation(name: str, size: int = 0) -> Preparation | None:
    """Return how timm prepares pictures for the weights it knows by a name ("vit_small_patch16_224.dino").

    Without a tag they are those that timm takes by default. size: instead of their own, in pixels. None for a name that
    timm knows nothing of. Raises UsageError for a tag that it does not know.
    """
    known = timm_configuration(name)
    return preparation_of(known, size) if known else None


def preparation_of(configuration: Mapping[str, Any], size: int = 0) -> Preparation:
    """Return how pictures are prepared by timm's configuration of a model (`pretrained_cfg`). size: as above.

    timm's crop_mode "border" (six models) is taken as "center".
    """
    from timm.data.config import resolve_data_config

    data = resolve_data_config(pretrained_cfg=dict(configuration))
    size = size or int(data["input_size"][-1])
    return Preparation(
        size=size,
        resize=math.floor(size / data["crop_pct"]),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation="bilinear" if data["interpolation"] == "bilinear" else "bicubic",
        squash=data["crop_mode"] == "squash",
    )


def fitted(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights by the names and in the shapes of a module, as far as it is known how; else as they are.

    A Sequential of a network's parts (lightly's way) gets their names back. What does not fit a model of timm goes through
    timm's own translation for it, which also resizes tables of positions to the pictures' size.
    """
    named = _named_again(module, tensors)
    translate = _translation(module)
    if translate is None or not list(misfits(module, named)):
        return named
    try:
        with _quiet():
            translated = translate(dict(named), module)
    except Exception:  # another model's tensors, which the misfits will tell
        return named
    resized = (key for key, tensor in translated.items() if key in named and named[key].shape != tensor.shape)
    only_positions = all("pos" in key for key in resized)  # patches of another size are another model
    return translated if only_positions and not list(misfits(module, translated)) else named


def misfits(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, list[str]]]:
    """Yield what is wrong with the weights for the module, in words, and the names that it is wrong with."""
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in tensors and not key.endswith("num_batches_tracked")]
    extra = [key for key in tensors if key not in wanted and not key.startswith(HEADS)]
    shapes = [
        f"{key} {tuple(tensors[key].shape)} for {tuple(wanted[key].shape)}"
        for key in wanted
        if key in tensors and tensors[key].shape != wanted[key].shape
    ]
    for what, keys in (("lacks", missing), ("has unknown", extra), ("has another shape:", shapes)):
        if keys:
            yield what, keys


def is_numbered(names: Iterable[str]) -> bool:
    """Return whether all names begin with the number of a part, as those of a Sequential do."""
    return all(re.match(r"\d+\.", name) for name in names)


def _named_again(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of nn.Sequential(*parts of the module) by the module's names; others as they are."""
    parts = [name for name, _ in module.named_children()]
    numbers = {key: key.partition(".")[0] for key in tensors}
    if not is_numbered(tensors) or is_numbered(module.state_dict()) or max(map(int, numbers.values())) >= len(parts):
        return dict(tensors)
    return {parts[int(number)] + key.removeprefix(number): tensors[key] for key, number in numbers.items()}


def _translation(module: nn.Module) -> Any:
    """Return timm's function for weights of other origin or size, which stands beside the model's class; else None."""
    home = type(module).__module__
    return getattr(sys.modules[home], "checkpoint_filter_fn", None) if home.startswith("timm.") else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep timm from logging each table that it resizes."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with torch.no_grad():
            yield
    finally:
        logging.disable(before)
