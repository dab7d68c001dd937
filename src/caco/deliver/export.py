"""An encoder in the formats of others: timm's, torchvision's, and the published CaCo code's."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from caco.backbone import torchvision_code, torchvision_model
from caco.errors import CacoError, UsageError
from caco.evaluate.encoder import find_weights
from caco.files import check_encoder_is_there, check_output, replacing
from caco.reference.checkpoint import Snapshot, read_snapshot, write_published
from caco.train.checkpoint import CheckpointFolder
from caco.weights import BackboneCard, load_backbone, read_weights, save_backbone

TENSOR_FILES = (".safetensors", ".pth", ".pt")


def check_export_path(path: str, kind: str, overwrite: bool = False) -> Path:
    """Return the path of the file to be written. Raises UsageError for one that does not suit the format, or is there."""
    if not path:
        raise UsageError("--out is missing: name the file to write, for example --out backbone.safetensors")
    if kind != "reference" and not path.endswith(TENSOR_FILES):
        raise UsageError(f"--out {path}: the format {kind} is written as {', '.join(TENSOR_FILES)}")
    if kind == "reference" and path.endswith(".safetensors"):
        raise UsageError(f"--out {path}: the published checkpoint is a torch file, for example checkpoint.pth.tar")
    check_output("--out", Path(path), overwrite)
    return Path(path)


def export(run: Path, kind: str, out: Path, backbone: str = "") -> str:
    """Write a run's or file's encoder to `out` as "timm", "torchvision" or "reference"; return how to load it: code to paste.

    timm, torchvision: a state dict of the backbone, by that library's names. reference: the published checkpoint, with
    both encoders and the bank, which needs a checkpoint of a run. backbone: timm name, for a file that does not say it.
    Raises UsageError when there is nothing of that kind, or the file holds another model.
    """
    if kind == "reference":
        snapshot = latest_snapshot(run)
        if backbone not in ("", snapshot.arch):
            raise UsageError(f"{run} holds a {snapshot.arch}, not a {backbone}")
        write_published(out, snapshot)
        if snapshot.arch == "own":
            return 'torch.load(…)["state_dict"]: the module is your own, which the published programs do not know'
        known = "" if _is_torchvision_resnet(snapshot) else "; its own programs know only torchvision's ResNets"
        return f"python linear.py -a {snapshot.arch} --pretrained {out}{known}"
    weights = find_weights(run)
    _check_is_known(weights)
    module, card = load_backbone(weights, backbone)
    _check_is_theirs(card, kind, weights)
    if kind == "torchvision":
        _check_torchvision(module, card)
        model = torchvision_code(card.backbone)
    else:
        model = _timm_code(module, card)
    if out.suffix == ".safetensors":
        save_backbone(out, module, card)
    else:
        with replacing(out) as file:
            torch.save({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, file)
    read = "safetensors.torch.load_file" if out.suffix == ".safetensors" else "torch.load"
    modules = ["safetensors.torch" if out.suffix == ".safetensors" else "torch", kind]
    if "torch.nn" in model and "torch" not in modules:
        modules.append("torch")
    lines = [f"import {', '.join(modules)}", *model.split("; "), f"model.load_state_dict({read}({str(out)!r}))"]
    return "\n  ".join(lines)


def latest_snapshot(run: Path) -> Snapshot:
    """Return the latest checkpoint of a run folder, or the one in a file. Raises UsageError for anything else."""
    path = run
    check_encoder_is_there(run)
    if run.is_dir():
        try:
            path = CheckpointFolder(run / "checkpoints", keep=1).latest().path
        except CacoError as error:
            raise UsageError(f"{run} has no checkpoint, which the reference format needs") from error
    snapshot = read_snapshot(path)
    if snapshot is None:
        raise UsageError(
            f"{path} holds an encoder only; the reference format needs a checkpoint (a run folder, or its .pt)"
        )
    return snapshot


def write_reference(run: Path, epochs: int) -> Path:
    """Write a finished run's last checkpoint where the published code would (epochs from 0), and the best by kNN.

    Returns the path of the last, `checkpoint_0199.pth.tar` after 200 epochs. If it was written before and the run's own is
    deleted since, both stay. Raises UsageError when neither is there.
    """
    path = run / f"checkpoint_{epochs - 1:04d}.pth.tar"
    if not CheckpointFolder(run / "checkpoints", keep=1).paths():
        if not path.exists():
            raise UsageError(f"the last checkpoint of {run} is gone, so {path} cannot be written")
        return path
    write_published(path, latest_snapshot(run))
    best = run / "checkpoints" / "best.pt"
    write_published(run / "checkpoint_best.pth.tar", latest_snapshot(best if best.exists() else run))
    return path


def _check_is_known(weights: Path) -> None:
    """Raise UsageError for a module of the user's own, which no other library has a format for."""
    card = read_weights(weights)[1]
    if card is not None and card.backbone == "own":
        raise UsageError(
            f"{weights} holds a module of your own, which timm and torchvision do not know: load it with "
            "caco.load_weights(module, path) and save module.state_dict() as you like, or use --format reference"
        )


