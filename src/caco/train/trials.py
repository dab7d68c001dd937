"""Trials of the ways to compute an encoder: the seconds of a forward and backward pass of its backbone."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from caco.precision import PRECISIONS, autocast
from caco.train.captured import PLAIN_CALLS, Captured
from caco.winograd.agreement import agrees
from caco.winograd.network import use_winograd

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@dataclass(frozen=True)
class Trial:
    """One way to compute the encoder."""

    precision: Literal["fp32", "bf16"]
    layout: Literal["channels_last", "contiguous"]
    convolution: Literal["direct", "winograd"] = "direct"

    def __str__(self) -> str:
        return f"{self.precision} {self.layout}" + (" winograd" if self.convolution == "winograd" else "")


COMPILING_PAYS = 1.05
"""How many times faster compiled passes must be for a run to be compiled."""
ROUNDS = 5
"""Turns in which the choices are timed."""
FEW = 8
"""Images of the first look at each choice."""
HOPELESS = 4.0
"""How many times as long as the fastest one a choice may take, as bfloat16 does on a CPU that only imitates it."""


def measure(
    backbone: nn.Module,
    choices: Sequence[Trial],
    device: torch.device,
    size: int,
    batch: int,
    captured: bool = False,
) -> list[float]:
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
            # The first captured pass is that of the capture.
            taken = seconds(backbone, choices[number], device, size, batch, rounds=1 + captured, captured=captured)
            best[number] = min(best[number], taken)
    return best


def seconds(
    backbone: nn.Module,
    trial: Trial,
    device: torch.device,
    size: int,
    batch: int,
    rounds: int,
    change: Callable[[nn.Module], object] = lambda network: None,
    captured: bool = False,
) -> float:
    """Return the seconds of one forward and backward pass of a copy of the backbone: the least of some rounds.

    The first round makes kernels and buffers, and may take many times as long as those that follow. captured: as a CUDA
    graph, for which more rounds come before.
    Infinite where a GPU's memory does not suffice for it: the run may take fewer images at a time, or checkpointing. So
    it is where Winograd's convolutions fail in a module that torch's own suit, or compute something else.
    """
    layout, best = LAYOUTS[trial.layout], float("inf")
    try:
        network = copy.deepcopy(backbone).to(device).to(memory_format=layout).train()
        if trial.convolution == "winograd":
            if not agrees(PRECISIONS[trial.precision]):
                return float("inf")
            use_winograd(network)
        change(network)
        view = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=layout)

        def passes(views: Sequence[Tensor]) -> None:
            with autocast(device, PRECISIONS[trial.precision]):
                features: Tensor = network(views[0])
            features.float().square().mean().backward()

        work = Captured(passes, network.parameters(), device) if captured else passes
        for _ in range(rounds + PLAIN_CALLS * captured):
            network.zero_grad(set_to_none=True)
            _wait(device)
            began = time.perf_counter()
            work([view])
            _wait(device)
            best = min(best, time.perf_counter() - began)
    except torch.OutOfMemoryError:
        return float("inf")
    except Exception:
        if trial.convolution == "direct":
            raise
        return float("inf")
    return best


def try_compiling(
    backbone: nn.Module, trial: Trial, device: torch.device, size: int, batch: int, captured: bool = False
) -> tuple[bool, str]:
    """Return whether compiling pays, and what was seen, in words."""
    eager = seconds(backbone, trial, device, size, batch, rounds=3, captured=captured)
    began = time.perf_counter()
    try:
        compiled = seconds(backbone, trial, device, size, batch, rounds=4, change=compile_module, captured=captured)
    except Exception as error:  # compilers fail in many ways; the run goes on without
        return False, f"torch.compile failed ({type(error).__name__}), so the encoder is not compiled"
    if compiled == float("inf"):
        return False, "torch.compile: a trial does not fit into memory, so the encoder is not compiled"
    words = f"torch.compile: {eager / compiled:.2f} times as fast, {time.perf_counter() - began:.0f} s to compile"
    return eager / compiled >= COMPILING_PAYS, words


def compile_module(module: nn.Module) -> None:
    """Compile a module in place; its state dict keeps its names. One graph for each shape of view."""
    module.compile(dynamic=False)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
