"""The bank's loss and gradients: against plain loops, the dense form, autograd and finite differences."""

import itertools
import math

import pytest
import torch
from conftest import relative_error
from dense_bank import dense_loss, dense_nearest
from torch.nn import functional as F

import caco.slots
from caco.bank import Bank
from caco.loss import cooperative_adversarial_loss


def unit(*shape, dtype=torch.float64, seed=0):
    return F.normalize(torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)), dim=-1)


def loops(queries, slots, positives, weights, temperature, slot_temperature):
    """The definition in docs/method.md, one number at a time; slots are unit rows here, the last step is their tangent."""
    loss, grad_queries, grad_slots = 0.0, torch.zeros_like(queries), torch.zeros_like(slots)
    for n, p in itertools.product(range(len(queries)), range(positives.shape[1])):
        positive, weight = int(positives[n, p]), float(weights[n, p])
        cosine = [float(queries[n] @ slot) for slot in slots]

        def softmax(at, cosine=cosine):
            total = sum(math.exp(c / at) for c in cosine)
            return [math.exp(c / at) / total for c in cosine]

        of_encoder, of_bank = softmax(temperature), softmax(slot_temperature)
        loss -= weight * math.log(of_encoder[positive])
        for k in range(len(slots)):
            ordinary = of_encoder[k] - (1 if k == positive else 0)
            grad_queries[n] += weight * ordinary * slots[k] / temperature
            flipped = 1 - of_bank[k] if k == positive else of_bank[k]
            grad_slots[k] -= weight * flipped * queries[n] / slot_temperature
    for gradient, slot in zip(grad_slots, slots, strict=True):
        gradient -= (gradient @ slot) * slot
    return loss, grad_queries, grad_slots


