"""Weights in and out of files: a backbone others can load, and any usual file as a start.

Files are never trusted: only tensors and plain containers are read (`weights_only=True`), so a pickle that would run
code is refused.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import http.client
import json
import pickle
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from caco.backbone import adopt_backbone, create_backbone, is_model, size_in, stem_in, timm_and_ours
from caco.errors import CacoError, UsageError, did_you_mean
from caco.files import replace_file
from caco.foreign import fitted, misfits, named_preparation
from caco.options import from_dictionary
from caco.reference.pickled import HARMLESS
from caco.views import IMAGENET_MEAN, IMAGENET_STD, Interpolation, Preparation, usual_resize

CARD_FORMAT = "caco-backbone-1"

# Where other systems put the encoder inside their files; the first prefix that some key has is stripped.
PREFIXES = (
    "encoder.backbone.",
    "teacher_backbone.",
    "student_backbone.",
    "module.encoder_q.",
    "module.base_encoder.",
    "module.backbone.",
    "module._orig_mod.",
    "module.encoder.",
    "encoder_q.",
    "base_encoder.",
    "_orig_mod.",
    "module.",
    "backbone.",
    "model.",
)
CONTAINERS = ("state_dict", "model", "model_state_dict", "teacher", "student")
ANSWER_SECONDS = 10.0


@dataclass(frozen=True)
class BackboneCard:
    """What must be known to use a backbone file: how to build the module and how to prepare a picture."""

    backbone: str
    """timm name, or "own" for a user's module."""
    stem: str = "standard"
    size: int = 224
    """Side of the views it was trained on, in pixels."""
    resize: int = 256
    """Evaluation: shorter side before the centre crop, in pixels."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    step: int = 0
    """Training steps taken."""
    interpolation: Interpolation = "bilinear"
    squash: bool = False
    """Evaluation: both sides become `resize` pixels, instead of the shorter one."""

    @classmethod
    def of(cls, backbone: str, stem: str, preparation: Preparation) -> BackboneCard:
        """Return the card of a model whose pictures are prepared so."""
        return cls(backbone, stem, **dataclasses.asdict(preparation))

    def preparation(self) -> Preparation:
        """Return how an image is prepared for this backbone."""
        return Preparation(self.size, self.resize, self.mean, self.std, self.interpolation, self.squash)


def save_backbone(path: Path, backbone: nn.Module, card: BackboneCard) -> None:
    """Write a backbone's state dict as safetensors, keys as timm's, with its card in the header; atomically."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in backbone.state_dict().items()}
    header = {CARD_FORMAT: json.dumps(dataclasses.asdict(card))}  # of several entries safetensors shuffles the order
    replace_file(path, safetensors.torch.save(tensors, metadata=header))


def load_backbone(
    path: Path, backbone: str = "", size: int = 0, own: nn.Module | None = None
) -> tuple[nn.Module, BackboneCard]:
    """Return the backbone in a file, in eval mode, and its card.

    A file of ours says what it holds; for any other, `backbone` names the timm model (and `size` the pictures; if not
    said, 224 px or what its table of positions was made for). A name with timm's tag ("vit_small_patch16_224.dino") says
    how pictures are prepared, too. own: the user's own module, instead of one by name; the weights go into a copy of it.
    Raises UsageError when the file cannot be read or does not fit.
    """
    tensors, card = read_weights(path)
    if own is not None:
        side = size or 224
        card = card or BackboneCard(backbone="own", size=side, resize=usual_resize(side))
        module = adopt_backbone(copy.deepcopy(own), card.size)
        load_into(module, tensors, str(path))
        return module.eval(), card
    if card is None:
        if not backbone:
            raise UsageError(f"{path} does not say which model it holds; name it with --backbone (Python: backbone=)")
        card = _named_card(backbone, tensors, size)
    if backbone and backbone != card.backbone:
        raise UsageError(f"{path} holds a {card.backbone}, not a {backbone}")
    if card.backbone == "own":
        raise UsageError(
            f"{path} holds a module of your own, which only Python can build: caco.knn, linear and embed take it as "
            "backbone=module; caco.load_weights(module, path) loads it"
        )
    module = create_backbone(card.backbone, card.size, card.stem)
    load_into(module, tensors, str(path))
    module.pretrained_cfg = _for_timm(card)  # type: ignore[assignment]
    return module.eval(), card


def _named_card(backbone: str, tensors: Mapping[str, Tensor], size: int) -> BackboneCard:
    """Return the card of a file that says nothing. Pictures are prepared for it as ImageNet's, or as timm's tag says."""
    stem = stem_in(backbone, tensors)
    tagged = named_preparation(backbone, size) if "." in backbone else None
    side = size or size_in(backbone, tensors)
    return BackboneCard.of(backbone, stem, tagged or Preparation(side, usual_resize(side)))


def download_backbone(name: str, size: int = 0) -> tuple[nn.Module, BackboneCard]:
    """Return the model with the named weights of timm's hub, in eval mode, and its card, by timm's configuration.

    size: side of the pictures instead of the model's own, in pixels. Raises as `download_weights` does.
    """
    tensors, preparation = download_weights(name), named_preparation(name, size)
    assert preparation is not None  # it has weights
    card = BackboneCard.of(name, "standard", preparation)
    module = create_backbone(name, card.size, card.stem)
    load_into(module, tensors, f"timm:{name} at {card.size} px")
    module.pretrained_cfg = _for_timm(card)  # type: ignore[assignment]
    return module.eval(), card


