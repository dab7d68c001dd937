"""Bootstrap intervals of an accuracy."""

import numpy as np
import pytest
import torch

from caco.errors import CacoError
from caco.evaluate.confidence import bootstrap_interval, is_above, mean_is_above_zero


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


def test_equal_accuracies_are_rarely_above_each_other():
    """By chance in 2.5 of 100 cases, on images of their own; on the same images more rarely."""
    generator = np.random.default_rng(0)
    draws = generator.binomial(300, 0.4, size=(4000, 2)) / 300
    assert 0.01 < np.mean([is_above(a, 300, b, 300) for a, b in draws]) < 0.03
    assert is_above(0.5, 300, 0.4, 300) and not is_above(0.5, 300, 0.45, 300) and not is_above(0.4, 300, 0.5, 300)
    assert not is_above(0.0, 5, 0.0, 5) and not is_above(1.0, 5, 1.0, 5)
    # All against none: of 3 and 3 chance alone gives that once in 20 (Fisher), of 4 and 4 once in 70.
    assert [is_above(1.0, images, 0.0, images) for images in (1, 2, 3, 4)] == [False, False, False, True]


def test_mean_of_differences_is_rarely_above_zero_by_chance():
    draws = torch.randn(4000, 50, generator=torch.Generator().manual_seed(0))
    assert 0.015 < np.mean([mean_is_above_zero(row) for row in draws]) < 0.04
    assert mean_is_above_zero(draws[0] + 1) and not mean_is_above_zero(draws[0] - 1)
    assert not mean_is_above_zero(torch.ones(5)) and mean_is_above_zero(torch.ones(6))
    assert not mean_is_above_zero(torch.zeros(9))
