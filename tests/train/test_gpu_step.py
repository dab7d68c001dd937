"""On a GPU nothing in the loop waits for the device. (Skipped where there is none.)"""

from functools import partial

import pytest
import torch

from caco.backbone import create_backbone
from caco.config import EncoderOptions, Pretrain, Views
from caco.distributed.world import World
from caco.train.captured import CALLS_AHEAD, PLAIN_CALLS, Captured
from caco.train.engine import search_kernels
from caco.train.prepare import create_state
from caco.train.step import compute_gradients, rates_at, train_step


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("small", [0, 2])
def test_a_step_waits_for_nothing(precision, small, captured):
    device = torch.device("cuda")
    config = Pretrain(
        epochs=2,
        batch_size=16,
        bank_size=4096,
        views=Views(size=32, small=small, small_size=16),
        encoder=EncoderOptions(embedding=32, projector=64),
    )
    state = create_state(config, create_backbone("resnet10_narrow", 32), World(device))
    state.model.train()
    views = [torch.randn(16, 3, size, size, device=device) for size in (32, 32, *[16] * small)]
    rates = rates_at(config, 0)
    search_kernels(device)
    gradients = partial(compute_gradients, state.model, state.model, precision=precision)
    gradients = Captured(gradients, state.model.parameters(), device) if captured else gradients
    for _ in range(PLAIN_CALLS + 1):  # make buffers, choose kernels, capture
        train_step(state, gradients, views, rates, 0.99)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(CALLS_AHEAD + 3):
            train_step(state, gradients, views, rates, 0.99)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert state.meters.bad_step(World(device)) is None
    assert not captured or gradients.graph is not None
