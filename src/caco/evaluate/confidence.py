"""How far an accuracy can be trusted, given the number of images it was measured on."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from caco.errors import CacoError

CONFIDENCE = 0.95
RESAMPLES = 10_000


def bootstrap_interval(correct: np.ndarray | Tensor, *, seed: int = 0) -> tuple[float, float]:
    """Return the (low, high) percentile bootstrap interval of an accuracy (95 %), as shares in 0-1.

    correct: bool [M], one entry for each judged image. Drawing M of M yes/no outcomes with replacement and counting
    the yes is one binomial draw, so no resample is ever made. Where all outcomes are alike all resamples are, which says
    nothing of the next image: there the bound is the exact one (of an accuracy that gives so many alike with the chance
    of one tail). It covers the choice of the judged images only, not the training's own randomness. Raises CacoError without
    images. Source: Efron & Tibshirani 1993, chapter 13; Clopper & Pearson 1934.
    """
    outcomes = correct.cpu().numpy() if isinstance(correct, Tensor) else np.asarray(correct)
    if outcomes.size == 0:
        raise CacoError("an accuracy needs at least one judged image; there is none")
    accuracy = float(outcomes.mean(dtype=np.float64))
    tail = (1 - CONFIDENCE) / 2
    if accuracy in (0.0, 1.0):
        likely = tail ** (1 / outcomes.size)
        return (likely, 1.0) if accuracy else (0.0, 1.0 - likely)
    draws = np.random.default_rng(seed).binomial(outcomes.size, accuracy, size=RESAMPLES) / outcomes.size
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)
