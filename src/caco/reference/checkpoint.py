"""Checkpoints of the published code: read, and written so that its own programs load them.

{epoch, arch, best_acc, knn_acc, state_dict, optimizer, Memory_Bank}. In `state_dict` the encoder is
`module.encoder_q.<torchvision's ResNet names>` with the projector as its `fc` (`fc.0`, `fc.1`, `fc.3`, `fc.4`, `fc.6`), the
key encoder the same under `module.encoder_k.`. `Memory_Bank` is {W, v}, both [D, K]: a slot is a *column* there.

Published encoders see pictures of 224 px, so the format does not say it. One that was trained on others would be judged at
the wrong size: its file has one entry more, `card` (`caco.weights.BackboneCard`), which the published programs do not read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from caco.errors import UsageError
from caco.files import replacing
from caco.weights import BackboneCard, load_torch

ENCODER, KEY_ENCODER = "module.encoder_q.", "module.encoder_k."
LEARNT = ("weight", "bias")
GROUP = ("lr", "weight_decay", "momentum", "trust_coefficient")
"""What the published LARS keeps for its one group of parameters."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """All that a checkpoint knows of a run, by our names, whoever wrote it."""

    arch: str
    """timm's (torchvision's) name of the backbone."""
    epoch: int
    """Epochs done."""
    best_knn: float
    """Percent; 0: unknown."""
    knn: float
    """Percent, at the last check; 0: unknown."""
    encoder: dict[str, Tensor]
    """`backbone.…` and `projector.…`."""
    key_encoder: dict[str, Tensor]
    bank: Float[Tensor, "K D"]
    velocity: Float[Tensor, "K D"]
    momentum: dict[int, Tensor]
    """LARS: the buffer of each parameter of the encoder, counted in the order of its state dict."""
    group: dict[str, float]
    """LARS: learning rate, weight decay, momentum, trust coefficient."""
    card: dict[str, Any]
    """How pictures are prepared for the encoder, as far as the file says it (`BackboneCard`)."""


def read_snapshot(path: Path) -> Snapshot | None:
    """Return what a checkpoint, ours or a published one, holds of a run; None for a file that has only an encoder.

    Raises UsageError for a file that cannot be read, or would run code.
    """
    if path.suffix == ".safetensors":
        return None
    content = load_torch(path)
    try:
        if "Memory_Bank" in content:
            return from_published(content)
        if {"model", "bank_optimizer", "card"} <= content.keys():
            return from_ours(content)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(f"{path} is not a whole checkpoint ({type(error).__name__}: {error})") from error
    return None


def from_published(content: Mapping[str, Any]) -> Snapshot:
    """Return what a published checkpoint holds. Raises KeyError when a part of it is missing."""
    state, bank = content["state_dict"], content["Memory_Bank"]
    optimizer = content.get("optimizer") or {"state": {}, "param_groups": [{}]}
    group = optimizer["param_groups"][0]
    return Snapshot(
        arch=str(content["arch"]),
        epoch=int(content["epoch"]),
        best_knn=float(content.get("best_acc", 0)),
        knn=float(content.get("knn_acc", 0)),
        encoder=_renamed(state, ENCODER),
        key_encoder=_renamed(state, KEY_ENCODER),
        bank=bank["W"].T.contiguous(),
        velocity=bank["v"].T.contiguous(),
        momentum={int(number): entry["mu"] for number, entry in optimizer["state"].items()},
        group={name: float(group[name]) for name in GROUP if name in group},
        card=dict(content.get("card") or {}),
    )


def from_ours(content: Mapping[str, Any]) -> Snapshot:
    """Return what a checkpoint of ours holds. Raises KeyError when a part of it is missing."""
    model, group = content["model"], content["optimizer"]["param_groups"][0]
    bank = model["bank.weight"]
    velocities = [entry.get("momentum_buffer") for entry in content["bank_optimizer"]["state"].values()]
    is_lars = "trust_coefficient" in group
    momentum = content["optimizer"]["state"] if is_lars else {}
    best = max(float(content["best_knn"]), 0.0)
    return Snapshot(
        arch=content["card"]["backbone"],
        epoch=content["epoch"],
        best_knn=best,
        knn=best,
        encoder=_below(model, "encoder."),
        key_encoder=_below(model, "key_encoder."),
        bank=bank,
        velocity=next((velocity for velocity in velocities if velocity is not None), torch.zeros_like(bank)),
        momentum={int(number): entry["momentum_buffer"] for number, entry in momentum.items()},
        group={name: float(group[name]) for name in GROUP} if is_lars else {},
        card=content["card"],
    )


def to_published(snapshot: Snapshot) -> dict[str, Any]:
    """Return a published checkpoint: exactly its keys and shapes, and `card` where pictures are prepared otherwise."""
    state = {ENCODER + _published_name(name): tensor for name, tensor in snapshot.encoder.items()}
    state |= {KEY_ENCODER + _published_name(name): tensor for name, tensor in snapshot.key_encoder.items()}
    # The published optimizer was given both encoders' parameters; those of the key encoder never had a gradient.
    parameters = sum(name.endswith(LEARNT) for name in state)
    return {
        "epoch": snapshot.epoch,
        "arch": snapshot.arch,
        "best_acc": snapshot.best_knn,
        "knn_acc": snapshot.knn,
        "state_dict": state,
        "optimizer": {
            "state": {number: {"mu": buffer} for number, buffer in snapshot.momentum.items()},
            "param_groups": [{**snapshot.group, "params": list(range(parameters))}],
        },
        "Memory_Bank": {"W": snapshot.bank.T.contiguous(), "v": snapshot.velocity.T.contiguous()},
        **({} if _is_as_published(snapshot) else {"card": snapshot.card}),
    }


def write_published(path: Path, snapshot: Snapshot) -> None:
    """Write a published checkpoint, whole or not at all."""
    with replacing(path) as file:
        torch.save(to_published(snapshot), file)


def _is_as_published(snapshot: Snapshot) -> bool:
    """Return whether pictures are prepared as every reader of the format supposes. (An "own" module no card can build.)"""
    usual = vars(BackboneCard(snapshot.arch))
    said = (name for name in ("size", "resize", "mean", "std") if name in snapshot.card)
    return snapshot.arch == "own" or all(snapshot.card[name] == usual[name] for name in said)


def _published_name(name: str) -> str:
    """Return "conv1.weight" for "backbone.conv1.weight", "fc.0.weight" for "projector.0.weight"."""
    part, _, rest = name.partition(".")
    return rest if part == "backbone" else f"fc.{rest}"


def _renamed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return one encoder of a published state dict by our names."""

    def ours(name: str) -> str:
        return f"projector.{name.removeprefix('fc.')}" if name.startswith("fc.") else f"backbone.{name}"

    encoder = {ours(name): tensor for name, tensor in _below(state, prefix).items()}
    if not encoder:
        raise KeyError(f"{prefix}*")
    return encoder


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    items: Iterable[tuple[str, Tensor]] = state.items()
    return {name.removeprefix(prefix): tensor for name, tensor in items if name.startswith(prefix)}
