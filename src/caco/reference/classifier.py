"""The checkpoint that the published `linear.py` leaves: backbone and classifier together; written, and judged again."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from caco.after_training import Linear
from caco.backbone import create_backbone
from caco.config import usual_resize
from caco.data.labels import Relabelled
from caco.data.source import open_source
from caco.device import choose_device
from caco.distributed.world import World
from caco.errors import UsageError
from caco.evaluate.encoder import load_encoder
from caco.evaluate.features import extract
from caco.evaluate.linear import judge_head
from caco.files import replace_file
from caco.precision import choose_precision, precision_name
from caco.weights import known_card, load_into, load_torch, strip_prefix

HEAD = ("fc.weight", "fc.bias")


def write_checkpoint(path: Path, config: Linear, report: dict[str, Any]) -> None:
    """Write {epoch, arch, state_dict, best_acc1, optimizer} from the judged encoder and the head that was written."""
    backbone, card = load_encoder(config)
    assert backbone is not None  # pixels are refused before
    head = safetensors.torch.load_file(config.head)
    tensors = {**backbone.state_dict(), "fc.weight": head["weight"], "fc.bias": head["bias"]}
    content = {
        "epoch": config.epochs,
        "arch": card.backbone,
        "state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()},
        "best_acc1": report["top1"],
        "optimizer": {"state": {}, "param_groups": []},
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    replace_file(path, buffer.getbuffer())


def judge(path: Path, config: Linear) -> tuple[float, float]:
    """Return top-1 and top-5 in percent of a written classifier on the validation images. Raises UsageError."""
    if not path.is_file():
        raise UsageError(f"--evaluate: there is no classifier {path}; train it first, or name one with --resume")
    content = load_torch(path)
    tensors = strip_prefix(content.get("state_dict", {}))
    if not all(name in tensors for name in HEAD):
        raise UsageError(f"--evaluate: {path} holds no classifier (fc.weight, fc.bias)")
    card = known_card(content, tensors)
    if card is None:
        raise UsageError(f"--evaluate: {path} is of an unknown backbone ({content.get('arch')!r})")
    if config.size:
        card = replace(card, size=config.size, resize=usual_resize(config.size))
    backbone = create_backbone(card.backbone, card.size, card.stem)
    load_into(backbone, tensors, str(path))
    device = choose_device(config.device)
    classes = tuple(open_source(config.data).classes)
    val = Relabelled(open_source(config.val, split="val"), classes)
    features = extract(
        backbone.to(device).to(memory_format=torch.channels_last),
        val,
        size=card.size,
        resize=card.resize,
        mean=card.mean,
        std=card.std,
        device=device,
        workers=World(device).worker_count(config.workers),
        precision=precision_name(choose_precision(config.precision, device)),
    )
    if features.labels is None:
        raise UsageError(f"--data: {config.val} has no labels (a folder for each class)")
    weight, bias = (tensors[name].to(device) for name in HEAD)
    result = judge_head(weight, bias, features.vectors, features.labels, 0.0, (), config.epochs, 0, device)
    return 100 * result.top1, 100 * result.top5
