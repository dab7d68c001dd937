"""How the encoder is computed: precision, layout, convolutions, compiled or not. Measured on the machine, not guessed."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from caco.config import Pretrain
from caco.errors import UsageError
from caco.precision import PRECISIONS, autocast, has_fast_bfloat16
from caco.train.state import random_state, set_random_state
from caco.winograd.network import LEAST_CHANNELS, suits_winograd, use_winograd

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}

TRIAL_BATCH = {"cpu": 32, "cuda": 256}
"""Images in a trial, at most. (With few of them a GPU waits for its next kernel.)"""
TRIAL_PIXELS = 2**16
"""On a CPU more of them if they are small: what is made once for a batch weighs in a trial what it does in the run."""
SHORT_RUN = 600.0
"""Seconds of encoder work below which nothing is tried: fp32 (on GPUs bf16) and channels_last are taken."""
LONG_RUN = {"cpu": 7200.0, "cuda": 1800.0}
"""Seconds of encoder work above which compiling is tried: it takes a minute or two."""
WORTH = {"bf16": 1.5, "contiguous": 1.1, "winograd": 1.1, "compile": 1.05}
"""How many times faster the less usual choice must be to be taken: not by the noise of a busy machine."""


@dataclass(frozen=True)
class Trial:
    """One way to compute the encoder."""

    precision: Literal["fp32", "bf16"]
    layout: Literal["channels_last", "contiguous"]
    convolution: Literal["direct", "winograd"] = "direct"

    def __str__(self) -> str:
        return f"{self.precision} {self.layout}" + (" winograd" if self.convolution == "winograd" else "")


def choose_engine(
    config: Pretrain,
    backbone: nn.Module,
    device: torch.device,
    passes: int,
    batch: int,
    say: Callable[[str], object] = lambda text: None,
    numba: bool = True,
) -> tuple[Pretrain, str]:
    """Return the configuration with numbers and names in place of every "auto" of the engine, and why, in words.

    passes: forward-and-backward passes of one view that the run will make in this process. batch: images in each. say:
    told before what takes a while, and where something else is taken than asked for. numba: every process has it. The
    backbone is not changed, nor are random states. A short run is not worth a trial and gets the defaults. Raises
    UsageError for choices that exclude each other.
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
        first = seconds(backbone, choices[0], device, config.views.size, tried, rounds)
        trials = passes * batch / tried  # as much work as the whole run
        work = first * trials
        chosen, why = choices[0], str(choices[0])
        if len(choices) > 1 and work > SHORT_RUN:
            say(
                f"a long run, {_roughly(work)} on this machine: {len(choices)} ways to compute the encoder are timed first"
            )
            times = measure(backbone, choices, device, config.views.size, tried)
            chosen = fastest(choices, times)
            work, why = times[choices.index(chosen)] * trials, _speeds(choices, times, tried)
        compiled = config.engine.compile == "on"
        may_compile = config.engine.compile == "auto" and chosen.convolution == "direct"
        if may_compile and work > _long_run(device) and can_compile(device):
            say(f"a very long run, {_roughly(work)}: torch.compile is tried, which takes some minutes")
            compiled, words = try_compiling(backbone, chosen, device, config.views.size, batch)
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
        "it needs numba (pip install 'caco[fast]')": not numba,
        "it is for --precision fp32": config.precision == "bf16",
        "it is for --engine.layout channels_last": config.engine.layout == "contiguous",
        "it cannot be compiled (--engine.compile on)": config.engine.compile == "on",
        f"no convolution of the backbone is one of 3 x 3 and {LEAST_CHANNELS} channels": not suits_winograd(backbone),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def candidates(config: Pretrain, device: torch.device) -> list[Trial]:
    """Return the ways that the options leave open, the default first. Winograd's convolutions can be had if not "direct"."""
    if config.engine.convolution == "winograd":
        return [Trial("fp32", "channels_last", "winograd")]
    if config.precision != "auto":
        precisions = [config.precision]
    elif device.type == "cpu":
        precisions = ["fp32", "bf16"]
    else:
        precisions = ["bf16"] if has_fast_bfloat16(device) else ["fp32"]
    layouts = ["channels_last", "contiguous"] if config.engine.layout == "auto" else [config.engine.layout]
    choices = [Trial(precision, layout) for precision in precisions for layout in layouts]  # type: ignore[arg-type]
    if config.engine.convolution == "auto":
        choices.append(Trial("fp32", "channels_last", "winograd"))
    return choices


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


