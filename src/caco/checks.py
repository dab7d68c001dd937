"""What is wrong with a configuration in itself: told before torch is imported and before any other work."""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from caco.after_training import LEAST_TEMPERATURE, Evaluation, Export, Linear
from caco.config import Pretrain
from caco.errors import UsageError
from caco.options import flatten

E = TypeVar("E", bound=Evaluation | Export)

NO_DATA = "--data is missing: name a folder of images (or textures, for built-in pictures)"

_LEAST: dict[str, float] = {
    "batch_size": 1,
    "accumulate": 1,
    "distributed.processes": 1,
    "distributed.machines": 1,
    "distributed.machine": 0,
    "distributed.timeout": 1,
    "bank_size": 2,
    "epochs": 1,
    "start_epoch": 0,
    "seed": 0,
    "workers": 0,
    "size": 0,
    "images": 2,
    "neighbours": 1,
    "temperature": LEAST_TEMPERATURE,
    "probe_batch_size": 0,
    "weight_decay": 0,
    "views.brightness": 0,
    "views.contrast": 0,
    "views.saturation": 0,
    "views.size": 8,
    "views.small": 0,
    "views.hue": 0,
    "views.small_size": 8,
    "views.evaluation_resize": 1,
    "bank.lr": 0,
    "bank.final_lr": 0,
    "bank.warm_start_steps": 0,
    "encoder.embedding": 1,
    "encoder.projector": 1,
    "optimizer.final_lr": 0,
    "optimizer.warmup_epochs": 0,
    "optimizer.weight_decay": 0,
    "monitor.log_steps": 1,
    "monitor.knn_epochs": 0,
    "monitor.knn_first_epochs": 0,
    "monitor.knn_neighbours": 1,
    "monitor.checkpoint_minutes": 0,
    "monitor.keep_checkpoints": 1,
}
_FLOAT32 = 1e30
"""Far below the largest float32, which a factor handed to torch must not exceed."""
_MOST: dict[str, float] = {
    "seed": 2**63 - 1,
    "views.hue": 0.5,
    **dict.fromkeys(("lr", "optimizer.final_lr", "bank.lr", "bank.final_lr"), _FLOAT32),
    **dict.fromkeys(("weight_decay", "optimizer.weight_decay"), _FLOAT32),
}
"""Seeds are 64-bit numbers in torch; half a turn of the hue is as far as it goes."""
_ABOVE_ZERO = (
    "lr",
    "bank.temperature",
    "bank.slot_temperature",
    "bank.warm_start_temperature",
    "views.std",
    "std",
    "views.area",
    "views.small_area",
    "views.blur_sigma",
)
_SHARES = (
    *("views.jitter", "views.gray", "views.blur", "views.solarize", "views.flip", "views.area", "views.small_area"),
    *(
        "momentum",
        "bank.momentum",
        "bank.warm_start_key_momentum",
        "encoder.key_momentum",
        "optimizer.momentum",
        "monitor.knn_share",
        "monitor.broken_share",
    ),
)
_INNER_SHARES = ("held_out", "monitor.held_out")
_ORDERED = ("views.area", "views.small_area", "views.blur_sigma")


def check(config: Pretrain) -> None:
    """Raise UsageError for what is wrong with the configuration of a run."""
    if not config.data:
        raise UsageError(NO_DATA)
    if config.resume and config.overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    check_numbers(config)
    if config.monitor.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UsageError("--monitor.tensorboard needs TensorBoard: pip install tensorboard")
    if config.batch_size == 1:
        raise UsageError("--batch-size 1: batch norm needs at least 2 images")
    if config.epochs != "auto" and config.start_epoch >= config.epochs:
        raise UsageError(f"--start-epoch {config.start_epoch}: nothing is left of {config.epochs} epochs")
    machines = config.distributed
    if machines.machine >= machines.machines:
        raise UsageError(
            f"--distributed.machine {machines.machine}: the last of {machines.machines} has the number "
            f"{machines.machines - 1}"
        )
    views = config.views
    if views.large < 2:
        raise UsageError(f"--views.large {views.large}: the method needs two large views")
    if views.resize() < views.size:
        raise UsageError(
            f"--views.evaluation-resize {views.evaluation_resize} is less than --views.size {views.size}: the centre "
            f"crop would not fit; use for example --views.evaluation-resize {round(views.size * 8 / 7)}"
        )
    if not config.out:
        raise UsageError("--out is missing: name a folder for the run, for example --out runs/first")


def check_judged(options: E) -> E:
    """Return the options of a command that uses an encoder, --weights in the place of RUN|FILE. Raises UsageError."""
    command = type(options).__name__.lower()
    if options.run and options.weights:
        raise UsageError(f"{options.run} and --weights {options.weights}: name one encoder, not two")
    run = options.run or options.weights
    if not run:
        example = "--out backbone.safetensors" if command == "export" else "--data photos/"
        raise UsageError(
            f"name a run folder or a backbone file first, for example: caco {command} runs/first {example}"
        )
    if run.startswith("timm:") and not isinstance(options, Evaluation):
        raise UsageError(f"{run}: timm has it already; caco export takes a run folder or a file")
    check_numbers(options)
    if isinstance(options, Linear) and options.weight_decay and options.protocol != "reference":
        raise UsageError(
            "--weight-decay: only the published protocol has it; add --protocol reference, or leave it out"
        )
    if isinstance(options, Evaluation):
        _check_normalisation(options)
    if isinstance(options, Evaluation) and not options.data:
        raise UsageError(f"{NO_DATA}{_images_of(run)}")
    return replace(options, run=run, weights="")


def _images_of(run: str) -> str:
    """Return what a run was trained on, to be said behind what is wrong; "" where that cannot be known."""
    try:
        config = json.loads((Path(run) / "config.json").read_text(encoding="utf-8"))
        names = [(name, config[name]) for name in ("data", "val") if config.get(name)]
    except (OSError, ValueError, AttributeError):
        return ""
    given = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in names)
    return f". {run} was trained with {given}" if given else ""


def _check_normalisation(options: Evaluation) -> None:
    for name, numbers in (("mean", options.mean), ("std", options.std)):
        if numbers and len(numbers) != 3:
            raise UsageError(f"--{name} {' '.join(map(str, numbers))}: must be three numbers, one for each channel")


def check_numbers(config: Any) -> None:
    """Raise UsageError for the first number of any command's options that is out of its range."""
    for name, value in flatten(config).items():
        numbers = [number for number in (value if isinstance(value, tuple) else (value,)) if _is_number(number)]
        for number in numbers:
            problem = _problem(name, number)
            if problem:
                raise UsageError(f"--{name.replace('_', '-')} {number}: must be {problem}")
        if name in _ORDERED and numbers[0] > numbers[1]:
            raise UsageError(f"--{name.replace('_', '-')} {numbers[0]} {numbers[1]}: the first must be the smaller")


def _problem(name: str, number: float) -> str:
    """Return what a number must be and is not, or an empty string."""
    if not math.isfinite(number):
        return "a finite number"
    if name in _LEAST and number < _LEAST[name]:
        return f"at least {_LEAST[name]}"
    if name in _MOST and number > _MOST[name]:
        return f"at most {_MOST[name]}"
    if name in _ABOVE_ZERO and number <= 0:
        return "above 0"
    if name in _SHARES and not 0 <= number <= 1:
        return "between 0 and 1"
    if name in _INNER_SHARES and not 0 < number < 1:
        return "above 0 and below 1"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
