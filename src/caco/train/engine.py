"""How the encoder is computed: precision, layout, convolutions, compiled or not. Measured on the machine, not guessed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from caco.config import Pretrain
from caco.errors import UsageError
from caco.precision import has_fast_bfloat16
from caco.train.state import random_state, set_random_state
from caco.train.trials import LAYOUTS, Trial, measure, seconds, try_compiling
from caco.winograd.network import LEAST_CHANNELS, suits_winograd

TRIAL_BATCH = {"cpu": 32, "cuda": 256}
"""Images in a trial, at most. (With few of them a GPU waits for its next kernel.)"""
TRIAL_PIXELS = 2**16
"""On a CPU more of them if they are small: what is made once for a batch weighs in a trial what it does in the run."""
SHORT_RUN = 600.0
"""Seconds of encoder work below which nothing is tried: fp32 (on GPUs bf16) and channels_last are taken."""
LONG_RUN = {"cpu": 7200.0, "cuda": 300.0}
"""Seconds of encoder work above which compiling is tried: it takes a minute or two (ResNet-18 on an H200: 1.4 times as fast)."""
WORTH = {"bf16": 1.5, "contiguous": 1.1, "winograd": 1.1}
"""How many times faster the less usual choice must be to be taken: not by the noise of a busy machine."""


def choose_engine(
    config: Pretrain,
    backbone: nn.Module,
    device: torch.device,
    passes: int,
    batch: int,
    say: Callable[[str], object] = lambda text: None,
    numba: bool = True,
    captured: bool = False,
) -> tuple[Pretrain, str]:
    """Return the configuration with numbers and names in place of every "auto" of the engine, and why, in words.

    passes: forward-and-backward passes of one view that the run will make in this process. batch: images in each. say:
    told before what takes a while, and where something else is taken than asked for. numba: every process has it. captured:
    the run's steps will be CUDA graphs, so the trials are, too. The backbone is not changed, nor are random states. A short
    run is not worth a trial and gets the defaults. Raises UsageError for choices that exclude each other.
    """
    if config.engine.compile == "on" and config.engine.checkpointing:
        raise UsageError("--engine.compile on and --engine.checkpointing exclude each other; leave one out")
    if config.engine.compile == "on" and device.type in ("cpu", "cuda") and not can_compile(device):
        lacking = "Triton" if device.type == "cuda" else "a C++ compiler (g++, or what CXX names)"
        raise UsageError(f"--engine.compile on needs {lacking}, which is not here; take --engine.compile off")
    reason = no_winograd(config, backbone, device, numba)
    if reason and config.engine.convolution == "winograd":  # asked for, or what a run chose on another machine
        say(f"--engine.convolution winograd cannot be had: {reason}; torch's own convolutions are taken")
    if reason:
        config = replace(config, engine=replace(config.engine, convolution="direct"))
    if "auto" not in (config.precision, config.engine.layout, config.engine.convolution, config.engine.compile):
        return config, ""
    choices, batch = candidates(config, device), max(batch, 2)
    tried = min(batch, _trial_batch(config.views.size, device))
    if config.engine.checkpointing and config.engine.compile == "auto":
        config = replace(config, engine=replace(config.engine, compile="off"))
    random = random_state(device)
    try:
        # The first passes load libraries, and make kernels and buffers: some seconds on a GPU, however short the run.
        rounds = 3 if device.type == "cuda" else 2
        first = seconds(backbone, choices[0], device, config.views.size, tried, rounds, captured=captured)
        trials = passes * batch / tried  # as much work as the whole run
        work = first * trials
        chosen, why = choices[0], str(choices[0])
        if len(choices) > 1 and work > SHORT_RUN:
            say(
                f"a long run, {_roughly(work)} on this machine: {len(choices)} ways to compute the encoder are timed first"
            )
            times = measure(backbone, choices, device, config.views.size, tried, captured)
            chosen = fastest(choices, times)
            work = times[choices.index(chosen)] * trials
            why = f"{_speeds(choices, times, tried)}; taken: {chosen}{_unless_fastest(chosen, choices, times)}"
        compiled = config.engine.compile == "on"
        may_compile = config.engine.compile == "auto" and chosen.convolution == "direct"
        if may_compile and work > _long_run(device) and can_compile(device):
            say(f"a very long run, {_roughly(work)}: torch.compile is tried, which takes some minutes")
            compiled, words = try_compiling(backbone, chosen, device, config.views.size, batch, captured)
            why += "; " + words
    finally:
        set_random_state(random, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what the trials leave would count as taken
    engine = replace(
        config.engine, layout=chosen.layout, convolution=chosen.convolution, compile="on" if compiled else "off"
    )
    return replace(config, precision=chosen.precision, engine=engine), why


def no_winograd(config: Pretrain, backbone: nn.Module, device: torch.device, numba: bool) -> str:
    """Return why Winograd's convolutions cannot be had here, in words; "" if they can."""
    reasons = {
        "it is for CPUs": device.type != "cpu",
        "it needs numba (pip install numba)": not numba,
        "it is for --engine.layout channels_last": config.engine.layout == "contiguous",
        "it cannot be compiled (--engine.compile on)": config.engine.compile == "on",
        f"no convolution of the backbone is one of 3 x 3 and {LEAST_CHANNELS} channels": not suits_winograd(backbone),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def candidates(config: Pretrain, device: torch.device) -> list[Trial]:
    """Return the ways that the options leave open, the default first. Winograd's convolutions can be had if not "direct"."""
    if config.precision != "auto":
        precisions = [config.precision]
    elif device.type == "cpu":
        precisions = ["fp32", "bf16"]
    else:
        precisions = ["bf16"] if has_fast_bfloat16(device) else ["fp32"]
    layouts = ["channels_last", "contiguous"] if config.engine.layout == "auto" else [config.engine.layout]
    direct = [Trial(precision, layout) for precision in precisions for layout in layouts]  # type: ignore[arg-type]
    winograd = [Trial(precision, "channels_last", "winograd") for precision in precisions]
    return {"direct": direct, "winograd": winograd, "auto": direct + winograd}[config.engine.convolution]


def fastest(choices: Sequence[Trial], times: Sequence[float]) -> Trial:
    """Return the fastest choice, where the less usual one has to be faster by a margin worth its rounding or surprise."""

    def handicapped(number: int) -> float:
        trial, usual = choices[number], choices[0]
        precision = WORTH["bf16"] if trial.precision != usual.precision else 1.0
        layout = WORTH["contiguous"] if trial.layout != usual.layout else 1.0
        return (
            times[number] * precision * layout * (WORTH["winograd"] if trial.convolution != usual.convolution else 1.0)
        )

    return choices[min(range(len(choices)), key=handicapped)]


def _unless_fastest(chosen: Trial, choices: Sequence[Trial], times: Sequence[float]) -> str:
    """Return why a choice that is not the fastest was taken, in words; "" if it is."""
    first = choices[min(range(len(choices)), key=times.__getitem__)]
    if first == chosen:
        return ""
    if first.precision == chosen.precision:
        return " (another must be faster by more than noise is)"
    return f" ({first.precision} must be {WORTH['bf16']:g} times as fast; --precision {first.precision} asks for it)"


def _speeds(choices: Sequence[Trial], times: Sequence[float], images: int) -> str:
    """Return how many images a second each choice takes, in words; of one that could not be computed (`seconds`) that."""
    rates = ["failed" if taken == float("inf") else f"{images / taken:,.0f}" for taken in times]
    return "measured, images/s: " + ", ".join(f"{trial} {rate}" for trial, rate in zip(choices, rates, strict=True))


def layout_of(config: Pretrain) -> torch.memory_format:
    """Return the layout of a configuration; "auto", in one that was not resolved, is channels_last."""
    return LAYOUTS.get(config.engine.layout, torch.channels_last)


def can_compile(device: torch.device) -> bool:
    """Return whether torch.compile has what it needs here: Triton on a GPU, a C++ compiler on a CPU."""
    try:
        if device.type == "cuda":
            from torch.utils._triton import has_triton

            return bool(has_triton())
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of a missing CUDA, always
        from torch._inductor.cpp_builder import get_cpp_compiler

        return device.type == "cpu" and bool(get_cpp_compiler())
    except Exception:  # whatever a private part of torch raises means no
        return False


def search_kernels(device: torch.device) -> None:
    """Let cuDNN time its convolutions for each shape that comes, and take the fastest: the shapes of a run are few."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True


def _trial_batch(size: int, device: torch.device) -> int:
    """Return how many images of `size` pixels a side a trial takes, at most."""
    return TRIAL_BATCH[device.type] if device.type == "cuda" else max(TRIAL_BATCH["cpu"], TRIAL_PIXELS // size**2)


def _long_run(device: torch.device) -> float:
    return LONG_RUN.get(device.type, LONG_RUN["cpu"])


def _roughly(seconds: float) -> str:
    """Return the time of all the encoder's passes in words; what else a step takes is little beside it.

    Infinite: a pass did not fit into memory (`seconds`), so nobody knows.
    """
    if seconds == float("inf"):
        return "of unknown length"
    return f"about {seconds / 60:.0f} minutes" if seconds < 5400 else f"about {seconds / 3600:,.0f} hours"
