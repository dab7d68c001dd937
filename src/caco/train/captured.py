"""Work on a GPU as one CUDA graph: its kernels are launched by one call, not one after the other from Python.

A step of a ResNet-18 at 32 px is some 1,500 kernels, which a fast GPU computes in less time than Python takes to launch
them (docs/performance.md). In a graph they are the same kernels on the same memory, in the same order.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from caco.config import Pretrain
from caco.distributed.world import World

Output = TypeVar("Output")

PLAIN_CALLS = 3
"""Calls before the work is captured: they load libraries, choose kernels, compile, and make buffers that stay."""
CALLS_AHEAD = 4
"""Calls that Python may be ahead of the GPU, each of which keeps its views; one launch a call would let it run away."""
MOST_MEMORY = 0.5
"""Share of the GPU's memory that the work may take, at most. A graph keeps its memory, which a check between two epochs
cannot borrow; and a batch that fills a GPU keeps it busy, however its kernels are launched."""


class Captured(Generic[Output]):
    """Calls `work(views)`, which leaves gradients; from some calls on by a CUDA graph.

    The work must be the same in every call but for the views and for what is on the device, and may wait for nothing. What
    it returns and the gradients are overwritten by the next call. Where it takes MOST_MEMORY, has views of other shapes, or
    cannot be captured, which is told once, it is called as it is.
    """

    def __init__(
        self, work: Callable[[Sequence[Tensor]], Output], parameters: Iterable[nn.Parameter], device: torch.device
    ) -> None:
        """parameters: those that the work gives gradients, which are None whenever it is called."""
        self.work, self.parameters, self.device = work, list(parameters), device
        self.plain_calls_left = PLAIN_CALLS
        self.is_wanted = True
        self.graph: torch.cuda.CUDAGraph | None = None
        self._ahead: deque[torch.cuda.Event] = deque()

    def __call__(self, views: Sequence[Tensor]) -> Output:
        if self.plain_calls_left:
            return self._prepare(views)
        if self.is_wanted:
            self._capture(views)
        if self.graph is None or [view.shape for view in views] != [view.shape for view in self._views]:
            return self.work(views)
        if len(self._ahead) == CALLS_AHEAD:
            self._ahead.popleft().synchronize()
        for own, view in zip(self._views, views, strict=True):
            own.copy_(view)
        self.graph.replay()
        self._ahead.append(torch.cuda.Event(blocking=True))
        self._ahead[-1].record(torch.cuda.current_stream(self.device))
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._output

    def _prepare(self, views: Sequence[Tensor]) -> Output:
        """Call the work as it is, on the stream on which it is captured later: some libraries have a memory for each."""
        if self.plain_calls_left == PLAIN_CALLS:
            torch.cuda.reset_peak_memory_stats(self.device)
        stream, usual = _stream(self._index), torch.cuda.current_stream(self.device)
        stream.wait_stream(usual)
        with torch.cuda.stream(stream):
            output = self.work(views)
        usual.wait_stream(stream)
        self.plain_calls_left -= 1
        return output

    def _capture(self, views: Sequence[Tensor]) -> None:
        """Record the work, which computes nothing yet."""
        self.is_wanted = False  # whatever comes, once
        if torch.cuda.max_memory_allocated(self.device) > MOST_MEMORY * torch.cuda.mem_get_info(self.device)[1]:
            return
        graph, memory = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        usual = torch.cuda.current_stream(self.device)
        try:
            self._views = [view.clone() for view in views]
            # thread_local: the thread that makes views may go on, and allocate.
            how: dict[str, Any] = {"pool": memory, "stream": _stream(self._index), "capture_error_mode": "thread_local"}
            with torch.cuda.device(self._index), torch.cuda.graph(graph, **how):
                self._output = self.work(self._views)
        except (
            Exception
        ) as problem:  # a module that waits for the device, memory, a torch that cannot: all go on plainly
            torch.cuda.set_stream(usual)
            _failed.append(graph)
            _end_capture(self._index, memory)
            _tell(f"{type(problem).__name__}: {problem}".splitlines()[0])
        else:
            self._gradients, self.graph = [parameter.grad for parameter in self.parameters], graph
        for parameter in self.parameters:
            parameter.grad = None

    @property
    def _index(self) -> int:
        return torch.cuda.current_device() if self.device.index is None else self.device.index


_failed: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture has failed: torch's allocator of pinned memory may still ask them (up to 2.11)."""


@lru_cache
def _stream(gpu: int) -> torch.cuda.Stream:
    """Return the stream of a GPU on which work is captured. (torch's own is that of the first GPU, for all.)"""
    return torch.cuda.Stream(gpu)


@lru_cache
def _tell(reason: str) -> None:
    """Say, once, why work is not captured."""
    logging.getLogger(__name__).warning("a step is not one CUDA graph, which may be slower: %s", reason)


def _end_capture(gpu: int, memory: Any) -> None:
    """Do what torch (up to 2.11) leaves undone where a capture has failed: its allocator and random numbers wait for the end.

    memory: the pool that was captured into.
    """
    generator = torch.cuda.default_generators[gpu]
    generator.graphsafe_set_state(generator.clone_state())  # the same numbers follow
    with contextlib.suppress(Exception):  # a torch that has done it
        torch._C._cuda_endAllocateToPool(gpu, memory)
        torch._C._cuda_releasePool(gpu, memory)


def captured(
    work: Callable[[Sequence[Tensor]], Output], parameters: Iterable[nn.Parameter], config: Pretrain, world: World
) -> Callable[[Sequence[Tensor]], Output]:
    """Return the work of a run to be called, captured where it may be."""
    return Captured(work, parameters, world.device) if is_captured(config, world) else work


def is_captured(config: Pretrain, world: World) -> bool:
    """Return whether the steps of a run are to be captured: on one GPU, not on those of several processes.

    Not with checkpointing, which is for batches that fill a GPU and reads its random state; nor with a module of the caller's
    own, of which nobody knows whether it decides anything outside the GPU.
    """
    suits = config.engine.cuda_graph and not config.engine.checkpointing and config.backbone != "own"
    return suits and world.device.type == "cuda" and world.size == 1
