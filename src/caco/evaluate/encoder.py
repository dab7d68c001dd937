"""The encoder that is judged or used: from a run, a file, or one of the two baselines."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from caco.after_training import Evaluation
from caco.backbone import adopt_backbone, create_backbone, try_size
from caco.data.source import ImageSource
from caco.distributed.world import World
from caco.errors import UsageError
from caco.evaluate.features import Features, extract, gather_features, pixel_features
from caco.train.checkpoint import CheckpointFolder
from caco.views import Preparation, usual_resize
from caco.weights import BackboneCard, load_backbone

BASELINES = ("random", "pixels")


@dataclass(frozen=True)
class UsableEncoder:
    """A backbone (None: raw pixels), how pictures are prepared for it, and where it runs."""

    backbone: nn.Module | None
    preparation: Preparation
    world: World
    precision: torch.dtype
    workers: int
    batch_size: int = 256

    def features(self, source: ImageSource, indices: np.ndarray | None = None) -> Features:
        """Return the features of every good image of a source (or of `indices`), each exactly once.

        The processes share the work.
        """
        backbone = self.backbone

        def make(part: np.ndarray) -> Features:
            if backbone is None:
                return pixel_features(source, self.preparation, workers=self.workers, indices=part)
            return extract(
                backbone,
                source,
                self.preparation,
                device=self.world.device,
                workers=self.workers,
                indices=part,
                batch_size=self.batch_size,
                precision=self.precision,
            )

        return gather_features(make, len(source), self.world, indices)


def load_encoder(options: Evaluation, own: nn.Module | None = None) -> tuple[nn.Module | None, BackboneCard]:
    """Return the backbone that `options.run` names (None: raw pixels) and its card. Raises UsageError.

    own: the user's own module, instead of one by name; it stays as it is.
    """
    run, size = options.run, options.size
    if not run:
        raise UsageError("name a run folder or a backbone file first, for example: caco knn runs/first --data photos/")
    if run in BASELINES and not Path(run).exists():
        card = BackboneCard(backbone=options.backbone or "none", size=size or 224, resize=usual_resize(size or 224))
        if run == "pixels":
            return None, card
        if own is not None:
            return adopt_backbone(copy.deepcopy(own), card.size).eval(), card
        if not options.backbone:
            raise UsageError("random needs to know the model: --backbone resnet18")
        torch.manual_seed(options.seed)
        return create_backbone(options.backbone, card.size).eval(), card
    module, card = load_backbone(find_weights(Path(run)), options.backbone, size, own)
    if not size:
        return module, card
    try_size(module, size)
    return module, replace(card, size=size, resize=usual_resize(size))


def find_weights(path: Path) -> Path:
    """Return the weights of a run folder: its finished backbone, else its latest checkpoint; a file is itself."""
    if path.is_file():
        return path
    if not path.exists():
        raise UsageError(f"there is no run folder or file {path}")
    finished = path / "export" / "backbone.safetensors"
    if finished.exists():
        return finished
    checkpoints = CheckpointFolder(path / "checkpoints", keep=1).paths()
    if not checkpoints:
        raise UsageError(f"{path} holds no finished backbone (export/backbone.safetensors) and no checkpoint")
    return checkpoints[-1]
