"""The linear probe against torch.optim.SGD one rate at a time, and what it promises."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from caco.errors import CacoError, UsageError
from caco.evaluate import linear
from caco.evaluate.knn import held_out_split
from caco.evaluate.linear import linear_probe, train_heads


def clusters(count, classes=4, width=6, noise=0.7, seed=0):
    """Features of classes around random centres, on axes of very different scales."""
    generator = torch.Generator().manual_seed(99)
    centres = torch.randn(classes, width, generator=generator)
    scales = 10 ** torch.linspace(-2, 2, width)
    generator.manual_seed(seed)
    labels = torch.arange(count) % classes
    return (centres[labels] + noise * torch.randn(count, width, generator=generator)) * scales + 5 * scales, labels


def plain_head(features, labels, classes, rate, epochs, batch_size, momentum, seed):
    """The same head by autograd and torch.optim.SGD."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(features.shape[1], classes, dtype=features.dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * 0.01)
        head.bias.zero_()
    optimizer = torch.optim.SGD(head.parameters(), lr=rate, momentum=momentum)
    steps = math.ceil(len(features) / batch_size)
    for epoch in range(epochs):
        order = torch.randperm(len(features), generator=generator)
        for step, chosen in enumerate(order.tensor_split(steps)):
            progress = (epoch * steps + step) / (epochs * steps)
            optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * progress))
            optimizer.zero_grad()
            F.cross_entropy(head(features[chosen]), labels[chosen]).backward()
            optimizer.step()
    return head


