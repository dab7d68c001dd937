"""How far an accuracy can be trusted, given the number of images it was measured on."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from caco.errors import CacoError


def bootstrap_interval(
    correct: np.ndarray | Tensor, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Return the (low, high) percentile bootstrap interval of an accuracy, as shares in 0-1.

    correct: bool [M], one entry for each judged image. Drawing M of M yes/no outcomes with replacement and counting
    the yes is one binomial draw, so no resample is ever made. It covers the choice of the judged images only, not the
    training's own randomness. Raises CacoError without images. Source: Efron & Tibshirani 1993, chapter 13.
    """
    outcomes = correct.cpu().numpy() if isinstance(correct, Tensor) else np.asarray(correct)
    if outcomes.size == 0:
        raise CacoError("an accuracy needs at least one judged image; there is none")
    accuracy = float(outcomes.mean(dtype=np.float64))
    draws = np.random.default_rng(seed).binomial(outcomes.size, accuracy, size=resamples) / outcomes.size
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)