@pytest.mark.parametrize("temperatures", [(0.08, 0.08), (0.12, 0.03), (1.0, 0.5)])
@pytest.mark.parametrize(
    ("batch", "size", "width", "pairs"), [(4, 9, 5, 1), (1, 7, 3, 2), (6, 1, 4, 1), (8, 3, 2, 2), (1, 1, 1, 1)]
)
def test_loss_and_gradients_are_the_definition(batch, size, width, pairs, temperatures):
    queries = unit(batch, width).requires_grad_()
    slots = unit(size, width, seed=1).requires_grad_()
    generator = torch.Generator().manual_seed(2)
    positives = torch.randint(size, (batch, pairs), generator=generator)
    weights = torch.rand(batch, pairs, generator=generator, dtype=torch.float64)
    result = cooperative_adversarial_loss(queries, slots, positives, weights, *temperatures)
    result.loss.backward()
    loss, grad_queries, grad_slots = loops(queries.detach(), slots.detach(), positives, weights, *temperatures)
    assert result.loss.item() == pytest.approx(loss, rel=1e-12, abs=1e-12)
    torch.testing.assert_close(queries.grad, grad_queries, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(slots.grad, grad_slots, rtol=1e-10, atol=1e-12)


@pytest.fixture
def tiny_blocks(monkeypatch):
    """The bank is read 64 slots at a time, the least there is."""
    monkeypatch.setitem(caco.slots.BLOCK, "cpu", 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("temperatures", [(0.08, 0.08), (0.2, 0.05), (0.002, 0.3), (0.3, 0.002)])
@pytest.mark.parametrize(("batch", "size", "width", "pairs"), [(24, 1000, 16, 2), (5, 64, 8, 1), (3, 65, 8, 2)])
def test_streamed_is_dense(tiny_blocks, batch, size, width, pairs, temperatures, dtype, tolerance):
    """A thousand slots in 16 blocks, the last one not full: loss, gradients and choices of the dense form."""
    torch.manual_seed(1)  # not that of the queries, which would then be the first slots
    queries, slots = unit(batch, width, dtype=dtype), 3 * torch.randn(size, width, dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    positives = torch.randint(size, (batch, pairs), generator=generator)
    weights = torch.rand(batch, pairs, generator=generator, dtype=torch.float64)
    ours, plain = [(queries.clone().requires_grad_(), slots.clone().requires_grad_()) for _ in range(2)]
    result = cooperative_adversarial_loss(*ours, positives, weights, *temperatures)
    exact = [tensor.detach().double().requires_grad_() for tensor in plain]
    loss = dense_loss(*exact, positives, weights, *temperatures)
    (2 * result.loss).backward()
    (2 * loss).backward()
    steepness = max(1, 0.02 / min(temperatures))  # a cosine's rounding is divided by the temperature
    assert relative_error(result.loss, loss.detach()) < tolerance * steepness
    for mine, theirs in zip(ours, exact, strict=True):
        assert relative_error(mine.grad, theirs.grad) < tolerance * steepness
    cosines = exact[0].detach() @ F.normalize(exact[1].detach(), dim=1).T
    assert torch.equal(result.hit, cosines.argmax(dim=1)[:, None] == positives)


def test_streamed_search_and_log_sum_exp(tiny_blocks):
    bank = Bank(1000, 16).double()
    keys = unit(24, 16).requires_grad_()
    slots = bank.slots()
    assert torch.equal(bank.nearest(keys, slots), dense_nearest(keys, bank.weight))
    plain = keys.detach().clone().requires_grad_()
    ours = bank.log_sum_exp(keys, slots, 0.2)
    theirs = torch.logsumexp(plain @ F.normalize(bank.weight.detach(), dim=1).T / 0.2, dim=1)
    torch.testing.assert_close(ours, theirs)
    weights = torch.rand(24, dtype=torch.float64)
    (ours @ weights).backward()
    (theirs @ weights).backward()
    torch.testing.assert_close(keys.grad, plain.grad)
    assert bank.weight.grad is None


def test_no_matrix_of_queries_and_slots():
    """256 queries and 131,072 slots would be 128 MiB in one matrix: no tensor comes near it but the bank's own."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape != bank.weight.shape:
                largest = max(largest, result.numel())
            return result

    bank, queries = Bank(131_072, 8), unit(256, 8, dtype=torch.float32).requires_grad_()
    with Watch():
        slots = bank.slots()
        positives = bank.nearest(queries, slots)[:, None]
        result = bank.loss(queries, slots, positives, torch.ones(256, 1))
        (result.loss + bank.slot_term(slots, [result.pull])).backward()
    assert bank.weight.grad.isfinite().all()
    assert largest <= caco.slots.BLOCK["cpu"] < 256 * 131_072 / 8


def test_under_autocast_only_products_are_rounded():
    torch.manual_seed(1)  # not that of the queries, which would then be the first slots
    queries, slots = unit(64, 32, dtype=torch.float32), torch.randn(500, 32)
    positives, weights = torch.arange(64)[:, None], torch.full((64, 1), 1 / 64)
    gradients = []
    for enabled in (False, True):
        query, slot = queries.clone().requires_grad_(), slots.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = cooperative_adversarial_loss(query, slot, positives, weights, 0.08, 0.08).loss
        loss.backward()
        gradients.append((loss, query.grad, slot.grad))
    for exact, rounded in zip(*gradients, strict=True):
        assert rounded.dtype == torch.float32
        assert relative_error(rounded, exact.detach()) < 5e-3
    assert not torch.equal(gradients[0][2], gradients[1][2])


def test_query_gradient_passes_gradcheck():
    slots, positives = unit(11, 6, seed=1), torch.tensor([[0, 3], [5, 5], [10, 2]])
    weights = torch.tensor([[0.2, 0.4], [0.1, 0.3], [0.5, 0.0]], dtype=torch.float64)

    def loss(queries):
        return cooperative_adversarial_loss(queries, slots, positives, weights, 0.3, 0.1).loss

    assert torch.autograd.gradcheck(loss, unit(3, 6).requires_grad_())


def test_query_gradient_is_the_ordinary_cross_entropy_of_torch():
    queries, slots, positives = unit(5, 8).requires_grad_(), unit(20, 8, seed=1), torch.arange(5)
    weights = torch.full((5, 1), 1 / 5, dtype=torch.float64)
    loss = cooperative_adversarial_loss(queries, slots, positives[:, None], weights, 0.08, 0.08).loss
    (ours,) = torch.autograd.grad(loss, queries)
    expected = F.cross_entropy(queries @ slots.T / 0.08, positives)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, queries)[0])


def test_every_slot_moves_toward_the_query():
    """Cooperative and adversarial: a gradient step raises the query's cosine with its positive and with the negatives."""
    queries, slots = unit(1, 4), unit(6, 4, seed=1).requires_grad_()
    cooperative_adversarial_loss(
        queries, slots, torch.tensor([[2]]), torch.ones(1, 1, dtype=torch.float64), 0.2, 0.2
    ).loss.backward()
    assert ((-slots.grad @ queries[0]) > 0).all()


def test_the_gradient_scales_with_what_comes_from_above():
    queries, slots = unit(3, 4), unit(5, 4, seed=1).requires_grad_()
    positives, weights = torch.tensor([[0], [1], [4]]), torch.full((3, 1), 1 / 3, dtype=torch.float64)
    (plain,) = torch.autograd.grad(
        cooperative_adversarial_loss(queries, slots, positives, weights, 0.1, 0.1).loss, slots
    )
    (tripled,) = torch.autograd.grad(
        3 * cooperative_adversarial_loss(queries, slots, positives, weights, 0.1, 0.1).loss, slots
    )
    torch.testing.assert_close(tripled, 3 * plain)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lower_precisions_compute_in_float32(dtype, tolerance):
    queries, slots = unit(16, 32), unit(40, 32, seed=1)
    positives, weights = torch.arange(16)[:, None], torch.full((16, 1), 1 / 16, dtype=torch.float64)
    exact = cooperative_adversarial_loss(queries, slots, positives, weights, 0.08, 0.08).loss
    low_queries, low_slots = queries.to(dtype).requires_grad_(), slots.to(dtype).requires_grad_()
    low = cooperative_adversarial_loss(low_queries, low_slots, positives, weights.float(), 0.08, 0.08).loss
    low.backward()
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(exact.item(), rel=tolerance)
    assert low_queries.grad.dtype == dtype and low_queries.grad.isfinite().all()


def test_tiny_temperatures_stay_finite():
    queries, slots = -unit(2, 4, dtype=torch.float32)[:1], unit(2, 4, dtype=torch.float32)[:1].requires_grad_()
    result = cooperative_adversarial_loss(
        queries, slots, torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), 1e-3, 1e-3
    )
    result.loss.backward()
    assert result.loss.isfinite() and slots.grad.isfinite().all()


def test_positives_are_searched_in_float32_under_autocast():
    """In bfloat16 more than 1 % of the choices differ on a random bank; ours do not differ at all."""
    torch.manual_seed(0)
    bank = Bank(4096, 64)
    keys = unit(4096, 64, dtype=torch.float32, seed=1)
    slots = F.normalize(bank.weight.detach(), dim=1)
    expected = (keys.double() @ slots.double().T).argmax(dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, naive = bank.nearest(keys, bank.slots()), (keys @ slots.T).argmax(dim=1)
    assert (naive != expected).double().mean() > 0.01
    assert (ours == expected).all()


def test_warm_start_fills_slots_in_order_and_wraps():
    bank = Bank(5, 2)
    start = bank.weight.detach().clone()
    bank.fill(torch.full((2, 2), 1.0), batch=0)
    assert (bank.weight[:2] == 1).all() and torch.equal(bank.weight[2:], start[2:])
    bank.fill(torch.full((2, 2), 2.0), batch=1)
    bank.fill(torch.tensor([[3.0, 3.0], [9.0, 9.0]]), batch=2)  # one slot is left
    assert bank.weight[:, 0].tolist() == [1, 1, 2, 2, 3]
    bank.fill(torch.full((2, 2), 4.0), batch=3)
    assert bank.weight[:, 0].tolist() == [4, 4, 2, 2, 3]
    bank.fill(torch.arange(14.0).view(7, 2), batch=1)  # more keys than slots
    assert bank.weight[:, 0].tolist() == [0, 2, 4, 6, 8]
