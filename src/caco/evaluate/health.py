"""Health without labels: do the embeddings spread, how many dimensions and how many slots do they use?

Measures stay on the device as scalar tensors, so that they can be taken in the training loop and read later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rank_me(embeddings: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
    """Return the effective number of dimensions, between 1 and min(N, D): exp of the singular values' entropy.

    Computed from the smaller Gram matrix in float64, where its squared condition does no harm. All-zero features: 1.
    Source: RankMe, Garrido et al. 2023, arXiv:2210.02885, equation 1.
    """
    if embeddings.device.type == "mps":  # has no float64
        embeddings = embeddings.cpu()
    rows, columns = embeddings.shape
    if rows <= columns:
        exact = embeddings.double()
        gram = exact @ exact.T
    else:
        gram = embeddings.new_zeros(columns, columns, dtype=torch.float64)
        for part in embeddings.split(8192):
            gram += part.double().T @ part.double()
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    share = singular / singular.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return _perplexity(share)


def _perplexity(share: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    """Return exp of the entropy of shares that sum to 1: how many equal shares would be as spread."""
    entropy: Tensor = torch.special.entr(share).sum()
    return entropy.exp()


class Usage(NamedTuple):
    """How a bank of K slots was used in a window of choices. Scalars on the device."""

    used: Tensor
    """Number of slots that were chosen at least once."""
    perplexity: Tensor
    """Slots in even use: exp of the entropy of the choices; 1 when all choose one slot, K when all are chosen alike."""
    choices: Tensor
    """Number of choices in the window."""


class ChoiceWindow:
    """Counts which slots were chosen as positives since the last `clear`. Never waits for the device."""

    def __init__(self, slots: int, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(slots, dtype=torch.int64, device=device)
        """int64 [K]; save and restore it to resume a window."""

    def add(self, positives: Int[Tensor, "*any"]) -> None:
        """Count the chosen slots of one step, in any shape."""
        chosen = positives.flatten()
        self.counts.scatter_add_(0, chosen, torch.ones_like(chosen))

    def clear(self) -> None:
        """Begin a new window."""
        self.counts.zero_()

    def usage(self, over_processes: Callable[[Tensor], Tensor] = lambda counts: counts) -> Usage:
        """Return what the window holds. Without any choice: 0 used, perplexity 1.

        over_processes: sums the counts of all processes, where there are several.
        """
        counts = over_processes(self.counts)
        choices = counts.sum()
        used = (counts > 0).sum()
        frequency = counts.float() / choices.clamp_min(1)
        return Usage(used, _perplexity(frequency), choices)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, in plain words, and the option to change."""

    collapsed: bool
    """The run has failed and going on is pointless (else: it could do better)."""
    seen: str
    advice: str

    def __str__(self) -> str:
        return f"{self.seen}; {self.advice}"


EARLY = 100
"""Training steps before which nothing can be found wrong: an encoder begins with embeddings that hardly differ."""
# Beyond these a finding is reported. A healthy small run (16-channel ResNet, K = 1,024) chose 300 slots, a bad one 11-40.
LOW_USAGE = 0.1
LEAST_CHOICES = 100
COLLAPSED_SPREAD, LOW_SPREAD = 0.02, 0.2
LOW_RANK = 0.05


def faults(
    *,
    slots: int | None = None,
    used: float | None = None,
    perplexity: float | None = None,
    choices: float | None = None,
    spread: float | None = None,
    rank: float | None = None,
    dimensions: int | None = None,
) -> tuple[Finding, ...]:
    """Return what is wrong with a run, worst first; nothing where no fault is seen, which is not to say that it learns.

    Judges what it is given. slots, used, perplexity, choices: of the bank and a window of choices (`Usage`), judged
    together; fewer than 100 choices are not judged. spread: √(1 − ‖mean embedding‖²), as the records have it. rank,
    dimensions: `rank_me` of embeddings of that width.
    """
    findings = []
    if spread is not None and not spread > LOW_SPREAD:  # also when it is NaN
        findings.append(_spread_finding(spread))
    if slots is not None and used is not None and perplexity is not None and choices is not None:
        possible = min(slots, choices)
        if choices >= LEAST_CHOICES and possible > 2 and (used < LOW_USAGE * possible or perplexity < 2):
            findings.append(_usage_finding(slots, used, perplexity))
    if rank is not None and dimensions is not None and rank < max(2.0, LOW_RANK * dimensions) and dimensions > 2:
        findings.append(
            Finding(
                collapsed=False,
                seen=f"the embeddings use about {rank:.1f} of {dimensions:,} dimensions (RankMe)",
                advice="lower --bank.temperature or train longer",
            )
        )
    return tuple(sorted(findings, key=lambda finding: not finding.collapsed))


def _spread_finding(spread: float) -> Finding:
    if not spread > COLLAPSED_SPREAD:
        return Finding(
            collapsed=True,
            seen=f"the encoder has collapsed: all images get nearly the same embedding (spread {spread:.3f} of 1)",
            advice="start again with a lower --lr or a longer --optimizer.warmup-epochs",
        )
    return Finding(
        collapsed=False,
        seen=f"the embeddings occupy a narrow cone (spread {spread:.2f} of 1)",
        advice="raise --bank.warm-start-steps",
    )


def _usage_finding(slots: int, used: float, perplexity: float) -> Finding:
    advice = "lower --bank-size or raise --bank.warm-start-steps"
    if perplexity < 2:
        return Finding(
            collapsed=used <= 2,
            seen=f"nearly all images choose the same slot of the bank ({used:,.0f} of {slots:,} slots are used)",
            advice=advice,
        )
    return Finding(
        collapsed=False,
        seen=f"only {used:,.0f} of {slots:,} slots are used: the embeddings occupy a narrow cone",
        advice=advice,
    )
