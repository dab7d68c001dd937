"""The bank as attention, by the fused kernels that torch has for it on GPUs: queries attend to slots.

Let slots be the keys and the values. Then attention's normaliser is that of a query's softmax p over all slots, its output the
mean slot under p, and the gradient that its values get, Σ p·pull over the queries, is what moves the slots (`loss.py`). So the
matrix of queries and slots stays on the chip, which as a tensor is written and read some ten times in a step.

Source of the kernels: Dao 2023, arXiv:2307.08691, as torch ships them. The results are theirs: products of half precision,
summed in float32, means and gradients rounded to half precision.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

PART = 1024
"""Slots that a query attends to at a time: 512 queries and 65,536 slots are 256 pieces of work, enough to fill a GPU."""


def mean_slots(
    queries: Float[Tensor, "N D"], rows: Float[Tensor, "k D"], products: torch.dtype
) -> tuple[Float[Tensor, "N 1"], Float[Tensor, "N D"]]:
    """Return log Σ exp(query·row) over the rows for each query, and the mean row under its softmax; both float32.

    products: the half precision that the factors are rounded to.
    """
    queries, rows = queries.to(products), rows.to(products)
    whole = len(rows) // PART * PART
    parts = [rows[:whole].view(-1, 1, PART, rows.shape[1]), rows[whole:].view(1, 1, -1, rows.shape[1])]
    seen = [_attend(queries, part) for part in parts if part.numel()]
    of_parts, means = (torch.cat(results) for results in zip(*seen, strict=True))
    log_normaliser = of_parts.logsumexp(dim=0)
    shares = (of_parts - log_normaliser).exp_()
    return log_normaliser[:, None], (shares[:, :, None] * means).sum(dim=0)


def pulls_on_slots(
    queries: Float[Tensor, "N D"],
    rows: Float[Tensor, "k D"],
    log_normaliser: Float[Tensor, "N 1"],
    pulls: Float[Tensor, "N D"],
    products: torch.dtype,
) -> Float[Tensor, "k D"]:
    """Return Σ exp(query·row − log_normaliser) · pull over the queries, for each row; float32.

    log_normaliser: of each query, over all slots, of which the rows may be a part.
    """
    query, row, gradient = (tensor.to(products)[None, None] for tensor in (queries, rows, pulls))
    return _gradient_of_values(query, row, log_normaliser.view(1, 1, -1), gradient)[0, 0].float()


def _attend(queries: Float[Tensor, "N D"], parts: Float[Tensor, "S 1 k D"]) -> tuple[Tensor, Tensor]:
    """Return the log-normalisers [S, N] and the means [S, N, D] of all queries over each part."""
    queries = queries.expand(len(parts), 1, *queries.shape)
    means, log_normaliser, *_ = torch.ops.aten._scaled_dot_product_flash_attention(queries, parts, parts, scale=1.0)
    return log_normaliser[:, 0], means[:, 0]


def _gradient_of_values(queries: Tensor, rows: Tensor, log_normaliser: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of attention's values; all [1, 1, …, D] but log_normaliser, [1, 1, N].

    The kernel also gives those of queries and keys, which take attention's output into account; nothing here needs them.
    """
    seed, offset = (torch.empty(shape, dtype=torch.uint64, device=rows.device) for shape in ((2,), ()))  # of no dropout
    output, lengths = torch.zeros_like(queries), (None, None, queries.shape[2], rows.shape[2])
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    *_, of_values = backward(
        gradient, queries, rows, rows, output, log_normaliser, *lengths, 0.0, False, seed, offset, scale=1.0
    )
    return of_values  # type: ignore[no-any-return]


def is_fused(rows: Tensor, products: torch.dtype) -> bool:
    """Return whether slots like these are attended to by the kernels: on a GPU where they do what is expected of them.

    The first time they are compared with plain products, and the result is waited for.
    """
    width = rows.shape[1]
    is_for_them = rows.dtype == torch.float32 and products in (torch.bfloat16, torch.float16) and width % 8 == 0
    return rows.device.type == "cuda" and is_for_them and width <= 256 and _agree(rows.device, width, products)


@lru_cache
def _agree(device: torch.device, width: int, products: torch.dtype) -> bool:
    """Return whether the kernels give here what plain products give. (They are private to torch, and made for some GPUs.)"""
    try:
        queries, rows, pulls = _example(device, width)
        log_normaliser, means = mean_slots(queries, rows, products)
        results = log_normaliser, means, pulls_on_slots(queries, rows, log_normaliser, pulls, products)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # no such kernel for this GPU, or another signature of it: as many kinds as there are reasons
        return False
    logits = queries @ rows.T
    probability = logits.softmax(dim=1)
    plain = logits.logsumexp(dim=1, keepdim=True), probability @ rows, probability.T @ pulls
    errors = [(one - other).norm() / other.norm() for one, other in zip(results, plain, strict=True)]
    return bool(torch.stack(errors).amax() < 0.02)  # NaN: no


def _example(device: torch.device, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries over a temperature, unit rows (a whole part and some), and pulls; always the same."""
    generator = torch.Generator().manual_seed(0)
    queries, rows, pulls = (torch.randn(count, width, generator=generator) for count in (96, PART + 100, 96))
    return (F.normalize(queries, dim=1) / 0.1).to(device), F.normalize(rows, dim=1).to(device), pulls.to(device)
