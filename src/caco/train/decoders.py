"""Who decodes a run's images: threads of the CPU, or the GPU where threads cannot keep up with it. Measured, not guessed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from caco.config import Pretrain
from caco.data.loader import TrainingViews
from caco.train.engine import LONG_RUN, TRIAL_BATCH
from caco.train.state import random_state, set_random_state
from caco.train.trials import Trial, seconds

FEW_STEPS = 300
"""Steps of a run that is too short for any trial."""
COMPILED = 1.4
"""How many times as fast a compiled step is, about."""

Decoder = Literal["cpu", "gpu"]


def choose_decoder(
    config: Pretrain,
    loader: TrainingViews,
    backbone: nn.Module,
    steps: int,
    say: Callable[[str], object],
    captured: bool = False,
) -> tuple[Decoder, str]:
    """Return who decodes the images of a resolved configuration, and why, in words.

    steps: of the run. say: told before what takes a while, and where something else is taken than asked for. captured: the
    run's steps will be CUDA graphs.
    """
    if config.engine.decoder == "gpu":
        if loader.gpu_maker() is not None:
            return "gpu", ""
        reason = "most images are no baseline JPEG files in colours, or are held decoded, or this GPU cannot decode"
        reason = reason if loader.device.type == "cuda" else "the run is not on an NVIDIA GPU"
        say(f"--engine.decoder gpu cannot be had ({reason}): threads decode")
        return "cpu", ""
    if config.engine.decoder == "cpu" or steps < FEW_STEPS or not loader.has_files_for_gpu:
        return "cpu", ""
    try:
        return _faster(config, loader, backbone, steps, say, captured)
    except torch.OutOfMemoryError:
        return "cpu", "images decoded by threads (a trial of the other way does not fit into memory)"
    finally:
        if loader.device.type == "cuda":
            torch.cuda.empty_cache()  # what the trials leave would count as taken


def _faster(
    config: Pretrain,
    loader: TrainingViews,
    backbone: nn.Module,
    steps: int,
    say: Callable[[str], object],
    captured: bool,
) -> tuple[Decoder, str]:
    step, threads = step_seconds(config, loader, backbone, captured), loader.seconds(loader.maker)
    if threads <= step or steps * max(threads, step) < LONG_RUN["cuda"]:
        return "cpu", ""
    if (on_gpu := loader.gpu_maker()) is None:
        return "cpu", ""
    say("threads cannot make views as fast as they are trained on: it is tried on the GPU, which may take a minute")
    itself = loader.seconds(on_gpu, first_step=3)
    batch = loader.order.share
    words = ", ".join(
        f"{who} {batch / taken:,.0f}" for who, taken in (("threads", threads), ("the GPU", itself), ("needed", step))
    )
    # What it does for the views it cannot do for the training meanwhile; half of that was seen to be lost.
    chosen: Decoder = "gpu" if step + itself < threads else "cpu"
    return chosen, f"images decoded by {'the GPU' if chosen == 'gpu' else 'threads'} (images/s: {words})"


def step_seconds(config: Pretrain, loader: TrainingViews, backbone: nn.Module, captured: bool) -> float:
    """Return about how long a step takes: forward and backward passes of the queries, forward passes of two keys."""
    device, views = loader.device, config.views
    trial = Trial(config.precision, config.engine.layout)  # type: ignore[arg-type]  # resolved
    images, random = min(loader.order.share, TRIAL_BATCH["cuda"]), random_state(device)
    try:
        one = seconds(backbone, trial, device, views.size, images, rounds=3, captured=captured)
    finally:
        set_random_state(random, device)
    passes = views.large + views.small * (views.small_size / views.size) ** 2 + 2 / 3
    of_batch = one * loader.order.share / images
    return of_batch * passes / (COMPILED if config.engine.compile == "on" else 1.0)
