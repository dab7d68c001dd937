"""How far an accuracy can be trusted, given the number of images it was measured on."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from jaxtyping import Float
from torch import Tensor

from caco.errors import CacoError

CONFIDENCE = 0.95
RESAMPLES = 10_000
STANDARD_ERRORS = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
"""By which a normal variable leaves its mean, to either side, with the rest of that probability: 1.96."""


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


def is_above(accuracy: float, images: int, other: float, other_images: int) -> bool:
    """Return whether an accuracy (0-1) is above another by more than the choice of the judged images explains (95 %).

    The test of two independent shares with Yates' correction, without which few images say too much. Accuracies on the
    same images are independent at worst (what is hard for one is hard for the other), so there it says yes too rarely, not
    too often.
    """
    common = (accuracy * images + other * other_images) / (images + other_images)
    each = 1 / images + 1 / other_images
    return bool(accuracy - other - each / 2 > STANDARD_ERRORS * math.sqrt(common * (1 - common) * each))


def mean_is_above_zero(differences: Float[Tensor, " N"]) -> bool:
    """Return whether the mean of N differences, one for each image, is above 0 by more than their choice explains (95 %).

    Never of fewer than six: that five coins fall alike is no rarer than the other 5 % allow (1/32 to a side).
    """
    if len(differences) < 6:
        return False
    exact = differences.double()
    return bool(exact.mean() > STANDARD_ERRORS * exact.std() / math.sqrt(len(exact)))
