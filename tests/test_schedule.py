"""Schedules against the reference, and at their edges."""

import pytest
import torch
from conftest import relative_error

from caco.schedule import bank_lr, encoder_lr, key_momentum, warmup_cosine


def test_schedules_reproduce_the_reference(golden):
    given = golden("schedules")
    epochs = range(200)
    ours = {
        "encoder_lr": [encoder_lr(e, 200, 10, 0.3, 0.003, 1024) for e in epochs],
        "key_momentum": [key_momentum(e, 200, 0.99, cosine=True) for e in epochs],
        "bank_lr_constant": [bank_lr(e, 200, 10, 3.0, 3.0, 65536) for e in epochs],
        "bank_lr_cosine": [bank_lr(e, 200, 10, 3.0, 0.03, 65536) for e in epochs],
    }
    assert set(ours) == set(given)
    for name, values in ours.items():
        assert relative_error(torch.tensor(values, dtype=torch.float64), given[name]) < 1e-9, name


def test_a_run_that_is_all_warm_up_has_rates():
    assert [warmup_cosine(e, 3, 3, 3.0, 0.0) for e in range(3)] == [1.0, 2.0, 3.0]
    assert warmup_cosine(3, 4, 3, 3.0, 0.0) == 3.0


def test_no_warm_up_and_final_rate_zero():
    assert warmup_cosine(0, 10, 0, 1.0, 0.0) == 1.0
    assert warmup_cosine(5, 10, 0, 1.0, 0.0) == pytest.approx(0.5)


def test_bank_rate_scales_with_the_bank_only():
    assert bank_lr(20, 100, 0, 3.0, 3.0, 1024) == pytest.approx(3.0 / 64)


def test_constant_key_momentum():
    assert {key_momentum(e, 10, 0.99, cosine=False) for e in range(10)} == {0.99}
