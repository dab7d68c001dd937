"""A step of `step.py` taken apart: its stages one after the other, on a GPU each a CUDA graph. Not a benchmark itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from measure import Seconds

from caco.model import embed
from caco.precision import autocast
from caco.train.captured import Captured

if TYPE_CHECKING:
    from step import Step

WAIT, BANK, OPTIMIZERS = "wait for views", "bank: search, loss, both gradients", "optimizers"


def stage_times(step: Step, rounds: int) -> dict[str, Any]:
    """Return the seconds of each stage of a step."""
    parts, device = stages(step), step.loader.device
    for _, stage in parts:
        stage()
    if isinstance(step.gradients, Captured):
        step.gradients = step.gradients.work  # its graph's memory is given back
        parts = as_graphs(parts)
    taken_by: dict[str, list[float]] = {name: [] for name, _ in parts}
    for _ in range(rounds):
        seconds = dict.fromkeys(taken_by, 0.0)
        for name, taken in on_gpu(parts) if device.type == "cuda" else on_cpu(parts):
            seconds[name] += taken
        for name, taken in seconds.items():
            taken_by[name].append(taken)
    return {name: Seconds(tuple(times)).as_json() for name, times in taken_by.items()}


def on_cpu(parts: Sequence[tuple[str, Callable[[], None]]]) -> Iterator[tuple[str, float]]:
    """Yield the seconds of each part."""
    for name, part in parts:
        began = time.perf_counter()
        part()
        yield name, time.perf_counter() - began


def on_gpu(parts: Sequence[tuple[str, Callable[[], None]]]) -> Iterator[tuple[str, float]]:
    """Yield the seconds that a GPU takes for each part; of parts that are no graphs, waiting for Python to launch them included."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(parts) + 1)]
    marks[0].record()
    for (_, part), mark in zip(parts, marks[1:], strict=True):
        part()
        mark.record()
    marks[-1].synchronize()
    for (name, _), before, after in zip(parts, marks, marks[1:], strict=False):
        yield name, before.elapsed_time(after) / 1000


def stages(step: Step) -> list[tuple[str, Callable[[], None]]]:
    """Return the parts of a step in their order, by the stage they belong to."""
    model, state = step.state.model, step.state
    held: dict[str, Any] = {}

    def in_precision() -> torch.autocast:
        return autocast(step.loader.device, step.precision)

    def wait() -> None:
        batch = next(step.batches)
        for view, new in zip(held.setdefault("views", batch), batch, strict=True):
            view.copy_(new)  # a graph always reads the same
        held["pulls"] = []

    def keys() -> None:
        with in_precision(), torch.no_grad():
            held["keys"] = torch.cat([embed(model.key_encoder, view) for view in held["views"][:2]])

    def search() -> None:
        with in_precision():
            held["slots"] = model.bank.slots()
            held["positives"] = model.bank.nearest(held["keys"], held["slots"]).view(2, -1)

    def query(number: int) -> None:
        with in_precision():
            held["query"] = embed(model.encoder, held["views"][number])

    def loss(number: int) -> None:
        leaf = held["query"].detach().requires_grad_()
        weights = leaf.new_full((len(leaf), 2), 0.5 / len(leaf))
        with in_precision():
            result = model.bank.loss(leaf, held["slots"], held["positives"].T, weights)
        result.loss.backward()
        held["gradient"] = leaf.grad
        held["pulls"].append(result.pull)

    def backward() -> None:
        held.pop("query").backward(held["gradient"])  # what it leaves would tie a graph to the stream of the first

    def slot_term() -> None:
        with in_precision():
            zero = model.bank.slot_term(held["slots"], held["pulls"])
        zero.backward()

    def optimizers() -> None:
        state.optimizer.step()
        state.bank_optimizer.step()

    def momentum() -> None:
        model.update_key_encoder(step.rates.key_momentum)
        state.optimizer.zero_grad(set_to_none=True)
        state.bank_optimizer.zero_grad(set_to_none=True)

    of_views = [
        part
        for number in range(step.views)
        for part in (
            ("query passes", partial(query, number)),
            (BANK, partial(loss, number)),
            ("backward of the encoder", backward),
        )
    ]
    return [
        (WAIT, wait),
        ("key passes", keys),
        (BANK, search),
        *of_views,
        (BANK, slot_term),
        (OPTIMIZERS, optimizers),
        ("key encoder", momentum),
    ]


def as_graphs(parts: Sequence[tuple[str, Callable[[], None]]]) -> list[tuple[str, Callable[[], None]]]:
    """Return the parts of a step, in their order, as CUDA graphs that share one memory; what waits for data stays itself."""
    memory, graphs = torch.cuda.graph_pool_handle(), []
    for name, part in parts:
        if name == WAIT:
            part()
            graphs.append((name, part))
            continue
        if name == OPTIMIZERS:
            part()  # which notes where the gradients are now
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
            part()
        graph.replay()
        graphs.append((name, graph.replay))
    return graphs
