"""Who decodes a run's images: threads of the CPU, or the GPU where threads cannot keep up with it. Measured, not guessed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import nn

from caco.config import Pretrain
from caco.data.loader import TrainingViews
from caco.train.engine import LONG_RUN
from caco.train.state import random_state, set_random_state
from caco.train.trials import Trial, seconds

KEEPS_UP = 0.8
"""Share of a step's time in which threads have to make its views, to be ready in time."""
WORTH = 1.2
"""How many times faster than threads the GPU must be: its own time is taken from the training."""
COMPILED = 1.4
"""How many times as fast a compiled step is, about."""
MOST_IMAGES = 64
"""Of the passes that are timed."""


def choose_decoder(
    config: Pretrain, loader: TrainingViews, backbone: nn.Module, steps: int, say: Callable[[str], object]
) -> tuple[Literal["cpu", "gpu"], str]:
    """Return who decodes the images of a resolved configuration, and why, in words.

    steps: of the run. say: told before what takes a while, and where something else is taken than asked for.
    """
    asked = config.engine.decoder
    if asked == "cpu":
        return "cpu", ""
    if (on_gpu := loader.gpu_maker()) is None:
        if asked == "gpu":
            say(
                "--engine.decoder gpu cannot be had: it needs encoded images, of many sizes or many, and a GPU that decodes them"
            )
        return "cpu", ""
    if asked == "gpu":
        return "gpu", ""
    threads, step = loader.seconds(loader.maker), step_seconds(config, loader, backbone)
    if threads < KEEPS_UP * step or steps * max(threads, step) < LONG_RUN["cuda"]:
        return "cpu", ""
    say("threads cannot make views as fast as they are trained on: it is tried on the GPU, which may take a minute")
    itself = loader.seconds(on_gpu)
    batch = loader.order.share
    words = ", ".join(
        f"{who} {batch / taken:,.0f}" for who, taken in (("threads", threads), ("the GPU", itself), ("needed", step))
    )
    chosen: Literal["cpu", "gpu"] = "gpu" if WORTH * itself < threads else "cpu"
    return chosen, f"decoded by {'the GPU' if chosen == 'gpu' else 'threads'} (images/s: {words})"


def step_seconds(config: Pretrain, loader: TrainingViews, backbone: nn.Module) -> float:
    """Return about how long a step takes: forward and backward passes of the queries, forward passes of two keys."""
    device, views = loader.device, config.views
    trial = Trial(config.precision, config.engine.layout)  # type: ignore[arg-type]  # resolved
    images, random = min(loader.order.share, MOST_IMAGES), random_state(device)
    try:
        one = seconds(backbone, trial, device, views.size, images, rounds=3) * loader.order.share / images
    finally:
        set_random_state(random, device)
    passes = views.large + views.small * (views.small_size / views.size) ** 2 + 2 / 3
    return one * passes / (COMPILED if config.engine.compile == "on" else 1.0)
