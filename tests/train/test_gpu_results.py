"""What a GPU computes is what the CPU does: bank, step, evaluation, and whole runs. (Skipped where there is none.)"""

import copy
import json
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from dense_bank import dense_loss
from torch.nn import functional as F

from caco import fused, optim
from caco.backbone import create_backbone
from caco.bank import Bank
from caco.checkpointing import checkpoint_blocks
from caco.config import EncoderOptions, Pretrain, Views
from caco.device import choose_device
from caco.distributed.world import World
from caco.evaluate.knn import knn_guesses
from caco.evaluate.linear import train_heads
from caco.optim import LARS
from caco.train.prepare import create_state
from caco.train.step import compute_gradients, rates_at, train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
PLACE = "cuda"


@pytest.fixture(autouse=True)
def settings():
    """Settings of torch that a test changes, put back afterwards."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = convolutions


def error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Return ‖ours − reference‖ / ‖reference‖ in float64."""
    reference = reference.detach().cpu().double()
    return float((ours.detach().cpu().double() - reference).norm() / reference.norm())


@pytest.mark.parametrize(
    ("products", "by_kernels", "bound"),
    [(torch.float32, False, 1e-5), (torch.bfloat16, False, 1e-2), (torch.bfloat16, True, 1e-2)],
)
@pytest.mark.parametrize("slot_temperature", [0.08, 0.1])
def test_loss_and_both_gradients_of_the_bank(products, by_kernels, bound, slot_temperature, monkeypatch):
    if not by_kernels:
        monkeypatch.setattr(fused, "_checked", lambda *place: None)
    device = choose_device(PLACE)
    torch.manual_seed(0)
    bank = Bank(5000, 48, 0.08, slot_temperature)
    queries = F.normalize(torch.randn(96, 48), dim=1)
    positives, weights = torch.randint(5000, (96, 2)), torch.rand(96, 2)
    exact = queries.double().requires_grad_(), bank.weight.detach().double().requires_grad_()
    loss = dense_loss(*exact, positives, weights.double(), 0.08, slot_temperature)
    loss.backward()
    bank, ours = bank.to(device), queries.to(device).requires_grad_()
    with torch.autocast(device.type, dtype=products, enabled=products != torch.float32):
        slots = bank.slots()
        result = bank.loss(ours, slots, positives.to(device), weights.to(device))
        whole = result.loss + bank.slot_term(slots, [result.pull])
    whole.backward()
    assert error(whole, loss) < bound
    assert error(ours.grad, exact[0].grad) < bound
    assert error(bank.weight.grad, exact[1].grad) < bound


@pytest.mark.parametrize("length", [1.0, 1.3, 3.0])
def test_hits_by_the_kernels(length):
    """A positive that is the nearest slot is a hit, however long the slots are: its logit is rounded as the kernel's."""
    device = choose_device(PLACE)
    torch.manual_seed(0)
    bank, positives = Bank(5000, 128).to(device), torch.randint(5000, (300, 2), device=device)
    unit = F.normalize(bank.weight.data, dim=1)
    bank.weight.data.copy_(length * unit)
    queries = F.normalize(unit[positives[:, 0]] + 0.1 * torch.randn(300, 128, device=device), dim=1)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        hit = bank.loss(queries, bank.slots(), positives, torch.full((300, 2), 0.5, device=device)).hit
    cosines = queries @ unit.T
    two = cosines.topk(2, dim=1).values
    clear = two[:, 0] - two[:, 1] > 0.01  # which rounding cannot turn round
    assert clear.float().mean() > 0.9
    assert torch.equal(hit[clear], (cosines.argmax(dim=1, keepdim=True) == positives)[clear])


