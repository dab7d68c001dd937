"""A source's images worked on by threads, and taken in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from caco.data.decode import BrokenImage

Result = TypeVar("Result")

MOST_TOGETHER = 8
"""Images that a thread is handed at a time: to hand over one takes as long as to decode a small picture."""


def map_in_order(
    function: Callable[[int], Result], indices: Sequence[int], broken: list[tuple[str, str]], depth: int, workers: int
) -> Iterator[tuple[int, Result]]:
    """Yield (index, function(index)) in the order of `indices`; up to `depth` are made ahead by `workers` threads.

    A BrokenImage is skipped and its (key, reason) appended to `broken`.
    """

    def work_on(few: list[int]) -> list[tuple[int, Result | BrokenImage]]:
        done: list[tuple[int, Result | BrokenImage]] = []
        for index in few:
            try:
                done.append((index, function(index)))
            except BrokenImage as error:
                done.append((index, error.with_traceback(None)))  # which would keep all of these results
        return done

    workers = max(1, workers)
    together = min(max(min(depth, len(indices)) // (2 * workers), 1), MOST_TOGETHER)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    futures: deque[Future[list[tuple[int, Result | BrokenImage]]]] = deque()
    try:
        remaining = iter(indices)
        while True:
            while len(futures) < max(depth // together, 1) and (few := list(islice(remaining, together))):
                futures.append(pool.submit(work_on, few))
            if not futures:
                return
            for index, result in futures.popleft().result():
                if isinstance(result, BrokenImage):
                    broken.append((result.key, result.reason))
                else:
                    yield index, result
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
