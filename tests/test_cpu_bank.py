"""The bank read by compiled code on a CPU: against the dense form in float64, whatever the sizes, threads and temperatures."""

import pytest
import torch
from conftest import relative_error
from dense_bank import dense_loss, dense_nearest
from torch.nn import functional as F

pytest.importorskip("numba")

from caco import fused
from caco.bank import Bank
from caco.cpu_kernels import bank as kernels
from caco.cpu_kernels import bank_in_pairs, processor
from caco.loss import cooperative_adversarial_loss, encoder_loss
from caco.slots import Slots, Unsharded, inverse_lengths

pytestmark = pytest.mark.usefixtures("threads")

SIZES = [(24, 1000, 16, 2), (5, 64, 8, 1), (300, 2000, 70, 1), (1, 97, 3, 2), (520, 500, 32, 1)]
"""Queries, slots, width, positives: whole panels and parts of them, slots for several threads, more queries than at a time."""


@pytest.fixture(autouse=True)
def small_banks_too(monkeypatch):
    monkeypatch.setattr(fused, "LEAST_SLOTS_ON_CPU", 1)


def given(batch, size, width):
    torch.manual_seed(1)
    return F.normalize(torch.randn(batch, width), dim=1), 3 * torch.randn(size, width)


def dense(queries, slots, positives, weights, temperatures):
    """Return the loss by the dense form in float64, and queries and slots with their gradients."""
    exact = [tensor.detach().double().requires_grad_() for tensor in (queries, slots)]
    loss = dense_loss(*exact, positives, weights.double(), *temperatures)
    loss.backward()
    return loss, exact


