"""The checkpoint that the published `linear.py` leaves: backbone and classifier together; written, and judged again."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import safetensors
import torch

from caco.after_training import Linear
from caco.data.labels import Relabelled
from caco.data.source import open_source
from caco.device import choose_device
from caco.distributed.world import World
from caco.errors import UsageError
from caco.evaluate.encoder import load_encoder
from caco.evaluate.features import labels_of
from caco.evaluate.linear import judge_head
from caco.files import replacing
from caco.given import open_encoder, say_broken
from caco.weights import known_card, load_torch, strip_prefix

HEAD = ("fc.weight", "fc.bias")


def write_checkpoint(path: Path, config: Linear, report: dict[str, Any]) -> None:
    """Write {epoch, arch, state_dict, best_acc1, optimizer} from the judged encoder and the head that was written.

    And what the published code takes for granted, so that the file can be judged again as it was: {classes, card}.
    """
    backbone, card = load_encoder(config)
    assert backbone is not None  # pixels are refused before
    with safetensors.safe_open(config.head, framework="pt") as file:
        head = {name: file.get_tensor(name) for name in ("weight", "bias")}
        classes = json.loads(file.metadata()["classes"])
    tensors = {**backbone.state_dict(), "fc.weight": head["weight"], "fc.bias": head["bias"]}
    content = {
        "epoch": config.epochs,
        "arch": card.backbone,
        "state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()},
        "best_acc1": report["top1"],
        "optimizer": {"state": {}, "param_groups": []},
        "classes": classes,
        "card": asdict(card),
    }
    with replacing(path) as file:
        torch.save(content, file)


def evaluate_classifier(path: Path, config: Linear) -> tuple[float, float]:
    """Return top-1 and top-5 in percent of a written classifier on the validation images. Raises UsageError.

    Its classes are those that it names; a published file names none, so they are those of the training images.
    """
    if not path.is_file():
        raise UsageError(f"--evaluate: there is no classifier {path}; train it first, or name one with --resume")
    content = load_torch(path)
    tensors = strip_prefix(content.get("state_dict", {}))
    if not all(name in tensors for name in HEAD):
        raise UsageError(f"--evaluate: {path} holds no classifier (fc.weight, fc.bias)")
    if "card" not in content and known_card(content, tensors) is None:
        raise UsageError(f"--evaluate: {path} is of an unknown backbone ({content.get('arch')!r})")
    world = World(choose_device(config.device))
    images = open_source(config.val, split="val")
    encoder = open_encoder(world, replace(config, run=str(path), backbone=""), None, len(images))
    weight, bias = (tensors[name].to(world.device) for name in HEAD)
    classes = tuple(content["classes"]) if "classes" in content else tuple(open_source(config.data).classes)
    if len(bias) != len(classes):
        raise UsageError(f"--evaluate: {path} is a classifier of {len(bias)} classes, {config.data} has {len(classes)}")
    val = Relabelled(images, classes)
    features = encoder.features(val)
    say_broken(val, features.broken)
    result = judge_head(
        weight,
        bias,
        features.vectors,
        labels_of(features),
        learning_rate=0.0,
        trials=(),
        epochs=config.epochs,
        batch_size=0,
        device=world.device,
    )
    return 100 * result.top1, 100 * result.top5
