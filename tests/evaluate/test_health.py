"""Label-free measures against plain loops and known cases; faults in words."""

import math

import pytest
import torch

from caco.evaluate.health import ChoiceWindow, faults, rank_me


def random_features(count, width, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(50, 8), (8, 50), (1, 5), (30, 30)])
def test_rank_me_equals_singular_values(shape):
    features = random_features(*shape)
    singular = torch.linalg.svdvals(features)
    share = singular / singular.sum()
    assert rank_me(features).item() == pytest.approx(math.exp(-(share * share.log()).sum()), rel=1e-9)


def test_rank_me_of_known_cases():
    assert rank_me(torch.eye(6)).item() == pytest.approx(6)
    collapsed = torch.ones(500, 1) * torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
    assert rank_me(collapsed).item() == pytest.approx(1, abs=1e-3)
    assert rank_me(torch.zeros(4, 3)).item() == 1
    assert rank_me(random_features(20_000, 4)).item() == pytest.approx(4, abs=0.01)  # more than one chunk


def test_choice_window():
    window = ChoiceWindow(8)
    assert [value.item() for value in window.usage()] == [0, 1, 0]
    window.add(torch.tensor([[0, 1], [2, 3]]))
    window.add(torch.tensor([3, 2, 1, 0]))
    used, perplexity, choices = (value.item() for value in window.usage())
    assert (used, choices) == (4, 8)
    assert perplexity == pytest.approx(4)
    window.add(torch.full((992,), 5))
    frequency = torch.tensor([2, 2, 2, 2, 992]) / 1000
    assert window.usage().perplexity.item() == pytest.approx(math.exp(-(frequency * frequency.log()).sum()), rel=1e-5)
    window.clear()
    window.add(torch.tensor([7]))
    assert [value.item() for value in window.usage()] == [1, 1, 1]


def test_a_healthy_run_gets_no_findings():
    assert faults() == ()
    assert faults(slots=1024, used=300, perplexity=150, choices=2560, spread=0.9, rank=60.0, dimensions=256) == ()
    # A short window cannot use more slots than it has choices.
    assert faults(slots=65_536, used=400, perplexity=380, choices=512) == ()
    assert faults(slots=1024, used=3, perplexity=3, choices=16) == ()


def test_few_slots_are_told_with_the_option_to_change():
    (finding,) = faults(slots=1024, used=23, perplexity=12, choices=2560)
    assert not finding.collapsed
    assert str(finding) == (
        "only 23 of 1,024 slots are used: the embeddings occupy a narrow cone; "
        "lower --bank-size or raise --bank.warm-start-steps"
    )
    (finding,) = faults(slots=1024, used=200, perplexity=1.3, choices=2560)
    assert "nearly all images choose the same slot" in finding.seen
    assert not finding.collapsed
    (finding,) = faults(slots=1024, used=1, perplexity=1, choices=2560)
    assert finding.collapsed


@pytest.mark.parametrize("spread", [0.001, 0.0, math.nan])
def test_collapse_comes_first(spread):
    findings = faults(slots=1024, used=23, perplexity=12, choices=2560, spread=spread, rank=3.0, dimensions=256)
    assert [finding.collapsed for finding in findings] == [True, False, False]
    assert "the encoder has collapsed" in str(findings[0])
    assert "3.0 of 256 dimensions" in str(findings[2])


def test_a_narrow_cone_is_no_collapse():
    (finding,) = faults(spread=0.1)
    assert not finding.collapsed
    assert "narrow cone" in finding.seen


def test_faults_name_options_that_exist():
    from caco.config import BankOptions, OptimizerOptions

    assert {"lr", "warm_start_steps", "temperature"} <= set(BankOptions.__dataclass_fields__)
    assert "warmup_epochs" in OptimizerOptions.__dataclass_fields__