def _check_is_theirs(card: BackboneCard, kind: str, weights: Path) -> None:
    """Raise UsageError when timm or torchvision, as `kind` says, has no model of that name; say who has."""
    name = card.backbone
    known = {"timm": _is_timms(name), "torchvision": torchvision_model(name) is not None}
    if known[kind]:
        return
    others = [f"use --format {other}" for other in known if known[other]]
    ours = f"it is caco's own: caco.load_backbone({str(weights)!r}) loads it as it is"
    raise UsageError(f"{kind} has no model called {name!r}; {others[0] if others else ours}")


def _is_timms(name: str) -> bool:
    """Return whether timm by itself has a model of that name; we register some of our own with it."""
    return timm.is_model(name) and timm.model_entrypoint(name).__module__.startswith("timm.")


def _timm_code(module: nn.Module, card: BackboneCard) -> str:
    """Return the code that makes timm's model for a module's weights."""
    if card.stem == "small":
        channels = module.state_dict()["conv1.weight"].shape[0]
        return (
            f'model = timm.create_model("{card.backbone}", num_classes=0); '
            f"model.conv1 = torch.nn.Conv2d(3, {channels}, 3, padding=1, bias=False); model.maxpool = torch.nn.Identity()"
        )
    usual = timm.create_model(card.backbone, num_classes=0)  # transformers have tables for one size
    fits = {k: v.shape for k, v in usual.state_dict().items()} == {k: v.shape for k, v in module.state_dict().items()}
    size = "" if fits else f", img_size={card.size}"
    return f'model = timm.create_model("{card.backbone}", num_classes=0{size})'


def _check_torchvision(module: nn.Module, card: BackboneCard) -> None:
    """Raise UsageError when torchvision's model of that name has other names and shapes."""
    theirs = torchvision_model(card.backbone)
    assert theirs is not None  # checked before
    wanted, have = ({k: v.shape for k, v in _all_but_counters(m).items()} for m in (theirs, module))
    if wanted != have:
        different = sorted(name for name in {*wanted, *have} if wanted.get(name) != have.get(name))
        others = f" and {len(different) - 1} others" if len(different) > 1 else ""
        raise UsageError(
            f"this {card.backbone} is not torchvision's (not the same: {different[0]}{others}); use --format timm"
        )


def _is_torchvision_resnet(snapshot: Snapshot) -> bool:
    theirs = torchvision_model(snapshot.arch)
    if theirs is None or not snapshot.arch.startswith(("resnet", "resnext", "wide_resnet")):
        return False
    ours = {k.removeprefix("backbone."): v.shape for k, v in snapshot.encoder.items() if k.startswith("backbone.")}
    return {k: v.shape for k, v in theirs.state_dict().items()} == ours


def _all_but_counters(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in module.state_dict().items() if not name.endswith("num_batches_tracked")}
