"""The bank read by compiled code (numba) on a CPU: what `bank_kernels/` is on a GPU.

queries: over the temperature; weight: the slots [K, D], rows of any length, and 1 / ‖row‖ of each [K, 1]. All in float32;
in_pairs: but the factors of products, which are rounded to bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from caco.cpu_kernels import slots
from caco.cpu_kernels.products import panel_width
from caco.cpu_kernels.threads import in_threads, parts_of
from caco.slots import along_sphere

LEAST_SLOTS = 4 * slots.SLOTS
"""Fewest slots worth a thread."""
QUERIES = 256
"""Queries at a time for the slots' gradient: with what they pull with they stay in the second nearest cache."""


def nearest(
    queries: Float[Tensor, "N D"], weight: Float[Tensor, "K D"], inverse_length: Float[Tensor, "K 1"]
) -> tuple[Float[Tensor, " N"], Int[Tensor, " N"]]:
    """Return the largest cosine of each query, a unit row, and the first slot that has it."""
    panels = _transposed_panels(queries)
    parts = _parts_of_slots(weight)
    largest = np.full((len(parts), panels.shape[0] * panels.shape[2]), -np.inf, np.float32)
    indices = np.zeros(largest.shape, np.int64)
    _on_parts(slots.nearest, panels, weight, inverse_length, parts, largest, indices)
    best, part = torch.from_numpy(largest)[:, : len(queries)].max(dim=0)  # of equal parts the first
    return best, torch.from_numpy(indices)[:, : len(queries)].gather(0, part[None])[0]


def softmax(
    queries: Float[Tensor, "N D"],
    weight: Float[Tensor, "K D"],
    inverse_length: Float[Tensor, "K 1"],
    with_mean: bool = True,
    in_pairs: bool = False,
) -> tuple[Float[Tensor, "N 1"], Float[Tensor, "N 1"], Float[Tensor, "N D"]]:
    """Return of each query's softmax the largest logit, Σ exp(logit − largest), and Σ of that · unit slot (or what is 0)."""
    panels = _transposed_panels(queries)
    parts = _parts_of_slots(weight)
    (panel_count, wide, width), given = panels.shape, weight.shape[1]
    largest = np.full((len(parts), panel_count * width), -np.inf, np.float32)
    totals, sums = np.zeros_like(largest), np.zeros((len(parts), wide // width, panel_count * width, width), np.float32)
    options = with_mean, _pairs_of_rows(panels) if in_pairs else None
    _on_parts(slots.softmax, panels, weight, inverse_length, parts, largest, totals, sums, options=options)
    each, total = (torch.from_numpy(values)[:, : len(queries), None] for values in (largest, totals))
    most = each.amax(dim=0)
    shrink = (each - most).exp_()
    slot_sum = torch.from_numpy(sums).transpose(1, 2).flatten(2)[:, : len(queries), :given]
    return most, (total * shrink).sum(dim=0), (slot_sum * shrink).sum(dim=0)


def pulls_on_slots(
    queries: Float[Tensor, "N D"],
    weight: Float[Tensor, "K D"],
    inverse_length: Float[Tensor, "K 1"],
    log_normaliser: Float[Tensor, "N 1"],
    pulls: Float[Tensor, "N D"],
    in_pairs: bool = False,
) -> Float[Tensor, "K D"]:
    """Return Σ p · pull over the queries for each slot, p a query's probability of it, along the sphere."""
    width = panel_width(4)
    each = -(-min(len(queries), QUERIES) // width) * width
    missing = -len(queries) % each  # those pull with 0
    queries, pulls = (F.pad(values, (0, -values.shape[1] % width, 0, missing)) for values in (queries, pulls))
    normalisers = F.pad(log_normaliser[:, 0], (0, missing)).reshape(-1, each).contiguous().numpy()
    in_panels = queries.reshape(-1, each // width, width, queries.shape[1]).transpose(2, 3).contiguous().numpy()
    of_pulls = pulls.reshape(-1, each, pulls.shape[1] // width, width).transpose(1, 2).contiguous().numpy()
    gradient = torch.empty_like(weight)
    arrays = in_panels, of_pulls, normalisers, weight.detach().numpy(), inverse_length[:, 0].contiguous().numpy()
    target, pairs = gradient.numpy(), (_pairs_of_rows(in_panels), _pairs_of_rows(of_pulls)) if in_pairs else None
    in_threads(lambda first, last: slots.pulls_on_slots(*arrays, first, last, target, pairs), _parts_of_slots(weight))
    return gradient


def logits(
    queries: Float[Tensor, "N D"],
    rows: Float[Tensor, "N P D"],
    inverse_length: Float[Tensor, "N P 1"],
    in_pairs: bool = False,
) -> Float[Tensor, "N P"]:
    """Return the logits of some slots for each query, of factors rounded as in `softmax`."""
    factors = torch.bfloat16 if in_pairs else torch.float32
    queries, rows = (values.to(factors).float() for values in (queries, rows * inverse_length))
    return (queries[:, None] * rows).sum(dim=2)


def cooperate(
    gradient: Float[Tensor, "K D"],
    weight: Float[Tensor, "K D"],
    inverse_length: Float[Tensor, "K 1"],
    positives: Int[Tensor, "N P"],
    changes: Float[Tensor, "N P"],
    step: Float[Tensor, "N D"],
) -> None:
    """Add to the gradient change · step of each query for its positives, along the sphere; where the change is not 0."""
    query, place = changes.nonzero(as_tuple=True)
    slot = positives[query, place]
    pulled = changes[query, place, None] * step[query]
    along_sphere(pulled, weight.detach()[slot] * inverse_length[slot], inverse_length[slot])
    gradient.index_add_(0, slot, pulled)


def _transposed_panels(queries: Tensor) -> np.ndarray:
    """Return queries as [N / w, D, w], both rounded up with zeros."""
    width = panel_width(4)
    padded = F.pad(queries, (0, -queries.shape[1] % width, 0, -len(queries) % width))
    result: np.ndarray = padded.reshape(-1, width, padded.shape[1]).transpose(1, 2).contiguous().numpy()
    return result


def _pairs_of_rows(panels: np.ndarray) -> np.ndarray:
    """Return of panels [..., rows, w] each two rows as one of pairs of bfloat16, the first in its lower half."""
    rounded = torch.from_numpy(panels).bfloat16().unflatten(-2, (-1, 2)).transpose(-1, -2).contiguous()
    result: np.ndarray = rounded.view(torch.int32)[..., 0].numpy().view(np.uint32)
    return result


def _parts_of_slots(weight: Tensor) -> list[tuple[int, int]]:
    return parts_of(len(weight), len(weight) // LEAST_SLOTS)


def _on_parts(
    work: Callable[..., None],
    panels: np.ndarray,
    weight: Tensor,
    inverse_length: Tensor,
    parts: list[tuple[int, int]],
    *results: np.ndarray,
    options: tuple[bool | np.ndarray | None, ...] = (),
) -> None:
    """Do the work for each part of the slots, with its own part of the results."""
    arrays = panels, weight.detach().numpy(), inverse_length[:, 0].contiguous().numpy()

    def of_part(first: int, last: int) -> None:
        number = parts.index((first, last))
        work(*arrays, first, last, *(result[number] for result in results), *options)

    in_threads(of_part, parts)