@pytest.mark.parametrize("temperatures", [(0.08, 0.08), (0.2, 0.05), (0.002, 0.3), (0.3, 0.002)])
@pytest.mark.parametrize(("batch", "size", "width", "pairs"), SIZES)
def test_loss_and_gradients_are_those_of_the_dense_form(batch, size, width, pairs, temperatures):
    queries, slots = (tensor.requires_grad_() for tensor in given(batch, size, width))
    positives = torch.randint(size, (batch, pairs))
    positives[-1] = positives[0]  # two queries share a slot
    weights = torch.rand(batch, pairs)
    result = cooperative_adversarial_loss(queries, slots, positives, weights, *temperatures)
    result.loss.backward()
    loss, exact = dense(queries, slots, positives, weights, temperatures)
    assert fused.of_parts(slots, torch.float32) is kernels
    tolerance = max(1e-5, 2**-23 / min(temperatures))  # float32's rounding of a logit, which is up to 1 / temperature
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert relative_error(queries.grad, exact[0].grad) < tolerance
    assert relative_error(slots.grad, exact[1].grad) < tolerance
    probability = (exact[0] @ F.normalize(exact[1], dim=1).T / temperatures[0]).softmax(dim=1).gather(1, positives)
    torch.testing.assert_close(result.positive_probability.double(), probability.detach(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("batch", "size", "width", "pairs"), SIZES)
def test_the_nearest_slot_is_found(batch, size, width, pairs):
    keys, slots = given(batch, size, width)
    bank = Bank(size, width)
    bank.weight.data = slots
    assert torch.equal(bank.nearest(keys, bank.slots()), dense_nearest(keys.double(), slots.double()))


@pytest.fixture
def in_pairs(monkeypatch):
    yield from multiplying_pairs(monkeypatch, True)


@pytest.fixture
def not_in_pairs(monkeypatch):
    yield from multiplying_pairs(monkeypatch, False)


def multiplying_pairs(monkeypatch, value):
    """Let a test run as on a processor that has an instruction for pairs of bfloat16, or has not."""
    monkeypatch.setattr(processor, "MULTIPLIES_PAIRS", value)
    fused._checked_on_cpu.cache_clear()
    yield
    fused._checked_on_cpu.cache_clear()


@pytest.mark.parametrize("temperatures", [(0.08, 0.08), (0.2, 0.07)])
@pytest.mark.parametrize(("batch", "size", "width", "pairs"), SIZES)
def test_by_pairs_of_bfloat16_only_products_are_rounded(in_pairs, batch, size, width, pairs, temperatures):
    queries, slots = (tensor.requires_grad_() for tensor in given(batch, size, width))
    positives, weights = torch.randint(size, (batch, pairs)), torch.rand(batch, pairs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = cooperative_adversarial_loss(queries, slots, positives, weights, *temperatures)
    result.loss.backward()
    loss, exact = dense(queries, slots, positives, weights, temperatures)
    assert fused.of_parts(slots, torch.bfloat16) is bank_in_pairs
    assert result.loss.item() == pytest.approx(loss.item(), rel=5e-3)
    errors = relative_error(queries.grad, exact[0].grad), relative_error(slots.grad, exact[1].grad)
    assert 1e-5 < max(errors) < 0.02  # not float32's products: those are wrong by less


def test_a_slots_probability_is_of_logits_rounded_alike(in_pairs):
    """For queries near their positives: at a slot temperature of its own a probability would else be above 1."""
    _, slots = given(1, 2000, 128)
    positives = torch.arange(200)[:, None]
    queries = F.normalize(F.normalize(slots[:200], dim=1) + 0.02 * torch.randn(200, 128), dim=1)
    for temperatures in ((0.2, 0.07), (0.3, 0.02)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            measured = Slots(slots, inverse_lengths(slots))
            pull = encoder_loss(queries, measured, positives, torch.ones(200, 1), *temperatures, Unsharded()).pull
        assert pull.probability.max() <= 1 + 5e-5  # float32's rounding of a logit of 50


def test_without_an_instruction_for_pairs_nothing_is_rounded(not_in_pairs):
    queries, slots = given(64, 1000, 16)
    gradients = []
    for enabled in (False, True):
        query, slot = queries.clone().requires_grad_(), slots.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            result = cooperative_adversarial_loss(query, slot, torch.ones(64, 1).long(), torch.ones(64, 1), 0.1, 0.1)
        result.loss.backward()
        gradients.append((result.loss, result.hit, query.grad, slot.grad))
    assert fused.of_parts(slots, torch.bfloat16) is kernels
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize(("batch", "size", "width", "pairs"), SIZES)
def test_a_positive_that_is_the_nearest_slot_is_a_hit_by_pairs_too(in_pairs, batch, size, width, pairs):
    queries, slots = given(batch, size, width)
    rows = slots[None].expand(batch, -1, -1)
    nearest = bank_in_pairs.logits(queries / 0.125, rows, inverse_lengths(slots).expand(batch, -1, 1)).argmax(dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = cooperative_adversarial_loss(
            queries, slots, nearest[:, None], torch.ones(batch, 1), temperature=0.125, slot_temperature=0.125
        )
    assert result.hit.all()


@pytest.mark.parametrize(("batch", "size", "width"), [(33, 97, 16), (300, 1003, 40), (520, 193, 70)])
def test_what_bfloat16_can_hold_is_compared_exactly(batch, size, width):
    """Unit rows of four halves: of logits nothing is rounded, whichever numbers are in a pair, and whatever is left over."""
    torch.manual_seed(2)

    def halves(count):
        places = torch.rand(count, width).argsort(dim=1)[:, :4]
        return torch.zeros(count, width).scatter_(1, places, (torch.rand(count, 4) < 0.5).float() - 0.5)

    queries, slots = 8 * halves(batch), 4 * halves(size)
    measured = Slots(slots, inverse_lengths(slots))
    logits = queries.double() @ F.normalize(slots.double(), dim=1).T
    largest, total, slot_sum = bank_in_pairs.softmax(queries, *measured)
    assert torch.equal(largest[:, 0].double(), logits.amax(dim=1))
    torch.testing.assert_close((largest + total.log())[:, 0].double(), logits.logsumexp(dim=1), rtol=1e-6, atol=1e-6)
    mean = logits.softmax(dim=1) @ F.normalize(slots.double(), dim=1)
    assert relative_error(slot_sum / total, mean) < 4e-3  # the exponentials are rounded
    pulls = halves(batch)
    gradient = bank_in_pairs.pulls_on_slots(queries, *measured, (largest + total.log()), pulls)
    rows = F.normalize(slots.double(), dim=1)
    plain = logits.softmax(dim=1).T @ pulls.double()
    along = (plain - (plain * rows).sum(dim=1, keepdim=True) * rows) / slots.double().norm(dim=1, keepdim=True)
    assert relative_error(gradient, along) < 4e-3


def test_of_equally_near_slots_the_first_is_found():
    keys, slots = given(40, 3, 16)
    many = slots.repeat(500, 1)
    largest, index = kernels.nearest(keys, many, inverse_lengths(many))
    assert torch.equal(index, dense_nearest(keys, slots))
    torch.testing.assert_close(largest, (keys @ F.normalize(slots, dim=1).T).amax(dim=1))


@pytest.mark.parametrize("slot", [0, 5, 96])
def test_a_slot_that_is_no_number_hides_no_other(slot):
    keys, slots = given(40, 1000, 16)
    expected = dense_nearest(keys, torch.cat([slots[:slot], slots[slot + 1 :]]))
    slots[slot] = float("nan")
    _, index = kernels.nearest(keys, slots, inverse_lengths(slots))
    assert torch.equal(index, expected + (expected >= slot).long())


def test_a_softmax_needs_no_mean():
    queries, slots = given(40, 1000, 16)
    whole, part = (kernels.softmax(8 * queries, slots, inverse_lengths(slots), mean) for mean in (True, False))
    assert torch.equal(whole[0], part[0]) and torch.equal(whole[1], part[1]) and not part[2].any()


@pytest.mark.parametrize("kernels", [kernels, bank_in_pairs])
def test_what_is_no_number_is_seen(kernels):
    """In a query: in its own results alone, and in the gradient of all slots."""
    queries, slots = given(40, 1000, 16)
    queries[3, 2] = float("nan")
    measured = Slots(slots, inverse_lengths(slots))
    _, total, slot_sum = kernels.softmax(queries, *measured)
    wrong = torch.arange(40) == 3
    assert torch.equal(total.isnan()[:, 0], wrong) and torch.equal(slot_sum.isnan().any(dim=1), wrong)
    gradient = kernels.pulls_on_slots(queries, *measured, torch.zeros(40, 1), queries)
    assert gradient.isnan().all()


def test_kernels_that_deviate_are_not_used(monkeypatch, caplog, in_pairs):
    _, slots = given(2, 100, 8)
    deviate(monkeypatch, bank_in_pairs, 1.1)
    assert fused.of_parts(slots, torch.bfloat16) is kernels
    assert "in bfloat16 are not used" in caplog.text
    for factor in (1.001, float("nan")):
        fused._checked_on_cpu.cache_clear()
        deviate(monkeypatch, kernels, factor)
        assert fused.of_parts(slots, torch.float32) is None and fused.of_search(slots) is None
        assert fused.of_parts(slots, torch.bfloat16) is None
        assert "for CPUs are not used" in caplog.text
        caplog.clear()


def deviate(monkeypatch, module, factor):
    right = module.softmax
    monkeypatch.setattr(module, "softmax", lambda *given: (*right(*given)[:2], right(*given)[2] * factor))
