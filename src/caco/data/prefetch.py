"""Batches made ahead of the training step: in a thread, and on a GPU on a stream of its own.

The step waits for a batch only where none is ready, and neither thread ever waits for the GPU.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BATCHES_AHEAD = 2
"""How many batches wait for the training step, at most."""


class Batch(NamedTuple):
    """One step's input."""

    indices: np.ndarray
    """int64 [B]: which images of the source."""
    views: list[Tensor]
    """One float32 [B, 3, S, S] for each view, normalised, on the device, in the layout of the run (`--engine.layout`)."""


_Item = tuple[Batch, torch.cuda.Event | None] | BaseException | None
"""A batch and, on a GPU, the event after which it is made; an error; None: there are no more."""


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return a stream for `prefetch`, None where there are none. One for all epochs: each stream keeps memory of its own."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def prefetch(batches: Iterator[Batch], device: torch.device, stream: torch.cuda.Stream | None) -> Iterator[Batch]:
    """Yield what `batches` yields, computed in a background thread, BATCHES_AHEAD of them; errors come through.

    On a GPU everything that `batches` does there is queued on `stream`, beside the caller's, which is made to wait (on the
    GPU, not here) for each batch that it gets.
    """
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))  # for what `batches` reads, such as a resident set
    ready: queue.Queue[_Item] = queue.Queue(maxsize=BATCHES_AHEAD)
    stopped = threading.Event()

    def put(item: _Item) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            if stream is not None:  # a new thread is on GPU 0, and on leaving the stream would take some memory there
                torch.cuda.set_device(stream.device)
            with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
                for batch in batches:
                    put((batch, stream.record_event() if stream is not None else None))
                    if stopped.is_set():
                        return
            put(None)
        except BaseException as error:  # handed to the consumer, which raises it
            put(error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            batch, made = item
            if made is not None:
                _hand_over(batch, made, torch.cuda.current_stream(device))
            yield batch
    finally:
        stopped.set()
        thread.join()


def _hand_over(batch: Batch, made: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
    """Let a stream use a batch that another one makes: after `made`, and without its memory being given away before."""
    stream.wait_event(made)
    for view in batch.views:
        view.record_stream(stream)
