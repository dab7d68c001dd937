"""A source's images worked on by threads, and taken in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from caco.data.decode import BrokenImage

Result = TypeVar("Result")


def map_in_order(
    function: Callable[[int], Result], indices: Iterable[int], broken: list[tuple[str, str]], depth: int, workers: int
) -> Iterator[tuple[int, Result]]:
    """Yield (index, function(index)) in the order of `indices`; up to `depth` are made ahead by `workers` threads.

    A BrokenImage is skipped and its (key, reason) appended to `broken`.
    """
    pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="decode")
    futures: deque[tuple[int, Future[Result]]] = deque()
    try:
        remaining = iter(indices)
        while True:
            while len(futures) < depth and (index := next(remaining, None)) is not None:
                futures.append((index, pool.submit(function, index)))
            if not futures:
                return
            index, future = futures.popleft()
            try:
                yield index, future.result()
            except BrokenImage as error:
                broken.append((error.key, error.reason))
    finally:
        pool.shutdown(cancel_futures=True)


def batched(results: Iterable[tuple[int, Result]], batch_size: int) -> Iterator[tuple[list[int], list[Result]]]:
    """Group (index, result) into full batches of indices and results; the last may be smaller."""
    indices: list[int] = []
    batch: list[Result] = []
    for index, result in results:
        indices.append(index)
        batch.append(result)
        if len(batch) == batch_size:
            yield indices, batch
            indices, batch = [], []
    if batch:
        yield indices, batch
