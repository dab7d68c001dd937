"""The networks of a run, as its report shows them: the encoder as far as it got, and one that was never trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from caco.backbone import Encoder, create_backbone, create_encoder
from caco.config import Pretrain
from caco.errors import CacoError, UsageError
from caco.train.checkpoint import CheckpointFolder
from caco.weights import load_backbone


@dataclass(frozen=True)
class Trained:
    """The networks of a run as far as it got; without a checkpoint only the finished backbone."""

    backbone: nn.Module
    key_encoder: nn.Module | None
    slots: Tensor | None
    """float32 [K, D], unit rows."""
    untrained: nn.Module
    """The backbone with weights drawn at random."""
    step: int


def load_trained(folder: Path, config: Pretrain) -> Trained:
    """Return the networks at the run's latest checkpoint, else its finished backbone. Raises CacoError."""
    checkpoints = CheckpointFolder(folder / "checkpoints", keep=1)
    finished = folder / "export" / "backbone.safetensors"
    if config.backbone == "own":
        raise UsageError("the backbone is a module of your own, which a report from the command line cannot build")
    if not checkpoints.paths() and finished.exists():
        backbone, card = load_backbone(finished)
        return Trained(backbone, None, None, _untrained(config, card.stem), card.step)
    if not checkpoints.paths():
        raise UsageError("the run has written no checkpoint yet")
    contents = checkpoints.latest().content
    return Trained(
        backbone=_encoder(config, contents, "encoder.").backbone,
        key_encoder=_encoder(config, contents, "key_encoder."),
        slots=F.normalize(contents["model"]["bank.weight"].float(), dim=1),
        untrained=_untrained(config, contents["card"]["stem"]),
        step=int(contents["step"]),
    )


def _untrained(config: Pretrain, stem: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return create_backbone(config.backbone, config.views.size, stem)


def _encoder(config: Pretrain, contents: dict[str, object], prefix: str) -> Encoder:
    card, weights = contents["card"], contents["model"]
    assert isinstance(card, dict)
    assert isinstance(weights, dict)
    backbone = create_backbone(config.backbone, config.views.size, card["stem"])
    encoder = create_encoder(backbone, config.encoder.projector, config.encoder.embedding)
    try:
        encoder.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    except RuntimeError as error:
        raise CacoError(f"the checkpoint does not fit the run's configuration: {str(error).splitlines()[0]}") from error
    return encoder
