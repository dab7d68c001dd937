"""The bank as attention: by the CPU's kernels of the same family, the dense form's loss and gradients.

The kernels of a GPU are compared with plain products in tests/train/test_gpu_results.py.
"""

import pytest
import torch
from conftest import relative_error
from dense_bank import dense_loss
from torch.nn import functional as F

import caco.slots
from caco import attention
from caco.loss import cooperative_adversarial_loss

ATEN = torch.ops.aten


def attend(queries, parts):
    queries = queries.expand(len(parts), 1, *queries.shape)
    means, log_normaliser = ATEN._scaled_dot_product_flash_attention_for_cpu(queries, parts, parts, scale=1.0)
    return log_normaliser[:, 0], means[:, 0]


def gradient_of_values(queries, rows, log_normaliser, gradient):
    output = torch.zeros_like(queries)
    return ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, queries, rows, rows, output, log_normaliser, 0.0, False, scale=1.0
    )[2]


@pytest.fixture
def fused(monkeypatch):
    """The CPU's attention in place of a GPU's; returns the numbers of rows that were attended to."""
    seen = []

    def noted(queries, rows, products):
        seen.append(len(rows))
        return mean_slots(queries, rows, products)

    mean_slots = attention.mean_slots
    monkeypatch.setattr(attention, "is_fused", lambda rows, products: True)
    monkeypatch.setattr(attention, "mean_slots", noted)
    monkeypatch.setattr(attention, "_attend", attend)
    monkeypatch.setattr(attention, "_gradient_of_values", gradient_of_values)
    return seen


def queries_and_slots(batch, size, width):
    generator = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(batch, width, generator=generator), dim=1)
    slots = 3 * torch.randn(size, width, generator=generator)
    positives = torch.randint(size, (batch, 2), generator=generator)
    return queries, slots, positives, torch.rand(batch, 2, generator=generator)


def errors(products, size, temperatures):
    queries, slots, positives, weights = queries_and_slots(24, size, 16)
    exact = queries.double().requires_grad_(), slots.double().requires_grad_()
    loss = dense_loss(*exact, positives, weights.double(), *temperatures)
    loss.backward()
    ours = queries.requires_grad_(), slots.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=products == torch.bfloat16):
        result = cooperative_adversarial_loss(*ours, positives, weights, *temperatures)
    result.loss.backward()
    return [
        relative_error(one, other)
        for one, other in ((result.loss, loss.detach()), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True)))
    ]


@pytest.mark.parametrize("temperatures", [(0.08, 0.08), (0.2, 0.05)])
@pytest.mark.parametrize("size", [100, 1024, 2500])
def test_attention_is_the_dense_form(fused, size, temperatures):
    """Less than a part, just one, and parts with a remainder."""
    assert max(errors(torch.float32, size, temperatures)) < 1e-5
    assert fused == [size]


def test_blocks_are_put_together(fused, monkeypatch):
    monkeypatch.setitem(caco.slots.BLOCK, "cpu", 24 * 1100)
    assert max(errors(torch.float32, 2500, (0.08, 0.08))) < 1e-5
    assert fused == [1100, 1100, 300]


def test_in_half_precision(fused):
    assert max(errors(torch.bfloat16, 2500, (0.08, 0.08))) < 1e-2
    assert fused == [2500]


def test_kernels_are_believed_only_where_they_agree(fused, monkeypatch):
    cpu = torch.device("cpu")
    for wrong in (False, True):
        attention._agree.cache_clear()
        if wrong:  # as if another version gave base-2 logarithms
            monkeypatch.setattr(attention, "_attend", lambda *work: (1.44 * attend(*work)[0], attend(*work)[1]))
        assert attention._agree(cpu, 64, torch.bfloat16) is not wrong
    attention._agree.cache_clear()
    monkeypatch.setattr(attention, "_attend", lambda *work: ATEN._no_such_kernel(*work))
    assert not attention._agree(cpu, 64, torch.bfloat16)
    attention._agree.cache_clear()


@pytest.mark.parametrize(("width", "products"), [(64, torch.bfloat16), (64, torch.float32), (20, torch.bfloat16)])
def test_a_cpu_has_plain_products(width, products):
    assert not attention.is_fused(torch.zeros(4, width), products)
