"""The rates of a whole run, epoch by epoch, with the published numbers."""

import math

import pytest

from caco.config import BankOptions, EncoderOptions, OptimizerOptions, Pretrain
from caco.options import override
from caco.recipes import find_recipe
from caco.train.step import rates_at, warm_start_lr, warm_start_steps


def test_the_published_run():
    """lr 0.3 -> 0.003 per 256 images, batch 1,024, 200 epochs, 10 of warm-up; bank 3.0; momentum 0.99 -> 1."""
    config = find_recipe("imagenet-200-b1024")
    first, tenth, last = rates_at(config, 0), rates_at(config, 10), rates_at(config, 199)
    assert vars(first) == pytest.approx({"lr": 0.12, "bank_lr": 0.3, "key_momentum": 0.99})
    assert (tenth.lr, tenth.bank_lr) == (pytest.approx(1.2), pytest.approx(3.0))
    assert tenth.key_momentum == pytest.approx(1 - 0.01 * 0.5 * (1 + math.cos(math.pi * 10 / 200)))
    assert last.lr == pytest.approx(0.012 + 0.5 * (1 + math.cos(math.pi * 189 / 190)) * (1.2 - 0.012))
    assert last.bank_lr == pytest.approx(3.0)
    assert warm_start_lr(config) == pytest.approx(1.2)


def test_the_bank_rate_follows_the_bank_and_the_encoder_rate_the_batch():
    config = override(find_recipe("imagenet-200-b1024"), {"bank_size": 4096, "batch_size": 512})
    rates = rates_at(config, 10)
    assert rates.bank_lr == pytest.approx(3.0 / 16)
    assert rates.lr == pytest.approx(0.6)


def options(**values):
    defaults = {"epochs": 10, "lr": 0.3, "batch_size": 256, "bank_size": 65536}
    return Pretrain(**{**defaults, **values})


@pytest.mark.parametrize(
    ("asked", "epochs", "steps"),
    [
        *[("auto", 10, 100), (7, 10, 7), (7000, 10, 7000), (0, 10, 0)],  # auto: one pass over the images ends it
        *[("long", 1, 100), ("long", 3, 180), ("long", 16, 960), ("long", 17, 1000), ("long", 200, 1000)],
    ],
)
def test_the_warm_start_is_as_long_as_asked_and_in_short_runs_not_most_of_the_work(asked, epochs, steps):
    config = options(epochs=epochs, bank=BankOptions(warm_start_steps=asked))
    assert warm_start_steps(config, steps_per_epoch=100) == steps


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 0), (1, 1), (10, 10), (5, 10), (10, 9), (3, 0)])
def test_every_epoch_and_the_one_behind_the_last_has_finite_rates(epochs, warmup):
    """The trainer asks for epoch + 1 in the last epoch, too; a run of 10 epochs is all warm-up by default."""
    config = options(epochs=epochs, optimizer=OptimizerOptions(warmup_epochs=warmup))
    rates = [rates_at(config, epoch) for epoch in range(epochs + 1)]
    for rate in rates:
        assert all(math.isfinite(value) and value > 0 for value in (rate.lr, rate.bank_lr, rate.key_momentum))
    assert rates[epochs].key_momentum == pytest.approx(1.0)
    assert max(rate.lr for rate in rates) <= 0.3 + 1e-12


def test_constant_key_momentum():
    constant = options(encoder=EncoderOptions(key_momentum=0.9, key_momentum_schedule="constant"))
    assert {rates_at(constant, epoch).key_momentum for epoch in range(11)} == {0.9}


def test_a_bank_rate_that_falls():
    falling = options(epochs=20, bank=BankOptions(lr=3.0, final_lr=0.3))
    rates = [rates_at(falling, epoch).bank_lr for epoch in range(21)]
    assert rates[10] == pytest.approx(3.0)
    assert rates[20] == pytest.approx(0.3)
    assert rates[10:] == sorted(rates[10:], reverse=True)
