"""The commands as Python functions. Options are those of the command line; groups are dictionaries.

Those that take `distributed` start processes where there are several GPUs or several processes are asked for. Each of
these imports the script again, so there the call stands under `if __name__ == "__main__":`, as with multiprocessing.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from torch import nn

from caco import commands, judge
from caco.after_training import Embed, Export, Knn, Linear, Report
from caco.checks import check, check_judged
from caco.cli import pretrain_start
from caco.config import Pretrain
from caco.data.datasets import own_source
from caco.data.source import ImageSource
from caco.errors import CacoError, UsageError, did_you_mean
from caco.objects import Objects
from caco.options import checked, flatten, override
from caco.weights import load_backbone as _load_backbone
from caco.weights import load_into, read_weights

T = TypeVar("T")
P = ParamSpec("P")
E = TypeVar("E", Knn, Linear, Embed)

_SWITCH = re.compile(r"(?<![\w/-])--(resume|overwrite|download)(?![\w/-])")


def _in_python(function: Callable[P, T]) -> Callable[P, T]:
    """Let the errors of a function speak of switches as Python has them: resume=True, not --resume."""

    @functools.wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> T:
        try:
            return function(*arguments, **options)
        except CacoError as error:
            text = str(error)
            if "caco pretrain" not in text:  # not in a command to paste
                error.args = (_SWITCH.sub(r"\1=True", text),)
            raise

    return call


@_in_python
def pretrain(
    data: Any = None, out: str | Path = "", *, val: Any = None, backbone: str | nn.Module | None = None, **options: Any
) -> Path | None:
    """Pre-train an encoder on images and return the path of the finished backbone (`caco pretrain`).

    data: what --data takes, a sequence of such files, an array uint8 [N, H, W, 3], a torch Dataset of pictures
    (caco.data.datasets.DatasetSource), or an image source of your own (caco.data.source.ImageSource); with resume=True it
    may be left out where it was a path or a name. val: labelled images for the kNN check, in any of these forms.
    backbone: a timm name, or a module of your own that maps [B, 3, S, S] to [B, F] or [B, F, H, W].
    Options that are None count as not given. Returns None but in the main process.
    With several processes (`distributed={"processes": 2}`, or several GPUs) the call must be under
    `if __name__ == "__main__":`, for each process imports the script again; and data must be picklable.
    Example: `pretrain("photos/", "runs/first", recipe="cifar", bank_size=8192, views={"size": 64})`.
    Raises caco.errors.UsageError for wrong options, CacoError when the run cannot go on.
    """
    (name, images), (val_name, val_images) = _named("data", data), _named("val", val)
    given = _given(Pretrain(), {"data": name, "val": val_name, "out": out, **options})
    objects = Objects(backbone if isinstance(backbone, nn.Module) else None, images, val_images)
    if objects.backbone is not None:
        given["backbone"] = "own"
    elif backbone is not None:
        given["backbone"] = backbone
    given = checked(Pretrain, given)
    start = pretrain_start(given)
    config = override(start, given)
    check(config)
    return commands.pretrain(config, objects)


@_in_python
def knn(
    run: str | Path = "", data: Any = None, *, val: Any = None, backbone: str | nn.Module = "", **options: Any
) -> dict[str, Any] | None:
    """Judge an encoder by nearest neighbours and return the result, accuracies in percent (`caco knn`).

    data, val: labelled images, in any form that `pretrain` takes. The labels of an array come with it:
    `caco.data.arrays.ArraySource(images, labels)`; those of a Dataset are its `targets` or `labels`.
    backbone: a timm name, for a file that does not say it, or the module of your own that the run trained.
    With several processes (`distributed={"processes": 2}`, or several GPUs) the call must be under
    `if __name__ == "__main__":`, for each process imports the script again; and data must be picklable.
    Example: `knn("runs/first", "train/", val="val/", neighbours=20)`.
    """
    return judge.knn(*_judged(Knn(), run, data, backbone, options, val))


@_in_python
def linear(
    run: str | Path = "", data: Any = None, *, val: Any = None, backbone: str | nn.Module = "", **options: Any
) -> dict[str, Any] | None:
    """Judge an encoder by a linear classifier and return the result, accuracies in percent (`caco linear`).

    data, val, backbone, and several processes: as for `knn`.
    """
    return judge.linear(*_judged(Linear(), run, data, backbone, options, val))


@_in_python
def embed(run: str | Path = "", data: Any = None, *, backbone: str | nn.Module = "", **options: Any) -> Path | None:
    """Write one feature vector for each image and return the file's path (`caco embed`).

    data: images in any form that `pretrain` takes, with labels or without. backbone, and several processes: as for `knn`.
    """
    return commands.embed(*_judged(Embed(), run, data, backbone, options))


def _judged(
    defaults: E, run: str | Path, data: Any, backbone: str | nn.Module, options: dict[str, Any], val: Any = None
) -> tuple[E, Objects]:
    """Return the checked configuration of a command that uses an encoder, and what was given as objects."""
    (data_name, images), (val_name, val_images) = _named("data", data), _named("val", val)
    named = {"data": data_name, "val": val_name, **options}
    if isinstance(backbone, nn.Module):
        return check_judged(_config(defaults, run, named)), Objects(backbone, images, val_images)
    return check_judged(_config(defaults, run, {**named, "backbone": backbone})), Objects(None, images, val_images)


def _named(option: str, data: Any) -> tuple[Any, ImageSource | None]:
    """Return images as an option names them, and their source where they were given as an object."""
    if data is None or isinstance(data, (str, os.PathLike)):
        return data, None
    images = own_source(data, option)
    return images.name, images


def export(run: str | Path = "", **options: Any) -> Path:
    """Write an encoder in another library's format and return the file's path (`caco export`)."""
    return commands.export(check_judged(_config(Export(), run, options)))


def report(run: str | Path, **options: Any) -> Path:
    """Write the page of a run and return its path (`caco report`)."""
    return commands.report(_config(Report(), run, options))


def load_backbone(path: str | Path, *, backbone: str = "") -> nn.Module:
    """Return the backbone of a run folder or file, in eval mode: [B, 3, S, S] → [B, num_features].

    backbone: a timm name, for a file that does not say it; NAME.TAG also says how pictures are prepared.
    How a picture is prepared for it, timm can tell: `timm.data.create_transform(**timm.data.resolve_model_data_config(it))`.
    """
    from caco.evaluate.encoder import find_weights

    return _load_backbone(find_weights(Path(path)), backbone)[0]


def load_weights(module: nn.Module, path: str | Path) -> nn.Module:
    """Load a backbone file or run into a module of your own (what `pretrain(backbone=module)` trained); returns it."""
    from caco.evaluate.encoder import find_weights

    load_into(module, read_weights(find_weights(Path(path)))[0], str(path))
    return module


def _config(defaults: T, run: str | Path, options: dict[str, Any]) -> T:
    return override(defaults, checked(type(defaults), _given(defaults, {"run": run, **options})))


def _given(defaults: object, options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return options by dotted names. Raises UsageError for one that does not exist."""
    known = flatten(defaults)
    given: dict[str, Any] = {}
    for name, value in options.items():
        if value is None:
            continue
        if isinstance(value, dict):
            given.update(_given(defaults, value, f"{prefix}{name}."))
        elif prefix + name in known:
            given[prefix + name] = value
        elif any(option.startswith(f"{prefix}{name}.") for option in known):
            first = next(option for option in known if option.startswith(f"{prefix}{name}."))
            raise UsageError(
                f'{name}={value!r}: is a group of options, such as {name}={{"{first.rpartition(".")[2]}": …}}'
            )
        else:
            raise UsageError(f"unknown option {prefix + name}.{did_you_mean(prefix + name, known)}")
    return given
