"""The bank as attention, by the fused kernels that torch has for it on GPUs: queries attend to slots.

Let slots be the keys and the values. Then attention's normaliser is that of a query's softmax p over all slots, its output the
mean slot under p, and the gradient that its values get, Σ p·pull over the queries, is what moves the slots (`loss.py`). So the
exponentials of all queries and slots stay on the chip, which as a tensor are written and read some ten times in a step.

Source of the kernels: Dao 2023, arXiv:2307.08691, as torch ships them. The results are theirs: products of bfloat16, summed
in float32, probabilities, means and gradients rounded to bfloat16. (float16 is not taken: most probabilities are below its least.)
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

PART = 1024
"""Slots that a query attends to at a time: 512 queries and 65,536 slots are 256 pieces of work, enough to fill a GPU."""
WIDEST = 256
"""Width of the widest embedding that the kernels take; all widths are multiples of 8."""
DEVIATION = 0.02
"""Largest relative deviation from plain products that rounding to bfloat16 explains."""


def mean_slots(
    queries: Float[Tensor, "N D"], rows: Float[Tensor, "k D"]
) -> tuple[Float[Tensor, "N 1"], Float[Tensor, "N D"]]:
    """Return log Σ exp(query·row) over the rows for each query, and the mean row under its softmax; both float32."""
    queries, rows = queries.to(torch.bfloat16), rows.to(torch.bfloat16)
    whole = len(rows) // PART * PART
    parts = [rows[:whole].view(-1, 1, PART, rows.shape[1]), rows[whole:].view(1, 1, -1, rows.shape[1])]
    seen = [_attend(queries, part) for part in parts if part.numel()]
    of_parts, means = seen[0] if len(seen) == 1 else map(torch.cat, zip(*seen, strict=True))
    log_normaliser = of_parts.logsumexp(dim=0)
    shares = (of_parts - log_normaliser).exp_()
    return log_normaliser[:, None], (shares[:, :, None] * means).sum(dim=0)


def pulls_on_slots(
    queries: Float[Tensor, "N D"],
    rows: Float[Tensor, "k D"],
    log_normaliser: Float[Tensor, "N 1"],
    pulls: Float[Tensor, "N D"],
) -> Float[Tensor, "k D"]:
    """Return Σ exp(query·row − log_normaliser) · pull over the queries, for each row; float32.

    log_normaliser: of each query, over all slots, of which the rows may be a part.
    """
    query, row, gradient = (tensor.to(torch.bfloat16)[None, None] for tensor in (queries, rows, pulls))
    normaliser = log_normaliser.float().reshape(1, 1, -1).contiguous()  # the kernel reads it without looking
    return _gradient_of_values(query, row, normaliser, gradient)[0, 0].float()


def _attend(queries: Float[Tensor, "N D"], parts: Float[Tensor, "S 1 k D"]) -> tuple[Tensor, Tensor]:
    """Return the log-normalisers [S, N] and the means [S, N, D] of all queries over each part."""
    queries = queries.expand(len(parts), 1, *queries.shape)
    means, log_normaliser, *_ = torch.ops.aten._scaled_dot_product_flash_attention(queries, parts, parts, scale=1.0)
    return log_normaliser[:, 0], means[:, 0]


def _gradient_of_values(queries: Tensor, rows: Tensor, log_normaliser: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of attention's values; all [1, 1, …, D] but log_normaliser, [1, 1, N].

    The kernel also gives those of queries and keys, which take attention's output into account: nothing here needs them, and
    five products instead of two are the price.
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
    is_for_them = (rows.device.type, rows.dtype, products) == ("cuda", torch.float32, torch.bfloat16)
    return is_for_them and width % 8 == 0 and width <= WIDEST and _agree(rows.device, width)


@lru_cache
def _agree(device: torch.device, width: int, queries: int = 512, rows: int = 32 * PART + 100) -> bool:
    """Return whether the kernels give here what plain products give; they are private to torch, and made for some GPUs.

    By default at a size that is computed as a bank's is: 256 pieces of work and a remainder. Where they do not, it is told.
    """
    problem = ""
    with torch.autocast(device.type, enabled=False):
        try:
            deviation = _deviation(*_example(device, width, queries, rows))
            if not deviation < DEVIATION:  # NaN, too
                problem = f"they deviate by {deviation:.2g} from plain products"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no such kernel for this GPU, or another signature of it: as many kinds as reasons
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
    if problem:
        logger = logging.getLogger(__name__)
        logger.warning("attention's kernels are not used for the bank, which is slower: %s", problem)
    return not problem


def _example(device: torch.device, width: int, queries: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries over a temperature, unit rows, and pulls; always the same."""
    generator = torch.Generator().manual_seed(0)
    query, row, pull = (torch.randn(count, width, generator=generator) for count in (queries, rows, queries))
    return (F.normalize(query, dim=1) / 0.1).to(device), F.normalize(row, dim=1).to(device), pull.to(device)


def _deviation(queries: Tensor, rows: Tensor, pulls: Tensor) -> float:
    """Return the largest relative deviation of any result from plain products. Waits for the device."""
    log_normaliser, means = mean_slots(queries, rows)
    some = rows[: len(rows) // 2 + 50]  # a bank is read in blocks
    logits = queries @ rows.T
    probability = logits.softmax(dim=1)
    pairs = [
        (log_normaliser, logits.logsumexp(dim=1, keepdim=True)),
        (means, probability @ rows),
        (pulls_on_slots(queries, some, log_normaliser, pulls), probability[:, : len(some)].T @ pulls),
    ]
    return float(torch.stack([(one - other).norm() / other.norm() for one, other in pairs]).amax())