def _for_timm(card: BackboneCard) -> dict[str, Any]:
    """Return what `timm.data.resolve_model_data_config` asks a model for: how a picture is prepared for it."""
    return {
        "architecture": card.backbone,
        "input_size": (3, card.size, card.size),
        "mean": card.mean,
        "std": card.std,
        "interpolation": card.interpolation,
        # timm resizes to floor(size / crop_pct); half a pixel more keeps that from falling one short.
        "crop_pct": card.size / (card.resize + 0.5),
        "crop_mode": "squash" if card.squash else "center",
    }


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Copy weights into a module. The weights of a head in `tensors` are left out; anything else must fit.

    Tables of positions are resized as timm does, other systems' names translated (`foreign.fitted`). Raises UsageError
    that names the first keys that are missing, left over or of another shape.
    """
    tensors = fitted(module, tensors)
    for what, keys in misfits(module, tensors):
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise UsageError(f"{origin} does not fit the backbone: it {what} {', '.join(keys[:3])}{more}")
    module.load_state_dict({key: tensors[key] for key in module.state_dict() if key in tensors}, strict=False)


def read_weights(path: Path) -> tuple[dict[str, Tensor], BackboneCard | None]:
    """Return the tensors of an encoder's backbone by their timm (torchvision) names, and the card if there is one.

    Reads safetensors, torch files (state dicts, or checkpoints that hold one, ours and the published ones included).
    Raises UsageError for a file that is absent, truncated, foreign, or would run code.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        tensors, card = _read_safetensors(path)
        if not tensors:
            raise UsageError(f"{path} holds no weights")
        return tensors, card
    content = load_torch(path)
    card = _card(content["card"], path) if isinstance(content.get("card"), dict) else None
    state = next((content[name] for name in CONTAINERS if isinstance(content.get(name), dict)), content)
    tensors = strip_prefix(state)
    if not tensors:
        raise UsageError(f"{path} holds no weights; its entries are {', '.join(map(str, list(state)[:5])) or 'none'}")
    return tensors, card or known_card(content, tensors)


def known_card(content: Mapping[Any, Any], tensors: Mapping[str, Tensor]) -> BackboneCard | None:
    """Return the card of a file that names its model as the published ones do ("arch"); None if that name is not known."""
    arch = content.get("arch")
    if not isinstance(arch, str) or not is_model(arch):
        return None
    return BackboneCard(backbone=arch, stem=stem_in(arch, tensors))


def strip_prefix(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return the backbone's part of a state dict under plain names; only tensors by a name, not a number, are weights."""
    tensors = {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}
    for prefix in PREFIXES:
        if prefix == "module.encoder." and f"{prefix}conv1.weight" not in tensors:
            continue  # not SimSiam's: part of a transformer
        if any(key.startswith(prefix) for key in tensors):
            return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return tensors


def load_torch(path: Path) -> dict[Any, Any]:
    """Return the dictionary in a torch file, safely. Raises UsageError for anything else."""
    try:
        with open(path, "rb") as file:
            is_pickle = file.read(1) in (b"\x80", b"P")  # plain, or in a zip archive
        with warnings.catch_warnings(), torch.serialization.safe_globals(HARMLESS):
            warnings.simplefilter("ignore")  # about the pickle's protocol
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # damaged pickles raise nearly anything: IndexError, struct.error, AssertionError, ...
        if is_pickle and isinstance(error, pickle.UnpicklingError):
            raise UsageError(
                f"{path} is refused: it holds more than tensors, and loading it could run code. Where it was made, save the "
                "weights alone: torch.save(model.state_dict(), FILE)"
            ) from error
        raise UsageError(f"{path} is not a torch file, or is damaged") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    return content


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], BackboneCard | None]:
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError) as error:
        raise UsageError(f"{path} is not a safetensors file, or is damaged ({error})") from error
    if CARD_FORMAT not in header:
        return strip_prefix(tensors), None
    try:
        card = json.loads(header[CARD_FORMAT])
    except ValueError as error:
        raise UsageError(f"{path} is damaged: its description of itself is not JSON") from error
    return tensors, _card(card, path)


def _card(values: Any, path: Path) -> BackboneCard:
    try:
        return from_dictionary(BackboneCard, values)
    except (UsageError, TypeError) as error:  # TypeError: without the model's name
        raise UsageError(f"{path}: its description of itself is one that this version does not understand") from error


def download_weights(name: str) -> dict[str, Tensor]:
    """Return the named weights from timm's hub ("resnet50.a1_in1k"): the only place where the network is used.

    Raises UsageError, before it is used, for a name that timm has no weights for, CacoError when the hub cannot be
    reached and has not been before.
    """
    timm = timm_and_ours()
    if not timm.models.is_model_pretrained(name):
        names = {known for full in timm.list_models(pretrained=True) for known in (full, full.partition(".")[0])}
        near = did_you_mean(name, sorted(names)) or " All names: timm.list_models(pretrained=True)."
        raise UsageError(f"--weights timm:{name}: timm has no weights of that name.{near}")
    try:
        with _hub() as reached:
            return dict(timm.create_model(name, pretrained=True, num_classes=0).state_dict())
    except Exception as error:  # the hub's client raises many kinds
        reason = str(error).splitlines()[0][:120] if reached else "the hub cannot be reached, and gave none before"
        raise CacoError(f"--weights timm:{name}: not downloaded ({reason})") from error


@contextlib.contextmanager
def _hub() -> Iterator[bool]:
    """Yield whether timm's hub answers. While entered, one that does not is not asked again and again: only what it gave
    before is looked for."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    reached = not before and _answers(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = not reached
    try:
        yield reached
    finally:
        constants.HF_HUB_OFFLINE = before


def _answers(address: str) -> bool:
    """Return whether a server answers at all within ANSWER_SECONDS, through a proxy if one is set."""
    try:
        request = urllib.request.Request(address, method="HEAD")
        urllib.request.urlopen(request, timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError:  # it does, whatever it says
        return True
    except (OSError, http.client.HTTPException):
        return False
    return True
