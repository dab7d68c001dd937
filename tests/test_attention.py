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
from caco.slots import RunningSoftmax, Unsharded

ATEN = torch.ops.aten
CPU = torch.device("cpu")


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
def kernels(monkeypatch):
    """The CPU's attention in place of a GPU's; returns what was asked of it, in rows: softmax and gradient of values."""
    seen = {"softmax": [], "gradient": []}

    def noted_attend(queries, parts):
        seen["softmax"].append(parts.shape[0] * parts.shape[2])
        return attend(queries, parts)

    def noted_gradient(queries, rows, log_normaliser, gradient):
        seen["gradient"].append(rows.shape[2])
        return gradient_of_values(queries, rows, log_normaliser, gradient)

    monkeypatch.setattr(attention, "_attend", noted_attend)
    monkeypatch.setattr(attention, "_gradient_of_values", noted_gradient)
    attention._agree.cache_clear()
    yield seen
    attention._agree.cache_clear()


@pytest.fixture
def fused(kernels, monkeypatch):
    """They are used wherever the bank is."""
    monkeypatch.setattr(attention, "is_fused", lambda rows, products: True)
    return kernels


def errors(size, temperatures):
    generator = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(24, 16, generator=generator), dim=1)
    slots = 3 * torch.randn(size, 16, generator=generator)
    positives, weights = torch.randint(size, (24, 2), generator=generator), torch.rand(24, 2, generator=generator)
    exact = queries.double().requires_grad_(), slots.double().requires_grad_()
    loss = dense_loss(*exact, positives, weights.double(), *temperatures)
    loss.backward()
    ours = queries.requires_grad_(), slots.requires_grad_()
    result = cooperative_adversarial_loss(*ours, positives, weights, *temperatures)
    result.loss.backward()
    return [
        relative_error(one, other)
        for one, other in ((result.loss, loss.detach()), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True)))
    ]


@pytest.fixture
def exactly(monkeypatch):
    """Nothing is rounded to bfloat16, so that only the mathematics is compared."""
    monkeypatch.setattr(torch, "bfloat16", torch.float32)


@pytest.mark.parametrize("temperatures", [(0.08, 0.08), (0.2, 0.05)])
@pytest.mark.parametrize(("size", "parts"), [(100, [100]), (1024, [1024]), (2500, [2048, 452])])
def test_attention_is_the_dense_form(fused, exactly, size, parts, temperatures):
    """Less than a part, just one, and parts with a remainder."""
    assert max(errors(size, temperatures)) < 1e-5
    assert fused == {"softmax": parts, "gradient": [size]}


def test_blocks_are_put_together(fused, exactly, monkeypatch):
    monkeypatch.setitem(caco.slots.BLOCK, "cpu", 24 * 1100)
    assert max(errors(2500, (0.08, 0.08))) < 1e-5
    assert fused == {"softmax": [1024, 76, 1024, 76, 300], "gradient": [1100, 1100, 300]}


def test_in_bfloat16(fused):
    assert 1e-4 < max(errors(2500, (0.08, 0.08))) < 1e-2


def test_two_processes_share_a_softmax(fused, exactly):
    """Each attends to its own slots; what they exchange is the largest logit, the total and the mean."""
    queries, rows = torch.randn(6, 8), torch.randn(700, 8)
    parts = [RunningSoftmax(queries, torch.float32) for _ in range(2)]
    for part, own in zip(parts, rows.split(400), strict=True):
        part.add(queries @ own.T, own)

    class Pair(Unsharded):
        """The other process's part of each sum, looked up."""

        size = 2

        def __init__(self, other):
            self.other = other

        def maximum(self, values):
            return torch.maximum(values, self.other.largest)

        def sum(self, values):
            largest = torch.maximum(parts[0].largest, parts[1].largest)
            return values + self.other.total * (self.other.largest - largest).exp()

    other = RunningSoftmax(queries, torch.float32)
    other.largest, other.total = parts[1].largest.clone(), parts[1].total.clone()
    parts[0].combine(Pair(other))
    logits = queries @ rows.T
    torch.testing.assert_close(parts[0].log_normaliser[:, 0], logits.logsumexp(dim=1))
    torch.testing.assert_close(parts[0].mean_slot, logits.softmax(dim=1)[:, :400] @ rows[:400])


WRONG = {
    "base-2 logarithms": ("_attend", lambda *work: (1.44 * attend(*work)[0], attend(*work)[1])),
    "means not divided": ("_attend", lambda *work: (attend(*work)[0], 2 * attend(*work)[1])),
    "another gradient": ("_gradient_of_values", lambda *work: gradient_of_values(*work).flip(2)),
    "not a number": ("_gradient_of_values", lambda *work: gradient_of_values(*work) * torch.nan),
    "no such kernel": ("_attend", lambda *work: ATEN._no_such_kernel(*work)),
}


def test_kernels_that_agree_are_believed(kernels, caplog):
    assert attention._agree(CPU, 64, 48, 2 * attention.PART + 100)
    assert caplog.text == "" and kernels == {"softmax": [2048, 100], "gradient": [1124]}


@pytest.mark.parametrize("wrong", WRONG)
def test_kernels_that_do_not_are_told_once_and_left(kernels, wrong, monkeypatch, caplog):
    name, kernel = WRONG[wrong]
    monkeypatch.setattr(attention, name, kernel)
    for _ in range(2):
        assert not attention._agree(CPU, 64, 48, 300)
    assert caplog.text.count("attention's kernels are not used for the bank, which is slower: ") == 1


class OnAGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("width", "dtype", "products", "expected"),
    [
        (64, torch.float32, torch.bfloat16, True),
        (256, torch.float32, torch.bfloat16, True),
        (264, torch.float32, torch.bfloat16, False),
        (20, torch.float32, torch.bfloat16, False),
        (64, torch.float32, torch.float16, False),
        (64, torch.float32, torch.float32, False),
        (64, torch.float64, torch.bfloat16, False),
    ],
)
def test_where_they_are_used(width, dtype, products, expected, monkeypatch):
    monkeypatch.setattr(attention, "_agree", lambda *place: True)
    rows = torch.zeros(4, width, dtype=dtype)
    assert not attention.is_fused(rows, products)
    assert attention.is_fused(rows.as_subclass(OnAGpu), products) is expected