ROUNDS = 5
"""Turns in which the choices are timed."""
FEW = 8
"""Images of the first look at each choice."""
HOPELESS = 4.0
"""How many times as long as the fastest one a choice may take, as bfloat16 does on a CPU that only imitates it."""


def measure(backbone: nn.Module, choices: Sequence[Trial], device: torch.device, size: int, batch: int) -> list[float]:
    """Return the seconds of a forward and backward pass for each choice: the least of ROUNDS that take turns.

    The least, since other programs only ever make it longer. Of a choice that is HOPELESS with a few images, that is all
    that is timed.
    """
    few = min(batch, FEW)
    # Of two passes the least: the first makes kernels, and may compile.
    best = [seconds(backbone, trial, device, size, few, rounds=2) * batch / few for trial in choices]
    tried = [number for number, taken in enumerate(best) if taken <= HOPELESS * min(best) and taken != float("inf")]
    for number in tried:
        best[number] = float("inf")
    for _ in range(ROUNDS):
        for number in tried:
            best[number] = min(best[number], seconds(backbone, choices[number], device, size, batch, rounds=1))
    return best


def seconds(
    backbone: nn.Module,
    trial: Trial,
    device: torch.device,
    size: int,
    batch: int,
    rounds: int,
    change: Callable[[nn.Module], object] = lambda network: None,
) -> float:
    """Return the seconds of one forward and backward pass of a copy of the backbone: the least of some rounds.

    The first round makes kernels and buffers, and may take many times as long as those that follow.
    Infinite where a GPU's memory does not suffice for it: the run may take fewer images at a time, or checkpointing. So
    it is where Winograd's convolutions fail in a module that torch's own suit.
    """
    layout, best = LAYOUTS[trial.layout], float("inf")
    try:
        network = copy.deepcopy(backbone).to(device).to(memory_format=layout).train()
        if trial.convolution == "winograd":
            use_winograd(network)
        change(network)
        view = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=layout)
        for _ in range(rounds):
            _wait(device)
            began = time.perf_counter()
            with autocast(device, PRECISIONS[trial.precision]):
                features: Tensor = network(view)
            features.float().square().mean().backward()
            _wait(device)
            best = min(best, time.perf_counter() - began)
    except torch.OutOfMemoryError:
        return float("inf")
    except Exception:
        if trial.convolution == "direct":
            raise
        return float("inf")
    return best


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


def try_compiling(backbone: nn.Module, trial: Trial, device: torch.device, size: int, batch: int) -> tuple[bool, str]:
    """Return whether compiling pays, and what was seen, in words."""
    eager = seconds(backbone, trial, device, size, batch, rounds=3)
    began = time.perf_counter()
    try:
        compiled = seconds(backbone, trial, device, size, batch, rounds=4, change=compile_module)
    except Exception as error:  # compilers fail in many ways; the run goes on without
        return False, f"torch.compile failed ({type(error).__name__}), so the encoder is not compiled"
    if compiled == float("inf"):
        return False, "torch.compile: a trial does not fit into memory, so the encoder is not compiled"
    words = f"torch.compile: {eager / compiled:.2f} times as fast, {time.perf_counter() - began:.0f} s to compile"
    return eager / compiled >= WORTH["compile"], words


def compile_module(module: nn.Module) -> None:
    """Compile a module in place; its state dict keeps its names. One graph for each shape of view."""
    module.compile(dynamic=False)


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


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
