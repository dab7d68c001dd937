"""Bootstrap intervals of an accuracy."""

import numpy as np
import pytest
import torch

from caco.errors import CacoError
from caco.evaluate.confidence import bootstrap_interval


def test_agrees_with_drawing_images_one_by_one():
    correct = np.random.default_rng(1).random(80) < 0.7
    generator = np.random.default_rng(2)
    drawn = np.array([correct[generator.integers(0, 80, 80)].mean() for _ in range(10_000)])
    low, high = bootstrap_interval(correct)
    assert low == pytest.approx(np.quantile(drawn, 0.025), abs=0.013)  # one image is 0.0125
    assert high == pytest.approx(np.quantile(drawn, 0.975), abs=0.013)


def test_width_is_that_of_the_normal_approximation():
    correct = torch.arange(10_000) % 4 == 0
    low, high = bootstrap_interval(correct)
    assert low == pytest.approx(0.25 - 1.96 * (0.25 * 0.75 / 10_000) ** 0.5, abs=3e-4)
    assert high == pytest.approx(0.25 + 1.96 * (0.25 * 0.75 / 10_000) ** 0.5, abs=3e-4)


def test_covers_the_truth_about_95_times_in_100():
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        low, high = bootstrap_interval(generator.random(200) < 0.6)
        inside += low <= 0.6 <= high
    assert 0.91 <= inside / 400 <= 0.98


@pytest.mark.parametrize("images", [1, 5, 40, 1000])
def test_images_that_are_all_alike_are_no_certainty(images):
    """An encoder that is right less often than `low` has a chance of less than 0.025 to be right on all of them."""
    low, high = bootstrap_interval(np.ones(images, bool))
    assert (low**images, high) == (pytest.approx(0.025), 1.0)
    assert bootstrap_interval(np.zeros(images, bool)) == (0.0, pytest.approx(1 - low))


def test_repeatable():
    correct = np.array([True, False, True])
    assert bootstrap_interval(correct) == bootstrap_interval(correct)
    with pytest.raises(CacoError):
        bootstrap_interval(np.zeros(0, bool))
