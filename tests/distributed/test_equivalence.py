"""N processes with a batch of B/N each compute what one process computes with a batch of B: real gloo processes."""

from functools import partial

import pytest
import torch
from torch import nn

from caco.backbone import Encoder, projector
from caco.bank import Bank
from caco.config import BankOptions, DistributedOptions, EncoderOptions, OptimizerOptions, Pretrain
from caco.distributed.bank_shards import ProcessShards
from caco.distributed.batch_norm import synchronise_batch_norm
from caco.distributed.data_parallel import data_parallel
from caco.distributed.launch import launch
from caco.distributed.world import World
from caco.model import CaCo, WarmStart, view_pairs
from caco.optim import encoder_optimizer
from caco.train.meters import Meters
from caco.train.state import TrainingState
from caco.train.step import compute_gradients, rates_at, train_step, warm_start_gradients, warm_start_step

BATCH, SLOTS, WIDTH, WARM_START, STEPS = 16, 24, 8, 4, 10


def small_backbone() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def norm_free(encoder: nn.Module) -> nn.Module:
    for name, child in encoder.named_children():
        setattr(
            encoder, name, nn.Identity() if isinstance(child, nn.modules.batchnorm._BatchNorm) else norm_free(child)
        )
    return encoder


def train(world: World, dtype: torch.dtype, small: int, sharded: bool, accumulate: int = 1, norms: bool = True) -> dict:
    """Warm start and 10 steps with the package's own parts; return everything that was computed."""
    torch.manual_seed(0)
    encoder: nn.Module = Encoder(small_backbone(), projector(8, 12, WIDTH))
    encoder = encoder if norms else norm_free(encoder)
    bank = Bank(SLOTS, WIDTH, 0.08, 0.1, ProcessShards(world) if sharded else None)
    model = CaCo(synchronise_batch_norm(encoder, world), bank, view_pairs(2, small)).to(dtype)
    state = TrainingState(
        model=model,
        optimizer=encoder_optimizer("lars", model.encoder, 0.1, 0.9, 1e-4),
        bank_optimizer=torch.optim.SGD([model.bank.weight], lr=1.0, momentum=0.9),
        meters=Meters(SLOTS, world.device),
    )
    config = Pretrain(
        epochs=4,
        lr=4.0,
        batch_size=BATCH,
        bank_size=SLOTS,
        optimizer=OptimizerOptions(warmup_epochs=1),
        bank=BankOptions(lr=500.0, final_lr=100.0),
        encoder=EncoderOptions(key_momentum=0.9),
    )
    generator = torch.Generator().manual_seed(1)

    def views(count: int) -> list[torch.Tensor]:
        whole = [
            torch.randn(BATCH, 3, 6 if i < 2 else 4, 6 if i < 2 else 4, dtype=dtype, generator=generator)
            for i in range(count)
        ]
        return [view.chunk(world.size)[world.rank] for view in whole]

    losses = []
    network = data_parallel(WarmStart(model), world, ignored=[bank.weight])
    gradients = partial(warm_start_gradients, network, precision=torch.float32, accumulate=accumulate)
    for _ in range(WARM_START):
        losses.append(warm_start_step(state, gradients, views(2), 0.1, 0.999, world))
    model.copy_to_key_encoder()
    network = data_parallel(model, world, ignored=[bank.weight] if sharded else [])
    gradients = partial(compute_gradients, model, network, precision=torch.float32, accumulate=accumulate)
    for step in range(STEPS):
        losses.append(train_step(state, gradients, views(2 + small), rates_at(config, step // 5), 0.9).loss.detach())
    return {
        "losses": world.sum(torch.stack(losses)) / world.size,
        **{f"model/{name}": value.clone() for name, value in state.state_dict(world)["model"].items()},
        "velocity": state.state_dict(world)["bank_optimizer"]["state"][0]["momentum_buffer"],
        "choices": world.sum(state.meters.epoch_choices.counts).clone(),
    }


def largest_deviation(one: dict, other: dict) -> float:
    assert list(one) == list(other)
    deviations = []
    for name, value in one.items():
        if value.is_floating_point():
            deviations.append(((other[name] - value).abs().max() / value.abs().max().clamp_min(1e-30)).item())
        else:
            assert torch.equal(value, other[name]), name
    return max(deviations)


CASES = {
    f"{bank}, {crops}, {str(dtype)[6:]}": (dtype, small, bank == "sharded")
    for bank in ("replicated", "sharded")
    for small, crops in ((0, "single crop"), (2, "multi crop"))
    for dtype in (torch.float64, torch.float32)
}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3}  # float32: rounding, amplified by 14 steps of training


def cases(processes: int) -> dict[str, tuple[torch.dtype, int, bool]]:
    """Return what so many processes are to train: four wait for each other on a machine of two cores, so only in float64."""
    return {name: case for name, case in CASES.items() if processes < 4 or case[0] == torch.float64}


def train_all(world: World) -> dict[str, dict]:
    """Train every case, and some with accumulation, in one process group."""
    results = {name: train(world, *case) for name, case in cases(world.size).items()}
    for bank in ("replicated", "sharded"):
        results[f"{bank}, accumulated"] = train(world, torch.float64, 0, bank == "sharded", accumulate=2)
    return results


@pytest.fixture(scope="module")
def alone():
    """What a single process computes, for every dtype and number of small views."""
    world = World(torch.device("cpu"))
    return {case[:2]: train(world, case[0], case[1], sharded=False) for case in CASES.values()}


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_equal_one(alone, processes):
    many = launch(train_all, DistributedOptions(processes=processes), "cpu")
    parts = train(World(torch.device("cpu")), torch.float64, 0, sharded=False, accumulate=2)
    for bank in ("replicated", "sharded"):
        assert largest_deviation(parts, many[f"{bank}, accumulated"]) < 1e-9, bank
    for name, case in cases(processes).items():
        deviation = largest_deviation(alone[case[:2]], many[name])
        print(f"{processes} processes, {name}: {deviation:.1e}")
        assert deviation < TOLERANCE[case[0]], name


def test_a_sharded_bank_alone_is_a_bank(alone):
    one = train(World(torch.device("cpu")), torch.float64, 2, sharded=True)
    assert largest_deviation(alone[torch.float64, 2], one) < 1e-12


@pytest.mark.parametrize("small", [0, 2], ids=["single crop", "multi crop"])
def test_accumulation_equals_the_large_batch_without_batch_norm(small):
    world = World(torch.device("cpu"))
    whole = train(world, torch.float64, small, sharded=False, norms=False)
    parts = train(world, torch.float64, small, sharded=False, accumulate=4, norms=False)
    assert largest_deviation(whole, parts) < 1e-9