@pytest.mark.parametrize(("count", "classes", "batch_size"), [(50, 4, 16), (7, 1, 7), (5, 3, 1), (3, 2, 64)])
def test_all_rates_at_once_equal_one_at_a_time(count, classes, batch_size):
    generator = torch.Generator().manual_seed(count)
    features = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (count,), generator=generator)
    rates = (0.01, 0.3, 2.0)
    weights, biases = train_heads(features, labels, classes, rates, 5, batch_size, 0.9, seed=7)
    for place, rate in enumerate(rates):
        head = plain_head(features, labels, classes, rate, 5, batch_size, 0.9, seed=7)
        torch.testing.assert_close(weights[place], head.weight.detach(), rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(biases[place], head.bias.detach(), rtol=1e-10, atol=1e-13)


def test_a_diverging_rate_spoils_no_other():
    features, labels = 10 * torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3
    alone = train_heads(features, labels, 3, (0.1,), 5, 16, 0.9, 0)
    both = train_heads(features, labels, 3, (0.1, 1e38), 5, 16, 0.9, 0)
    assert not torch.isfinite(both[0][1]).all()
    torch.testing.assert_close(both[0][0], alone[0][0])
    trials = linear.try_heads(*both, features, labels, (0.1, 1e38))
    assert trials[0].top1 > 0
    assert (trials[1].top1, trials[1].loss) == (0, math.inf)


def test_trials_are_judged_as_each_head_alone(monkeypatch):
    monkeypatch.setattr(linear, "JUDGE_CHUNK", 7)
    features, labels = clusters(40)
    weights = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    biases = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    for place, trial in enumerate(linear.try_heads(weights, biases, features, labels, (1.0, 2.0, 3.0))):
        logits = features @ weights[place].T + biases[place]
        assert trial.learning_rate == place + 1
        assert trial.top1 == pytest.approx((logits.argmax(dim=1) == labels).double().mean().item())
        assert trial.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_probe_learns_and_reports():
    train, train_labels = clusters(400)
    val, val_labels = clusters(203, seed=1)
    result = linear_probe(train, train_labels, val, val_labels, epochs=20)
    assert result.top1 > 0.75
    assert result.top5 == 1.0  # four classes
    assert result.correct.shape == (203,)
    logits = val @ result.weight.T + result.bias  # the head takes features as they come
    assert torch.equal(logits.argmax(dim=1) == val_labels, result.correct)
    assert result.top1 == pytest.approx(result.correct.double().mean().item())
    for label in range(4):
        expected = result.correct[val_labels == label].double().mean().item()
        assert result.per_class[label].item() == pytest.approx(expected)
    assert [trial.learning_rate for trial in result.trials] == list(linear.LEARNING_RATES)
    best = max(trial.top1 for trial in result.trials)
    chosen = next(trial for trial in result.trials if trial.learning_rate == result.learning_rate)
    assert chosen.top1 == best
    assert chosen.loss == min(trial.loss for trial in result.trials if trial.top1 == best)


def test_the_rate_is_chosen_on_a_held_out_part_of_train():
    """The trials are what the heads of the kept part do on the held-out part; the final head is of the whole."""
    train, labels = clusters(300)
    rates = (1e-3, 1e-1)
    result = linear_probe(train, labels, train[:9], labels[:9], learning_rates=rates, epochs=3, batch_size=32, seed=5)
    standard = (train - train.mean(dim=0)) / train.std(dim=0, correction=0)
    # The largest scale here is 10^4 times the least, so the least ones are floored.
    deviation = train.std(dim=0, correction=0)
    standard = standard * (deviation / deviation.clamp(min=1e-3 * deviation.max()))
    kept, held = held_out_split(labels, 0.1, seed=5)
    for rate, trial in zip(rates, result.trials, strict=True):
        head = plain_head(standard[kept], labels[kept], 4, rate, 3, 32, 0.9, seed=5)
        expected = F.cross_entropy(head(standard[held]), labels[held]).item()
        assert trial.loss == pytest.approx(expected, rel=1e-4)
    final = plain_head(standard, labels, 4, result.learning_rate, 3, 32, 0.9, seed=5)
    torch.testing.assert_close(train @ result.weight.T + result.bias, final(standard).detach(), rtol=1e-3, atol=1e-3)


def test_validation_images_change_nothing_but_the_judgement():
    train, labels = clusters(120)
    first = linear_probe(train, labels, train[:5], labels[:5], epochs=2)
    second = linear_probe(train, labels, 100 * train[7:9], labels[7:9], epochs=2)
    assert torch.equal(first.weight, second.weight)
    assert first.trials == second.trials
    other = linear_probe(train, labels, train[:5], labels[:5], epochs=2, seed=1)
    assert not torch.equal(first.weight, other.weight)


def test_top5_and_absent_classes():
    generator = torch.Generator().manual_seed(0)
    train, labels = torch.randn(160, 5, generator=generator), torch.arange(160) % 8
    val, val_labels = torch.randn(50, 5, generator=generator), torch.arange(50) % 7
    result = linear_probe(train, labels, val, val_labels, learning_rates=[0.1], epochs=2)
    assert result.trials == ()
    assert result.learning_rate == 0.1
    logits = val @ result.weight.T + result.bias
    best_five = logits.argsort(dim=1, descending=True)[:, :5]
    assert result.top5 == pytest.approx((best_five == val_labels[:, None]).any(dim=1).double().mean().item())
    assert result.per_class.isnan().tolist() == [False] * 7 + [True]


def test_odd_input():
    train, labels = clusters(40)
    zeros = torch.zeros(40, dtype=torch.long)
    assert linear_probe(train, zeros, train, zeros, epochs=1).top1 == 1.0
    collapsed = linear_probe(torch.ones(40, 3), labels, torch.ones(4, 3), labels[:4], epochs=2)
    assert 0 <= collapsed.top1 <= 0.5
    dead = torch.cat([train, torch.full((40, 1), 7.0)], dim=1)  # a feature that never changes, until the validation set
    val = torch.cat([train, torch.full((40, 1), 8.0)], dim=1)
    assert linear_probe(dead, labels, val, labels, epochs=20).top1 > 0.5
    assert linear_probe(train, labels, train[:1], labels[:1], epochs=1).correct.shape == (1,)


@pytest.mark.parametrize(("count", "size"), [(1, 16), (49, 16), (800, 16), (1600, 32), (50_000, 512), (10**6, 1024)])
def test_automatic_batch_size(count, size):
    features, labels = torch.randn(count, 1, generator=torch.Generator().manual_seed(0)), torch.arange(count) % 2
    result = linear_probe(features, labels, features[:1], labels[:1], classes=2, learning_rates=[0.1], epochs=1)
    assert result.batch_size == size


def test_wrong_input_is_told():
    train, labels = clusters(40)
    with pytest.raises(CacoError, match="label 9 of the validation images is outside 0-3"):
        linear_probe(train, labels, train[:1], torch.tensor([9]))
    with pytest.raises(CacoError, match="label 3 of the training images is outside 0-1"):
        linear_probe(train, labels, train, labels, classes=2)
    with pytest.raises(CacoError, match="at least one labelled image"):
        linear_probe(train, labels, train[:0], labels[:0])
    with pytest.raises(CacoError, match="diverged at learning rate 1e\\+38"):
        linear_probe(train, labels, train, labels, learning_rates=[1e38], epochs=3)
    with pytest.raises(UsageError, match="no class has two training images.*--lr"):
        linear_probe(train[:4], labels[:4], train, labels)
    assert linear_probe(train[:4], labels[:4], train, labels, learning_rates=[0.1], epochs=1).trials == ()
    with pytest.raises(UsageError, match="at least one learning rate above 0"):
        linear_probe(train, labels, train, labels, learning_rates=[])
    with pytest.raises(UsageError, match="batch size"):
        linear_probe(train, labels, train, labels, batch_size=0)