@pytest.mark.parametrize("width", [16, 48, 64, 128, 200, 256])
@pytest.mark.parametrize(("queries", "size"), [(512, 65_536), (77, 3_001), (1_500, 20_000)])
def test_the_kernels_of_the_bank(width, queries, size):
    """They are in use, and give what plain products give: exactly in the search, of rounded factors else."""
    device = choose_device(PLACE)
    if torch.cuda.get_device_capability(device) < (8, 0):
        pytest.skip("this GPU has no such kernels")
    torch.manual_seed(0)
    weight = 3 * torch.randn(size, width, device=device)
    query, pull = F.normalize(torch.randn(queries, width, device=device), dim=1), torch.randn(queries, width).to(device)
    inverse_length, scaled = weight.norm(dim=1, keepdim=True).reciprocal(), query / 0.08
    kernels = fused.of_loss(weight, torch.bfloat16)
    assert kernels is not None
    rows = (weight * inverse_length).double()
    cosines, logits = query.double() @ rows.T, scaled.double() @ rows.T
    probability, log_normaliser = logits.softmax(dim=1), logits.logsumexp(dim=1, keepdim=True)
    largest, total, slot_sum = kernels.softmax(scaled, weight, inverse_length)
    assert (largest[:, 0] - logits.amax(dim=1)).abs().max() < 0.1  # a logit's factors are rounded
    assert (largest + total.log() - log_normaliser).abs().max() < 0.02
    assert error(slot_sum / total, probability @ rows) < 1e-2
    again = kernels.softmax(scaled, weight, inverse_length, with_mean=False)
    assert torch.equal(again[0], largest) and error(again[1], total) < 1e-5
    pulled = probability.T @ pull.double()
    along = (pulled - (pulled * rows).sum(dim=1, keepdim=True) * rows) * inverse_length
    assert error(kernels.pulls_on_slots(scaled, weight, inverse_length, log_normaliser.float(), pull), along) < 2e-2
    assert fused.of_search(weight) is kernels
    # Also where half precision cannot tell slots apart: a bank around a few directions.
    narrow = (weight[:40] / 9).repeat(-(-len(weight) // 40), 1)[: len(weight)] + weight * 1e-5
    for bank in (weight, narrow):
        lengths = bank.norm(dim=1, keepdim=True).reciprocal()
        cosines = query.double() @ (bank * lengths).double().T
        found, place = kernels.nearest(query, bank, lengths)
        assert (found - cosines.amax(dim=1)).abs().max() < 5e-6
        assert (cosines.amax(dim=1) - cosines.gather(1, place[:, None])[:, 0]).max() < 5e-6


def test_the_kernels_of_lars(monkeypatch):
    """They are in use, also for gradients that move, layouts that differ, and tensors of any size."""
    device = choose_device(PLACE)
    torch.manual_seed(0)
    shapes = [(64, 3, 3, 3), (70, 100), (13,), (512, 512, 3, 3), (1, 1, 1, 1), (9000,)]
    start = [torch.randn(shape, device=device) for shape in shapes]
    start[3] = start[3].contiguous(memory_format=torch.channels_last)
    start.append(torch.zeros(20, 30, device=device))
    ours, plain = ([torch.nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    assert optim._has_kernels(device)
    one, other = LARS(ours, lr=0.3, weight_decay=1e-2), LARS(plain, lr=0.3, weight_decay=1e-2)
    monkeypatch.setattr(other, "_by_kernels", lambda *work: False)
    for step in range(5):
        for mine, theirs in zip(ours, plain, strict=True):
            theirs.grad = torch.randn(theirs.shape, device=device)  # contiguous: not laid out as the fourth parameter
            mine.grad = theirs.grad.clone()
        if step > 1:
            ours[3].grad = ours[3].grad.contiguous(memory_format=torch.channels_last)
        one.step()
        other.step()
    assert one._table is not None and one._table.key
    for mine, theirs in zip(ours, plain, strict=True):
        assert error(mine, theirs) < 1e-5


def test_the_search_for_positives_is_exact_where_tf32_is_switched_on():
    torch.set_float32_matmul_precision("high")  # as NVIDIA's containers do
    device = choose_device(PLACE)
    torch.manual_seed(0)
    bank, keys = Bank(65_536, 128).to(device), F.normalize(torch.randn(512, 128), dim=1).to(device)
    places = bank.nearest(keys, bank.slots())
    cosines = keys.double() @ F.normalize(bank.weight.detach().double(), dim=1).T
    assert (cosines.amax(dim=1) - cosines.gather(1, places[:, None])[:, 0]).max() < 5e-6  # TF32: some 1e-4


@pytest.mark.parametrize("small", [0, 2])
def test_a_step(small):
    """Two steps in fp32; convolutions without TF32, so that rounding is all that differs."""
    torch.backends.cudnn.allow_tf32 = False
    config = Pretrain(
        epochs=2,
        batch_size=32,
        bank_size=512,
        views=Views(size=32, small=small, small_size=16),
        encoder=EncoderOptions(embedding=32, projector=64),
    )
    torch.manual_seed(0)
    backbone = create_backbone("resnet10_narrow", 32)
    views = [torch.randn(32, 3, size, size) for size in (32, 32, *[16] * small)]
    results = []
    for name in ("cpu", PLACE):
        device = choose_device(name)
        torch.manual_seed(1)
        state = create_state(config, copy.deepcopy(backbone), World(device))
        state.model.train()
        start = state.model.bank.weight.detach().clone()
        on_device = [view.to(device).contiguous(memory_format=torch.channels_last) for view in views]
        rates = rates_at(config, 1)
        gradients = partial(compute_gradients, state.model, state.model, precision=torch.float32)
        outputs = [train_step(state, gradients, on_device, rates, 0.99) for _ in range(2)]
        assert all(
            weight.is_contiguous(memory_format=torch.channels_last)
            for weight in state.model.encoder.parameters()
            if weight.ndim == 4
        )
        results.append((outputs, dict(state.model.encoder.state_dict()), state.model.bank.weight - start))
    (exact, weights, moved), (ours, our_weights, we_moved) = results
    for one, other in zip(exact, ours, strict=True):
        assert torch.equal(one.positives, other.positives.cpu())
        assert error(other.loss, one.loss) < 1e-4
    assert error(we_moved, moved) < 1e-2
    for name, weight in weights.items():
        if weight.is_floating_point():
            assert error(our_weights[name], weight) < 1e-3, name


def test_checkpointing():
    device = choose_device(PLACE)
    torch.manual_seed(0)
    plain = create_backbone("resnet18", 32).to(device).to(memory_format=torch.channels_last).train()
    again = copy.deepcopy(plain)
    checkpoint_blocks(again)
    view = torch.randn(8, 3, 32, 32, device=device)
    for backbone in (plain, again):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            features = backbone(view)
        features.float().square().mean().backward()
    for (name, one), other in zip(plain.state_dict().items(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    for (name, one), other in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert error(other.grad, one.grad) < 1e-2, name


def test_evaluation():
    device = choose_device(PLACE)
    torch.manual_seed(0)
    centres, labels = torch.randn(10, 64), torch.arange(3000) % 10
    features = torch.randn(3000, 64) + 0.5 * centres[labels]
    queries = torch.randn(500, 64) + 0.5 * centres[torch.arange(500) % 10]
    (exact,) = knn_guesses(features, labels, queries, 10)
    (ours,) = knn_guesses(features.to(device), labels, queries, 10)
    assert (ours[:, 0] == exact[:, 0]).float().mean() > 0.99  # but for near ties
    for one, other in zip(
        train_heads(features, labels, 10, (0.1, 0.01), 2, 256, 0.9, 0),
        train_heads(features.to(device), labels.to(device), 10, (0.1, 0.01), 2, 256, 0.9, 0),
        strict=True,
    ):
        assert error(other, one) < 1e-4


def command(out, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "caco", "pretrain", "--data", "textures:512", "--out", str(out), "--device", PLACE),
        *("--backbone", "resnet10_narrow", "--views.size", "32", "--epochs", "20", "--batch-size", "64"),
        *("--bank-size", "256", "--encoder.projector", "64", "--encoder.embedding", "32", "--monitor.log-steps", "2"),
        *("--monitor.checkpoint-minutes", "0", "--monitor.knn-epochs", "5", "--bank.warm-start-steps", "4"),
        *("--distributed.processes", "1", *more),
    ]


@pytest.mark.parametrize("more", [(), ("--engine.compile", "on"), ("--engine.checkpointing", "--accumulate", "2")])
def test_a_run_that_is_killed_and_resumed_and_judged(more, tmp_path):
    """Nothing but errors and what is said may be printed: no warnings of torch, no compiled views given up."""
    out = tmp_path / "run"
    begun = subprocess.Popen(command(out, *more), stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 200
    while not list((out / "checkpoints").glob("step-*.pt")) and begun.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    begun.send_signal(signal.SIGKILL)
    said = begun.communicate()[1]
    assert begun.returncode == -signal.SIGKILL, said
    resume = [sys.executable, "-m", "caco", "pretrain", "--out", str(out), "--resume"]
    done = subprocess.run(resume, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for text in (said, done.stderr):
        for problem in ("Warning", "not compiled", "not used", "CUDA graph", "failed"):
            assert problem not in text, text
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 160
    judge = [sys.executable, "-m", "caco", "knn", str(out), "--data", "textures:300", "--device", PLACE]
    judged = subprocess.run(judge, capture_output=True, text=True)
    assert judged.returncode == 0 and "top-1" in judged.stdout, judged.stderr
