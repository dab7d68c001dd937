"""k nearest neighbours: the labels of an image's neighbours vote on its own. No training, nothing to tune.

Exact and streamed: memory is bounded by two chunk sizes, whatever the number of images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from caco.after_training import LEAST_TEMPERATURE
from caco.errors import CacoError, UsageError
from caco.memory import free_on

QUERY_CHUNK = 4096  # large, because the reference is made unit rows anew for each chunk of queries
REFERENCE_CHUNK = 8192
LONGER_ON_GPU, SHARE_OF_GPU = 4, 1 / 64
"""A GPU waits for the host once a chunk: so many times as long ones, if their cosines take no more of its free memory."""


@dataclass(frozen=True)
class Voting:
    """How neighbours vote."""

    neighbours: Sequence[int] = (20,)
    """How many vote for each image; several numbers are judged in one search."""
    temperature: float = 0.2
    """A vote is exp(cosine/temperature)."""
    leave_one_out: bool = False
    """The queries are the reference itself, in the same order, and no image votes on itself."""


@dataclass(frozen=True, eq=False)
class KnnResult:
    """What one number of neighbours gave."""

    neighbours: int
    """How many neighbours voted for each image."""
    top1: float
    """Share (0-1) of queries whose class got the most votes."""
    top5: float
    """Share (0-1) of queries whose class is among the five with the most votes; a class without a vote is not a guess."""
    correct: Bool[Tensor, " M"]
    """Which queries `top1` counts, on the CPU."""
    note: str = ""
    """What the reader should know of this figure; usually empty."""


def knn_accuracy(
    reference: Float[Tensor, "N F"],
    reference_labels: Int[Tensor, " N"],
    queries: Float[Tensor, "M F"],
    query_labels: Int[Tensor, " M"],
    voting: Voting = Voting(),
    classes: int | None = None,
) -> tuple[KnnResult, ...]:
    """Return the accuracy of weighted kNN voting for each number of neighbours, all from one search.

    classes: None takes the largest label + 1. More neighbours than images: all vote, and the result's note says so.
    Runs on the device of `reference`. Raises CacoError on labels out of range or nothing to compare.
    Source: Wu et al. 2018, arXiv:1805.01978; published `ops/knn_monitor.py`.
    """
    if classes is None:
        classes = int(torch.cat([reference_labels.cpu(), query_labels.cpu()]).amax()) + 1 if len(queries) else 1
    _check_labels(query_labels, classes, "queries")
    guesses = knn_guesses(reference, reference_labels, queries, classes, voting)
    results = []
    for asked, guessed in zip(voting.neighbours, guesses, strict=True):
        hits = guessed == query_labels.cpu()[:, None]
        count = min(asked, len(reference) - voting.leave_one_out)
        note = "" if count == asked else f"only {count} reference images: all of them vote ({asked} were asked for)"
        top5 = hits.any(dim=1).double().mean().item()
        results.append(KnnResult(count, hits[:, 0].double().mean().item(), top5, hits[:, 0], note))
    return tuple(results)


def knn_guesses(
    reference: Float[Tensor, "N F"],
    reference_labels: Int[Tensor, " N"],
    queries: Float[Tensor, "M F"],
    classes: int,
    voting: Voting = Voting(),
) -> list[Int[Tensor, "M G"]]:
    """Return, for each number of neighbours, the (up to five) classes that get the most votes, most first; −1: no vote.

    Features are L2-normalised here; computed in their dtype, float32 at least. Of equally near neighbours the earlier one
    is taken, of classes with equal votes the lower. All else as `knn_accuracy`.
    """
    voting = _usable(voting, reference, reference_labels, queries, classes)
    guesses: list[list[Tensor]] = [[] for _ in voting.neighbours]
    for chunk in votes_by_chunk(reference, reference_labels, queries, classes, voting):
        for place, votes in enumerate(chunk):
            weight, best = largest(votes, min(5, classes))
            guesses[place].append(torch.where(weight > 0, best, -1))
    return [torch.cat(chunks).cpu() for chunks in guesses]


def first_share_of_each_class(labels: np.ndarray | Tensor, share: float) -> np.ndarray:
    """Return the int64 indices of the first `share` of each class, at least one of each, in source order.

    The published monitor's reference set: the first 20 % of each class in path order.
    """
    if not 0 < share <= 1:
        raise UsageError(f"a share of each class must be above 0 and at most 1, not {share}")
    labels = np.asarray(labels)
    parts = []
    for members in _members(labels):
        # The tiny addend undoes binary rounding: 0.29 · 100 is 28.999….
        parts.append(members[: max(1, int(share * len(members) + 1e-9))])
    return np.sort(np.concatenate(parts)) if parts else np.zeros(0, np.int64)


def held_out_split(labels: np.ndarray | Tensor, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (kept, held out) int64 indices in source order: a random `share` of each class is held out.

    At least one image of a class with two or more is held out and at least one kept; a class's only image is kept.
    The same for the same labels and seed. Raises CacoError when no class has two images.
    """
    _check_share(share)
    labels = np.asarray(labels)
    generator = np.random.default_rng(seed)
    held = np.zeros(len(labels), dtype=bool)
    for members in _members(labels):
        if len(members) > 1:
            count = min(max(1, round(share * len(members))), len(members) - 1)
            held[generator.permutation(members)[:count]] = True
    if not held.any():
        raise CacoError("no class has two images, so none can be held out; give --val")
    return np.flatnonzero(~held), np.flatnonzero(held)


