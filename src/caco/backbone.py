"""Backbones from timm (or the user's own module), and the projector that completes the encoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from caco.errors import UsageError, did_you_mean
from caco.memory import is_out_of_memory

SMALL_VIEW = 64
"""Views of at most this many pixels get the small stem by default."""


class Encoder(nn.Module):
    """Backbone and projector: a view [B, C, S, S] to an embedding [B, D], not yet normalised."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def forward(self, view: Float[Tensor, "B C S S"]) -> Float[Tensor, "B D"]:
        return self.projector(self.backbone(view))  # type: ignore[no-any-return]


def create_encoder(backbone: nn.Module, hidden: int, embedding: int, centred: bool = False) -> Encoder:
    """Return a backbone with a new projector behind it; hidden, embedding, centred: as `projector` takes them."""
    return Encoder(backbone, projector(int(backbone.num_features), hidden, embedding, centred))  # type: ignore[arg-type]


class Pooled(nn.Module):
    """A module that gives maps [B, F, H, W], with their mean over space: [B, F]. Its state dict is the module's own."""

    num_features: int

    def __init__(self, maps: nn.Module) -> None:
        super().__init__()
        self.maps = maps
        self.register_state_dict_post_hook(_without_maps)
        self.register_load_state_dict_pre_hook(_with_maps)

    def forward(self, view: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.maps(view), 1).flatten(1)


def _without_maps(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Take "maps." out of the names of a state dict that is being made."""
    for name in [name for name in state if name.startswith(f"{prefix}maps.")]:
        state[prefix + name.removeprefix(f"{prefix}maps.")] = state.pop(name)


def _with_maps(module: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    """Put it back into those of one that is being loaded."""
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}maps.{name.removeprefix(prefix)}"] = state.pop(name)


def projector(features: int, hidden: int, embedding: int, centred: bool = False) -> nn.Sequential:
    """Return the published head: three bias-free linear layers, batch norm and ReLU after the first two.

    Widths features → hidden → hidden → embedding. The numbering of its layers is the published one (`fc.0` … `fc.6`).
    centred: the last layer starts with rows of mean 0. Behind a ReLU all inputs are positive, which otherwise gives all
    embeddings one large common part; a short run has no time to unlearn it. (Ours; not published.)
    """
    layers = nn.Sequential(
        nn.Linear(features, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, embedding, bias=False),
    )
    if centred:
        last = layers[-1].weight
        assert isinstance(last, nn.Parameter)
        last.data -= last.data.mean(dim=1, keepdim=True)
    return layers


def create_backbone(name: str, size: int, stem: str = "auto") -> nn.Module:
    """Return a timm (else torchvision) model, without its classifier: [B, 3, S, S] → pooled features [B, num_features].

    size: side of the views in pixels (transformers build their position table for it and interpolate for others).
    stem: "small" replaces a ResNet's first convolution by 3×3, stride 1, and drops the max-pool; "auto" does so when
    size ≤ 64. ResNets start as torchvision's (and the published code's) do: residual branches not zeroed.
    Raises UsageError for an unknown name, with the nearest ones, or a stem the model cannot have.
    """
    backbone = _named(name, size)
    if stem == "small" or (stem == "auto" and size <= SMALL_VIEW and _has_plain_stem(backbone)):
        _make_stem_small(name, backbone)
    return adopt_backbone(backbone, size)


def is_model(name: str) -> bool:
    """Return whether `create_backbone` knows a name."""
    from torchvision import models

    return bool(timm_and_ours().is_model(name)) or name in models.list_models(module=models)


def timm_and_ours() -> Any:
    """Return timm, which knows our own models by their names, too."""
    import timm

    import caco.narrow_resnet  # noqa: F401 (registers a name)

    return timm


def _named(name: str, size: int) -> nn.Module:
    """Return a model as its library makes it. Raises UsageError for an unknown name, with the nearest ones."""
    timm = timm_and_ours()
    if timm.is_model(name):
        timm_configuration(name)  # of a tag that does not exist, the names of those that do
        return _first_accepted(
            name,
            [
                {"zero_init_last": False},
                {"img_size": size, "dynamic_img_size": True},
                {"img_size": size},
                {},
            ],
        )
    found = torchvision_model(name)
    if found is None:
        near = did_you_mean(name, timm.list_models()) or " All names: timm.list_models()."
        raise UsageError(f"--backbone: timm has no model {name!r}.{near}")
    return found


def timm_configuration(name: str) -> dict[str, Any]:
    """Return what timm knows of a model's weights (`pretrained_cfg`); empty if nothing, or for a name that is not timm's.

    Raises UsageError for weights of a tag ("resnet50.a9_in1k") that timm does not know of a model that it does.
    """
    timm = timm_and_ours()
    try:
        known = timm.models.get_pretrained_cfg(name) if timm.is_model(name) else None
        return {} if known is None else dict(known.to_dict())
    except RuntimeError:
        model = name.partition(".")[0]
        tags = ", ".join(timm.list_models(f"{model}.*", pretrained=True)) or "none"
        raise UsageError(f"--backbone: timm has no weights called {name!r}; of {model}: {tags}") from None


def torchvision_model(name: str) -> nn.Module | None:
    """Return torchvision's classification model of that name without its classes; None if there is none."""
    from torchvision import models

    if name not in models.list_models(module=models):
        return None
    model: nn.Module = models.get_model(name, weights=None, **_torchvision_options(name))
    place, number, instead = _torchvision_classes(model)
    if number is None:
        setattr(model, place, instead)
    else:
        getattr(model, place)[number] = instead
    return model


