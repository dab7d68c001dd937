"""Residual blocks that are computed as one, against the blocks as they were: results, gradients, statistics, and when."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from maps import maps_of, relative
from timm.models.resnet import BasicBlock
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock as TorchvisionBlock

from caco.winograd import residual
from caco.winograd.network import use_direct, use_winograd
from caco.winograd.residual import Joined

pytest.importorskip("numba")


def downsample(inputs: int, outputs: int, stride: int = 2) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))


def averages(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), *downsample(inputs, outputs, stride=1))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: BasicBlock(64, 64),
    "timm, half as wide": lambda: BasicBlock(64, 128, stride=2, downsample=downsample(64, 128)),
    "timm, half as wide by averages": lambda: BasicBlock(64, 128, stride=2, downsample=averages(64, 128)),
    "timm, twice as many channels": lambda: BasicBlock(64, 128, downsample=downsample(64, 128, stride=1)),
    "torchvision": lambda: TorchvisionBlock(64, 64),
    "torchvision, half as wide": lambda: TorchvisionBlock(64, 128, stride=2, downsample=downsample(64, 128)),
}
NORMS: dict[str, Callable[[nn.Module], Any]] = {
    "as it comes": lambda block: None,
    "evaluated": lambda block: block.eval(),
    "one of two frozen": lambda block: block.bn1.eval(),
    "cumulative statistics": lambda block: setattr(block.bn2, "momentum", None),
    "no statistics": lambda block: setattr(
        block, "bn1", nn.BatchNorm2d(block.bn1.num_features, track_running_stats=False)
    ),
    "no factors": lambda block: setattr(block, "bn2", nn.BatchNorm2d(block.bn2.num_features, affine=False)),
    "frozen filters": lambda block: block.conv1.weight.requires_grad_(False),
    "frozen shortcut": lambda block: block.downsample and block.downsample.eval().requires_grad_(False),
    "a shortcut that is heard": lambda block: block.downsample and block.downsample[0].register_forward_hook(doubled),
}


def doubled(module: nn.Module, given: Any, output: torch.Tensor) -> torch.Tensor:
    return 2 * output


def drawn(block: nn.Module) -> nn.Module:
    """Return the block with every parameter and statistic something else than it begins with."""
    for name, tensor in block.state_dict().items():
        if "bn" in name and tensor.is_floating_point():
            tensor.uniform_(0.5, 2)
    return block.double().train()


@pytest.fixture
def as_one(monkeypatch) -> list[int]:
    """Whenever blocks are computed as one, this list gets longer."""
    from caco.winograd import network

    calls: list[int] = []

    def counted(*given: Any) -> torch.Tensor:
        calls.append(1)
        return residual.residual_block(*given)

    monkeypatch.setattr(network, "residual_block", counted)
    return calls


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_is_what_it_was(block, norm, as_one):
    """Twice, as statistics are kept from one to the next."""
    torch.manual_seed(0)
    direct = drawn(BLOCKS[block]())
    NORMS[norm](direct)
    direct = direct.double()
    winograd = copy.deepcopy(direct)
    use_winograd(winograd)
    given = [maps_of(3, 64, 15, 16).relu().requires_grad_() for _ in range(2)]
    results = []
    for module in (direct, winograd):
        outputs = [module(maps.clone()) for maps in given]
        module.zero_grad()
        gradients = torch.autograd.grad(sum(output.square().mean() for output in outputs), given)
        sum(module(maps.clone()).sin().sum() for maps in given).backward()
        of_parameters = [parameter.grad for parameter in module.parameters() if parameter.requires_grad]
        results.append([*outputs, *gradients, *of_parameters, *(buffer.double() for buffer in module.buffers())])
    assert len(as_one) == 4
    for one, other in zip(*results, strict=True):
        assert float((other - one).detach().norm()) <= 1e-11 * float(one.detach().norm())


def changed(change: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        block = BLOCKS["timm"]()
        change(block)
        return block

    return make


OTHERS = {
    "another activation": changed(lambda block: setattr(block, "act1", nn.GELU())),
    "attention": changed(lambda block: setattr(block, "se", nn.Tanh())),
    "dropped": changed(lambda block: setattr(block, "drop_path", nn.Dropout(1e-9))),
    "another norm": changed(lambda block: setattr(block, "bn1", nn.InstanceNorm2d(64))),
    "a hook": changed(lambda block: block.bn1.register_forward_hook(lambda module, given, output: 2 * output)),
    "a narrow one": lambda: BasicBlock(32, 32),
    "bias": changed(lambda block: setattr(block, "conv2", nn.Conv2d(64, 64, 3, padding=1))),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_blocks_are_left_to_themselves(other, as_one):
    torch.manual_seed(0)
    direct = OTHERS[other]().double().train()
    winograd = copy.deepcopy(direct)
    use_winograd(winograd)
    maps = maps_of(2, 32 if other == "a narrow one" else 64, 8, 8)
    assert relative(winograd(maps).detach(), direct(maps).detach()) < 1e-12 and not as_one


def test_small_maps_half_precisions_and_classes(as_one):
    """Where the convolutions do not pay, the block does not; its class, name and all, comes back."""
    torch.manual_seed(0)
    block = BLOCKS["timm, half as wide"]().train()
    before = type(block), list(block.state_dict())
    use_winograd(block)
    use_winograd(block)
    assert type(block) is not before[0] and isinstance(block, BasicBlock)
    block(maps_of(2, 64, 6, 6, dtype=torch.float32))  # 6 x 6 become 3 x 3: too small for the second
    with torch.autocast("cpu", dtype=torch.bfloat16):
        block(maps_of(2, 64, 16, 16, dtype=torch.float32))
    assert not as_one
    block(maps_of(2, 64, 16, 16, dtype=torch.float32))
    assert len(as_one) == 1
    use_direct(block)
    assert (type(block), list(block.state_dict())) == before


def test_rounding_is_no_more_than_that_of_torchs_own(as_one):
    """Maps whose mean is far from 0 for their spread: the variance is a small difference of large sums."""
    torch.manual_seed(0)
    exact = drawn(BLOCKS["timm"]())
    maps = maps_of(16, 64, 16, 16).relu() + 3
    expected = [exact(maps).detach(), *(buffer for buffer in exact.buffers() if buffer.is_floating_point())]
    torch.manual_seed(0)
    direct = drawn(BLOCKS["timm"]()).float()
    winograd = copy.deepcopy(direct)
    use_winograd(winograd)
    errors = []
    for module in (direct, winograd):
        output = module(maps.float()).detach()
        found = [output, *(buffer for buffer in module.buffers() if buffer.is_floating_point())]
        errors.append([relative(one, other) for one, other in zip(found, expected, strict=True)])
    assert as_one and all(other < 4 * one + 1e-6 for one, other in zip(*errors, strict=True)), errors


def test_what_joins_has_the_gradients_of_finite_differences():
    torch.manual_seed(0)
    maps, shortcut = maps_of(2, 32, 3, 5).requires_grad_(), maps_of(2, 32, 3, 5).requires_grad_()
    factors = torch.randn(2, 32, dtype=torch.float64, requires_grad=True)
    expected = F.relu(maps * factors[0][:, None, None] + factors[1][:, None, None] + shortcut)
    torch.testing.assert_close(Joined.apply(maps, factors, shortcut), expected)
    assert torch.autograd.gradcheck(Joined.apply, (maps, factors, shortcut), fast_mode=True)
    others = torch.randn(2, 32, dtype=torch.float64, requires_grad=True)
    read = shortcut * others[0][:, None, None] + others[1][:, None, None]
    expected = F.relu(maps * factors[0][:, None, None] + factors[1][:, None, None] + read)
    torch.testing.assert_close(Joined.apply(maps, factors, shortcut, others), expected)
    assert torch.autograd.gradcheck(Joined.apply, (maps, factors, shortcut, others), fast_mode=True)


def test_what_is_not_finite_stays_so():
    """ReLU passes what is no number, and so does its gradient."""
    block = drawn(BLOCKS["timm"]())
    use_winograd(block)
    maps = maps_of(2, 64, 8, 8)
    maps[0, 3, 2, 2] = float("nan")
    assert block(maps).isnan().any()
