"""The encoder that is judged or used: from a run, a file, or one of the two baselines."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from caco.after_training import BASELINES, Evaluation, Judging
from caco.backbone import adopt_backbone, create_backbone, try_size
from caco.data.source import ImageSource
from caco.distributed.world import World
from caco.errors import UsageError
from caco.evaluate.centre_views import CentreViews
from caco.evaluate.features import Features, extract, gather_features, pixel_features
from caco.files import check_encoder_is_there
from caco.foreign import preparation_of
from caco.train.checkpoint import CheckpointFolder
from caco.views import Preparation, usual_resize
from caco.weights import BackboneCard, download_backbone, load_backbone, load_into, read_weights


@dataclass(frozen=True)
class UsableEncoder:
    """A backbone (None: pixels), how pictures are prepared for it, and where it runs."""

    backbone: nn.Module | None
    preparation: Preparation
    world: World
    precision: torch.dtype
    workers: int
    batch_size: int = 256
    card: BackboneCard | None = None
    """What is known of the backbone; None while it is trained."""

    def features(
        self,
        source: ImageSource,
        indices: np.ndarray | None = None,
        views_of: Callable[[np.ndarray], CentreViews] | None = None,
    ) -> Features:
        """Return the features of every good image of a source (or of `indices`), each exactly once.

        The processes share the work. views_of: has the views of this process's part of the images, if they are not to be made.
        """
        backbone = self.backbone

        def make(part: np.ndarray) -> Features:
            views = self.views(source, part) if views_of is None else views_of(part)
            if backbone is None:
                return pixel_features(views)
            return extract(backbone, views, device=self.world.device, precision=self.precision)

        return gather_features(make, len(source), self.world, indices)

    def views(self, source: ImageSource, indices: np.ndarray, most_kept: int = 0) -> CentreViews:
        """Return the centre views of some images of a source. most_kept: as `CentreViews` has it."""
        return CentreViews(
            source,
            self.preparation,
            indices,
            workers=self.workers,
            batch_size=self.batch_size,
            most_kept=most_kept,
        )


def load_encoder(options: Evaluation, own: nn.Module | None = None) -> tuple[nn.Module | None, BackboneCard]:
    """Return the backbone that `options.run` names (None: pixels) and its card. Raises UsageError.

    own: the user's own module, instead of one by name; it stays as it is.
    """
    module, card = _found_encoder(options, own)
    given = {name: numbers for name, numbers in (("mean", options.mean), ("std", options.std)) if numbers}
    return module, replace(card, **given)  # type: ignore[arg-type]


def _found_encoder(options: Evaluation, own: nn.Module | None) -> tuple[nn.Module | None, BackboneCard]:
    """Return the backbone (None: pixels) and its card, with pictures normalised as the encoder itself has it."""
    run, size = options.run, options.size
    if not run:
        raise UsageError("name a run folder or a backbone file first, for example: caco knn runs/first --data photos/")
    if run in BASELINES and not Path(run).exists():
        card = _baseline_card(options)
        if run == "pixels":
            return None, card
        if own is not None:
            card = _card_of_module(own, size) or card
            return adopt_backbone(copy.deepcopy(own), card.size).eval(), card
        if card.backbone in ("", "own"):
            model = "backbone=module in Python" if card.backbone else "--backbone resnet18"
            raise UsageError(f"random needs to know the model: {model}")
        torch.manual_seed(options.seed)
        return create_backbone(card.backbone, card.size, card.stem).eval(), card
    if run.startswith("timm:"):
        if own is not None or options.backbone:
            raise UsageError(f"{run} names the model, too: leave --backbone out")
        return download_backbone(run.removeprefix("timm:"), size)
    module, card = load_backbone(find_weights(Path(run)), options.backbone, size, own)
    if size in (0, card.size):
        return module, card
    resized = _at_size(module, card, size, can_be_built=own is None)
    return resized, replace(card, size=size, resize=usual_resize(size))


def _at_size(module: nn.Module, card: BackboneCard, size: int, can_be_built: bool) -> nn.Module:
    """Return the encoder for pictures of another size: as it is, or built for them with its tables of positions resized.

    Raises UsageError when it takes its own size only.
    """
    try:
        try_size(module, size)
        return module
    except UsageError as error:
        if can_be_built:
            with contextlib.suppress(UsageError):
                other = create_backbone(card.backbone, size, card.stem)
                load_into(other, module.state_dict(), card.backbone)
                return other.eval()
        raise UsageError(f"--size {size}: {error}; leave --size out: it takes its own, {card.size} px") from error


def _card_of_module(module: nn.Module, size: int) -> BackboneCard | None:
    """Return the card of a module of timm's, by the configuration that stands in it; None for any other module."""
    known: Any = getattr(module, "pretrained_cfg", None)
    known = known.to_dict() if hasattr(known, "to_dict") else known
    if not isinstance(known, dict) or not known:
        return None
    return BackboneCard.of("own", "standard", preparation_of(known, size))


def _baseline_card(options: Evaluation) -> BackboneCard:
    """Return how a baseline is built and sees pictures: as the run it stands beside, where options say nothing else."""
    card = BackboneCard(backbone=options.backbone, stem="auto", size=224, resize=usual_resize(224))
    if isinstance(options, Judging) and options.beside:
        card = read_weights(find_weights(Path(options.beside)))[1] or card
        if options.backbone not in ("", card.backbone):
            card = replace(card, backbone=options.backbone, stem="auto")
    if options.size not in (0, card.size):
        card = replace(card, size=options.size, resize=usual_resize(options.size))
    return replace(card, step=0)


def find_weights(path: Path) -> Path:
    """Return the weights of a run folder: its finished backbone, else its latest checkpoint; a file is itself."""
    if path.is_file():
        return path
    check_encoder_is_there(path, BASELINES)
    finished = path / "export" / "backbone.safetensors"
    if finished.exists():
        return finished
    checkpoints = CheckpointFolder(path / "checkpoints", keep=1).paths()
    if not checkpoints:
        raise UsageError(f"{path} holds no finished backbone (export/backbone.safetensors) and no checkpoint")
    return checkpoints[-1]