def torchvision_code(name: str) -> str:
    """Return the code that makes torchvision's model of that name, without its classes, as `model`."""
    from torchvision import models

    options = _torchvision_options(name)
    place, number, instead = _torchvision_classes(models.get_model(name, weights=None, **options))
    given = "".join(f", {option}={value}" for option, value in options.items())
    where = place if number is None else f"{place}[{number}]"
    return f'model = torchvision.models.get_model("{name}"{given}); model.{where} = torch.nn.{instead}'


def _torchvision_options(name: str) -> dict[str, Any]:
    return {"aux_logits": False} if name == "googlenet" else {}


def _torchvision_classes(model: nn.Module) -> tuple[str, int | None, nn.Module]:
    """Return where torchvision's model has its classes (attribute, and number within it), and what to put there."""
    place = next(place for place in ("fc", "classifier", "heads", "head") if hasattr(model, place))
    head = getattr(model, place)
    layers = list(head) if isinstance(head, nn.Sequential) else []
    linear = [number for number, layer in enumerate(layers) if isinstance(layer, nn.Linear)]
    if linear:
        return place, linear[-1], nn.Identity()
    if layers:  # classes by convolution (SqueezeNet): what comes before is a map
        return place, None, nn.AdaptiveAvgPool2d(1)
    return place, None, nn.Identity()


def stem_of(backbone: nn.Module) -> str:
    """Return "small" or "standard": which stem `create_backbone` must be asked for to get this one again."""
    first, pool = getattr(backbone, "conv1", None), getattr(backbone, "maxpool", None)
    small = isinstance(first, nn.Conv2d) and first.stride == (1, 1) and isinstance(pool, nn.Identity)
    return "small" if small else "standard"


def stem_in(name: str, tensors: Mapping[str, Tensor]) -> str:
    """Return which stem, "small" or "standard", a model of that name has whose weights are these.

    A first kernel of 3 x 3 is the small stem only where the model's own is another. Raises UsageError for an unknown
    name.
    """
    if first_kernel(tensors) != 3:
        return "standard"
    with torch.device("meta"):  # shapes only
        model = _named(name, 224)
    return "small" if _has_plain_stem(model) and first_kernel(model.state_dict()) != 3 else "standard"


def size_in(name: str, tensors: Mapping[str, Tensor]) -> int:
    """Return the side of the pictures, in pixels, that a model of that name has with these weights.

    224, unless its tables of positions are another size's and fit the one that timm's configuration names. Raises
    UsageError for an unknown name.
    """
    tables = {key: tensor.shape for key, tensor in tensors.items() if "pos" in key}
    known = timm_configuration(name) if tables else {}
    for side in (224, int(known["input_size"][-1])) if known else ():
        wanted = _named(name, side).state_dict()
        if all(wanted[key].shape == shape for key, shape in tables.items() if key in wanted):
            return side
    return 224


def first_kernel(tensors: Mapping[str, Tensor]) -> int:
    """Return the side of a ResNet's first kernel; 0 where there is no such convolution."""
    first = tensors.get("conv1.weight")
    return int(first.shape[-1]) if first is not None and first.ndim == 4 else 0


def adopt_backbone(module: nn.Module, size: int) -> nn.Module:
    """Return a module as a backbone: pooled features, and `num_features` as measured (timm's own misses heads).

    Raises UsageError when a picture of size × size is not taken, or does not give [B, F] or [B, F, H, W].
    """
    output = try_size(module, size)
    if not isinstance(output, Tensor) or output.ndim not in (2, 4):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UsageError(
            f"the backbone must map [B, 3, {size}, {size}] to features [B, F] or [B, F, H, W], not {shape}"
        )
    if output.ndim == 4:
        module = Pooled(module)
    if getattr(module, "num_features", None) != output.shape[1]:
        try:
            module.num_features = output.shape[1]  # type: ignore[assignment]
        except AttributeError as error:
            raise UsageError(
                f"the backbone gives {output.shape[1]} features; its num_features says otherwise, and cannot be set"
            ) from error
    return module


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode and afterwards every part of it back into its own."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def try_size(module: nn.Module, size: int) -> Any:
    """Return what a module makes of two black pictures, in eval mode. Raises UsageError when it does not take the size.

    What is raised where memory does not suffice for them stays as it is.
    """
    try:
        with evaluation_mode(module), torch.no_grad():
            where = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), None)
            return module(torch.zeros(2, 3, size, size, device=where))
    except Exception as error:  # any code may stand there
        if is_out_of_memory(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"the backbone does not take pictures of {size} x {size} pixels: {reason}") from error


def _first_accepted(name: str, choices: list[dict[str, Any]]) -> nn.Module:
    """Build a timm model with the first set of keywords it knows; model families differ in what they take."""
    import timm

    for keywords in choices[:-1]:
        try:
            return timm.create_model(name, pretrained=False, num_classes=0, **keywords)
        except TypeError:
            continue
    return timm.create_model(name, pretrained=False, num_classes=0, **choices[-1])


def _has_plain_stem(backbone: nn.Module) -> bool:
    first, pool = getattr(backbone, "conv1", None), getattr(backbone, "maxpool", None)
    return isinstance(first, nn.Conv2d) and isinstance(pool, nn.MaxPool2d)


def _make_stem_small(name: str, backbone: nn.Module) -> None:
    if not _has_plain_stem(backbone):
        raise UsageError(f"--encoder.stem small: {name} has no ResNet stem to replace; use --encoder.stem standard")
    first = backbone.conv1
    assert isinstance(first, nn.Conv2d)
    small = nn.Conv2d(first.in_channels, first.out_channels, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
    backbone.conv1 = small
    backbone.maxpool = nn.Identity()