def _members(labels: np.ndarray) -> Iterator[np.ndarray]:
    """Yield each class's indices in source order, classes in label order."""
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order])) + 1
    yield from (part for part in np.split(order, starts) if len(part))


def votes_by_chunk(
    reference: Float[Tensor, "N F"],
    reference_labels: Int[Tensor, " N"],
    queries: Float[Tensor, "M F"],
    classes: int,
    voting: Voting,
) -> Iterator[list[Float[Tensor, "chunk C"]]]:
    """Yield, for each chunk of queries, the votes of each number of neighbours (at most N)."""
    labels = reference_labels.to(reference.device)
    for start in range(0, len(queries), QUERY_CHUNK):
        part = _unit_rows(queries[start : start + QUERY_CHUNK].to(reference.device))
        cosines, indices = _nearest(reference, part, max(voting.neighbours), start if voting.leave_one_out else None)
        weights, voted = (cosines / voting.temperature).exp(), labels[indices]
        nothing = weights.new_zeros(len(part), classes)
        yield [nothing.scatter_add(1, voted[:, :count], weights[:, :count]) for count in voting.neighbours]


@torch.no_grad()
def _nearest(reference: Tensor, queries: Tensor, count: int, first_row: int | None) -> tuple[Tensor, Tensor]:
    """Return the cosines and indices [m, count] of the nearest reference rows, nearest first.

    first_row: the reference row that is query 0 itself (then query 1 is the next, …) and must not be found; None: none.
    """
    best: tuple[Tensor, Tensor] | None = None
    length = _reference_chunk(reference.device, len(queries))
    memory = queries.new_empty(len(queries) * min(length, len(reference)))
    for start in range(0, len(reference), length):
        part = _unit_rows(reference[start : start + length])
        cosines = memory[: len(queries) * len(part)].view(len(queries), len(part))
        torch.mm(queries, part.T, out=cosines)
        if first_row is not None:
            cosines.diagonal(first_row - start).fill_(-torch.inf)  # empty where the query is in another chunk
        values, columns = largest(cosines, min(count, len(part)))
        found = (values, columns + start)
        if best is not None:
            # Earlier rows stand first, so a stable sort keeps them first among equals.
            values, indices = (torch.cat(pair, dim=1) for pair in zip(best, found, strict=True))
            values, order = values.sort(dim=1, descending=True, stable=True)
            found = (values[:, :count], indices.gather(1, order[:, :count]))
        best = found
    assert best is not None  # _usable refused an empty reference
    return best


def _reference_chunk(device: torch.device, queries: int) -> int:
    """Return how many reference images are compared with the queries at a time."""
    if device.type != "cuda":
        return REFERENCE_CHUNK
    longer = REFERENCE_CHUNK * LONGER_ON_GPU
    needed = 4 * longer * queries  # bytes of their cosines
    return longer if needed < SHARE_OF_GPU * free_on(device) else REFERENCE_CHUNK


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest values of each row and their columns; of equal values the lower columns, in order.

    `topk` alone takes any of equal values, which differs between devices and chunk sizes; the rare rows where such a
    tie decides who is in (the next value is the last one's equal) are taken a second time, without the surplus.
    """
    top, columns = values.topk(min(count + 1, values.shape[1]), dim=1)
    tied = (top[:, count - 1 : count] == top[:, count:]).nonzero()[:, 0]
    top, columns = top[:, :count], columns[:, :count].contiguous()
    if len(tied):
        rows, least = values[tied], top[tied, -1:]
        equal, better = rows == least, rows > least
        surplus = equal & (equal.cumsum(dim=1) > count - better.sum(dim=1, keepdim=True))
        columns[tied] = rows.masked_fill(surplus, -torch.inf).topk(count, dim=1).indices
    columns = columns.sort(dim=1).values
    top, order = values.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return top, columns.gather(1, order)


def _unit_rows(features: Tensor) -> Tensor:
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)


def _usable(voting: Voting, reference: Tensor, reference_labels: Tensor, queries: Tensor, classes: int) -> Voting:
    """Check everything that can be wrong with the input; return the voting with no more neighbours than there are."""
    if not len(queries):
        raise CacoError("kNN needs at least one image to judge; there is none")
    if voting.leave_one_out and len(queries) != len(reference):
        raise CacoError("leave-one-out judges the reference by itself: give the same features twice")
    available = len(reference) - voting.leave_one_out
    if available < 1:
        raise CacoError("kNN needs at least one labelled image that can vote; there is none")
    if not voting.neighbours or min(voting.neighbours) < 1:
        raise UsageError("the number of neighbours must be at least 1")
    if voting.temperature < LEAST_TEMPERATURE:
        raise UsageError(f"the temperature of the votes must be at least {LEAST_TEMPERATURE}, not {voting.temperature}")
    _check_labels(reference_labels, classes, "reference")
    return replace(voting, neighbours=[min(count, available) for count in voting.neighbours])


def _check_labels(labels: Tensor, classes: int, what: str) -> None:
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        wrong = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
        raise CacoError(f"label {wrong} of the {what} is outside 0-{classes - 1} ({classes} classes)")


def _check_share(share: float) -> None:
    if not 0 < share < 1:
        raise UsageError(f"a share of images must lie between 0 and 1, not {share}")
