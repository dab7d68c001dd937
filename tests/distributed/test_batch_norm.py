"""Synchronised batch norm of two gloo processes is torch's (and timm's) batch norm of the whole batch."""

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from caco.config import DistributedOptions
from caco.distributed.batch_norm import SyncBatchNorm, synchronise_batch_norm
from caco.distributed.launch import launch
from caco.distributed.world import World
from caco.errors import UsageError

BATCH, STEPS = 12, 3

NETWORKS = {
    "vectors": lambda: nn.BatchNorm1d(5),
    "sequences": lambda: nn.BatchNorm1d(5),
    "images": lambda: nn.BatchNorm2d(5, eps=1e-3, momentum=0.3),
    "not affine": lambda: nn.BatchNorm2d(5, affine=False),
    "cumulative average": lambda: nn.BatchNorm2d(5, momentum=None),
    "no running statistics": lambda: nn.BatchNorm1d(5, track_running_stats=False),
    "timm's layer": lambda: BatchNormAct2d(5),
    "several layers": lambda: nn.Sequential(
        nn.Conv2d(5, 6, 3, bias=False),  # before batch norm a bias has the gradient 0, but for rounding
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(6, 4, 1, bias=False), BatchNormAct2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(4, 7, bias=False),
        nn.BatchNorm1d(7),
    ),
}
SHAPES = {"vectors": (5,), "no running statistics": (5,), "sequences": (5, 4)}
DTYPES = (torch.float64, torch.float32)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def inputs(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return batches far from mean 0 and standard deviation 1, [STEPS, B, C, …], and something to weigh outputs by."""
    generator = torch.Generator().manual_seed(0)
    shape = SHAPES.get(name, (5, 4, 6))
    scale = torch.arange(1.0, 6.0).reshape(-1, *[1] * (len(shape) - 1))
    batches = 3 * scale + scale * torch.randn(STEPS, BATCH, *shape, generator=generator, dtype=torch.float64)
    return batches.to(dtype), torch.randn(BATCH, 1, generator=generator, dtype=torch.float64).to(dtype)


def network(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    result = NETWORKS[name]().to(dtype)
    for parameter in result.parameters():
        nn.init.normal_(parameter, 0.5)
    return result


def steps(module: nn.Module, name: str, dtype: torch.dtype, world: World) -> dict[str, Tensor]:
    """Three training steps and one look in evaluation mode; return all that was computed, over all processes."""
    batches, weights = inputs(name, dtype)
    weights = weights.chunk(world.size)[world.rank]
    found: dict[str, Tensor] = {}
    for number, whole in enumerate(batches):
        x = whole.chunk(world.size)[world.rank].clone().requires_grad_()
        y = module(x)
        # Not symmetric in the processes: each sample counts differently.
        (y.flatten(1).square() * weights).sum().backward()
        found[f"output {number}"] = world.gather(y.detach())
        found[f"gradient {number}"] = world.gather(x.grad)
    found |= {f"gradient of {key}": world.sum(value.grad) for key, value in module.named_parameters()}
    found |= {key: value.clone() for key, value in module.named_buffers()}
    module.eval()
    found["evaluated"] = world.gather(module(batches[0].chunk(world.size)[world.rank]).detach())
    return found


def of_all(world: World) -> dict:
    """Everything in one process group; also that a copy, a state dict and bfloat16 work."""
    results = {}
    for name in NETWORKS:
        for dtype in DTYPES:
            plain = network(name, dtype)
            keys = list(plain.state_dict())
            module = synchronise_batch_norm(plain, world)
            assert list(module.state_dict()) == keys  # checkpoints of one process and of many are alike
            results[name, dtype] = steps(copy.deepcopy(module), name, dtype, world)
    half = synchronise_batch_norm(nn.BatchNorm2d(5), world)
    output = half(inputs("images", torch.float32)[0][0].bfloat16())
    assert output.dtype == torch.bfloat16 and half.running_mean.dtype == torch.float32
    results["bfloat16"] = half.running_mean.clone()
    return results


@pytest.fixture(scope="module")
def of_two():
    return launch(of_all, DistributedOptions(processes=2), "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("name", NETWORKS)
def test_two_processes_equal_the_whole_batch(of_two, name, dtype):
    expected = steps(network(name, dtype), name, dtype, World(torch.device("cpu")))
    found = of_two[name, dtype]
    assert list(found) == list(expected)
    for key, value in expected.items():
        if value.is_floating_point():
            # Of the size of the largest: gradients through batch norm cancel to nearly nothing.
            largest = max(value.abs().max().item(), 1.0)
            assert (found[key] - value).abs().max().item() <= TOLERANCE[dtype] * largest, key
        else:
            assert torch.equal(found[key], value), key


def test_half_precision_keeps_its_statistics_in_float32(of_two):
    plain = nn.BatchNorm2d(5)
    plain(inputs("images", torch.float32)[0][0].bfloat16())
    assert torch.allclose(of_two["bfloat16"], plain.running_mean, rtol=1e-2)


def test_a_single_process_keeps_its_layers():
    module = NETWORKS["several layers"]()
    kinds = [type(part) for part in module.modules()]
    assert synchronise_batch_norm(module, World(torch.device("cpu"))) is module
    assert [type(part) for part in module.modules()] == kinds


def test_every_batch_norm_is_replaced_and_keeps_its_parameters():
    module = NETWORKS["several layers"]()
    parameters = list(module.parameters())
    changed = synchronise_batch_norm(module, World(torch.device("cpu"), 0, 2))
    assert sum(isinstance(part, SyncBatchNorm) for part in changed.modules()) == 3
    assert not any(
        isinstance(p, nn.modules.batchnorm._BatchNorm) and not isinstance(p, SyncBatchNorm) for p in changed.modules()
    )
    assert all(a is b for a, b in zip(changed.parameters(), parameters, strict=True))


def test_an_unknown_kind_is_refused():
    class Own(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    with pytest.raises(UsageError, match="cannot be synchronised over processes .Own."):
        synchronise_batch_norm(Own(3), World(torch.device("cpu"), 0, 2))
