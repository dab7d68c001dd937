"""A step as one CUDA graph: the same step. (Skipped where there is no GPU, but for who is captured at all.)"""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from caco.api import pretrain
from caco.backbone import create_backbone
from caco.config import EncoderOptions, EngineOptions, Pretrain, Views
from caco.device import choose_device
from caco.distributed.world import World
from caco.model import WarmStart
from caco.train.captured import PLAIN_CALLS, Captured, captured
from caco.train.prepare import create_state
from caco.train.step import compute_gradients, rates_at, train_step, warm_start_gradients, warm_start_step

CONFIG = Pretrain(
    epochs=8,
    batch_size=32,
    bank_size=512,
    views=Views(size=32, small=2, small_size=16),
    encoder=EncoderOptions(embedding=32, projector=64),
)


CPU, GPU, ONE_OF_TWO = World(torch.device("cpu")), World(torch.device("cuda")), World(torch.device("cuda"), size=2)


@pytest.mark.parametrize(
    ("world", "engine", "backbone", "is_captured"),
    [
        (GPU, EngineOptions(), "resnet18", True),
        (CPU, EngineOptions(), "resnet18", False),
        (ONE_OF_TWO, EngineOptions(), "resnet18", False),
        (GPU, EngineOptions(cuda_graph=False), "resnet18", False),
        (GPU, EngineOptions(checkpointing=True), "resnet18", False),
        (GPU, EngineOptions(), "own", False),
    ],
)
def test_who_is_captured(world, engine, backbone, is_captured):
    config = replace(CONFIG, engine=engine, backbone=backbone)
    assert isinstance(captured(lambda views: None, (), config, world), Captured) == is_captured


class Dropping(nn.Module):
    """A backbone that drops features at random on the GPU."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.num_features = backbone, backbone.num_features

    def forward(self, view):
        return nn.functional.dropout(self.backbone(view), 0.2, self.training)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dropping", [False, True])
def test_captured_steps_are_the_plain_ones(dropping, monkeypatch):
    """Warm start and steps of two epochs, with other rates, in fp32: to the rounding of sums in another order."""
    device = choose_device("cuda")
    for setting, value in (("allow_tf32", False), ("benchmark", False), ("deterministic", True)):
        monkeypatch.setattr(torch.backends.cudnn, setting, value)
    torch.manual_seed(0)
    backbone = create_backbone("resnet10_narrow", 32)
    backbone = Dropping(backbone) if dropping else backbone
    steps = PLAIN_CALLS + 4
    batches = [[torch.randn(32, 3, size, size, device=device) for size in (32, 32, 16, 16)] for _ in range(2 * steps)]
    results = []
    for graph in (False, True):
        torch.manual_seed(1)
        state = create_state(CONFIG, copy.deepcopy(backbone), World(device))
        model = state.model.train()
        losses = []

        def computed(work, graph=graph, model=model):
            work = partial(work, precision=torch.float32)
            return Captured(work, model.parameters(), device) if graph else work

        gradients = computed(partial(warm_start_gradients, WarmStart(model)))
        for batch in batches[:steps]:
            losses.append(warm_start_step(state, gradients, batch, 0.03, 0.999, World(device)).clone())
        assert not graph or gradients.graph is not None
        model.copy_to_key_encoder()
        gradients = computed(partial(compute_gradients, model, model))
        for step, batch in enumerate(batches[steps:]):
            rates = rates_at(CONFIG, step // 4)
            losses.append(train_step(state, gradients, batch, rates, rates.key_momentum).loss.clone())
        assert not graph or gradients.graph is not None
        results.append((torch.stack(losses), state.meters.sums, dict(model.state_dict())))
    (losses, sums, weights), (our_losses, our_sums, ours) = results
    torch.testing.assert_close(our_losses, losses, rtol=1e-4, atol=1e-4)
    exact = torch.tensor([0, 1, 3], device=device)  # not the hits, which a rounding may turn round
    torch.testing.assert_close(our_sums[exact], sums[exact], rtol=1e-4, atol=1e-3)
    for name, weight in weights.items():
        if weight.is_floating_point():
            assert (ours[name] - weight).norm() <= 1e-3 * weight.norm(), name
        else:
            assert torch.equal(ours[name], weight), name


class Impatient(nn.Module):
    """A backbone that waits for the GPU in every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.num_features = nn.Linear(3, 8), 8

    def forward(self, view):
        return self.layer(view.mean(dim=(2, 3))) * float(view.max() > -1e9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_what_cannot_be_captured_goes_on_and_is_told(caplog):
    device = choose_device("cuda")
    state = create_state(CONFIG, Impatient(), World(device))
    work = partial(compute_gradients, state.model, state.model, precision=torch.bfloat16)
    gradients = Captured(work, state.model.parameters(), device)
    stream = torch.cuda.current_stream(device)
    torch.cuda.manual_seed(0)
    for step in range(PLAIN_CALLS + 3):
        if step == PLAIN_CALLS + 1:  # random numbers go on where they were
            drawn = torch.randn(5, device=device)
        views = [torch.randn(32, 3, size, size, device=device) for size in (32, 32, 16, 16)]
        loss = train_step(state, gradients, views, rates_at(CONFIG, 1), 0.99).loss
    assert torch.isfinite(loss)
    assert gradients.graph is None and torch.cuda.current_stream(device) == stream
    assert caplog.text.count("not one CUDA graph") == 1
    torch.cuda.manual_seed(0)
    for _ in range(PLAIN_CALLS + 1):
        for size in (32, 32, 16, 16):
            torch.randn(32, 3, size, size, device=device)
    assert torch.equal(torch.randn(5, device=device), drawn)
    held, side = torch.cuda.memory_reserved(device), torch.cuda.Stream(device)
    for _ in range(20):  # memory that two streams have used is given out again
        with torch.cuda.stream(side):
            used = torch.empty(2**26, dtype=torch.uint8, device=device)
        used.record_stream(stream)
        del used
        torch.cuda.synchronize(device)
    assert torch.cuda.memory_reserved(device) <= held + 4 * 2**26


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_captured_while_another_thread_makes_views(tmp_path, caplog):
    """A whole run, whose views are made beside the capture; no warning is given. (Compiled: test_gpu_results.py.)"""
    pretrain(
        "textures:640",
        tmp_path / "run",
        device="cuda",
        backbone="resnet10_narrow",
        epochs=3,
        batch_size=64,
        bank_size=256,
        views={"size": 32},
        bank={"warm_start_steps": 8},
        monitor={"knn_epochs": 1},
    )
    assert not caplog.records
