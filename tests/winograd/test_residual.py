"""Residual blocks that are computed as one, against the blocks as they were: results, gradients, statistics, and when."""

from __future__ import annotations

import copy
import pickle
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
from caco.cpu_kernels import processor
from caco.cpu_kernels.memory import LARGE


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
    "statistics are no longer kept": lambda block: setattr(block.bn1, "track_running_stats", False),
    "batches are not counted": lambda block: setattr(block.bn1, "num_batches_tracked", None),
    "no factors": lambda block: setattr(block, "bn2", nn.BatchNorm2d(block.bn2.num_features, affine=False)),
    "frozen filters": lambda block: block.conv1.weight.requires_grad_(False),
    "frozen shortcut": lambda block: block.downsample and block.downsample.eval().requires_grad_(False),
    "a shortcut that is heard": lambda block: block.downsample and block.downsample[0].register_forward_hook(doubled),
}


def doubled(module: nn.Module, given: Any, output: torch.Tensor) -> torch.Tensor:
    return 2 * output


def drawn(block: nn.Module) -> nn.Module:
    """Return the block with all that its norms have something else than it begins with."""
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in norm.state_dict().values():
                tensor.uniform_(0.5, 2) if tensor.is_floating_point() else tensor.fill_(3)
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
    direct = BLOCKS[block]()
    NORMS[norm](drawn(direct))
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


def test_a_block_of_large_maps(as_one):
    """They are written past the caches."""
    torch.manual_seed(0)
    direct = drawn(BasicBlock(64, 64))
    winograd = copy.deepcopy(direct)
    use_winograd(winograd)
    maps = [maps_of(9, 64, 55, 57).requires_grad_() for _ in range(2)]
    maps[1].data.copy_(maps[0])
    assert maps[0].nbytes >= LARGE
    one, other = (block(given) for block, given in zip((direct, winograd), maps, strict=True))
    one.sin().sum().backward()
    other.sin().sum().backward()
    assert as_one and relative(other, one) < 1e-11 and relative(maps[1].grad, maps[0].grad) < 1e-11
    for ours, exact in zip(winograd.parameters(), direct.parameters(), strict=True):
        assert relative(ours.grad, exact.grad) < 1e-11


@pytest.mark.parametrize("by_pairs", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_in_bfloat16_rounds_no_more_than_torchs_own(block, by_pairs, as_one, monkeypatch):
    monkeypatch.setattr(processor, "MULTIPLIES_PAIRS", by_pairs)
    torch.manual_seed(0)
    exact = drawn(BLOCKS[block]())
    direct, given = copy.deepcopy(exact).float(), maps_of(8, 64, 15, 16).relu().bfloat16()
    winograd, results = copy.deepcopy(direct), []
    use_winograd(winograd)
    for module in (exact, direct, winograd):
        maps = given.clone().to(torch.float64 if module is exact else torch.bfloat16).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=module is not exact):
            output = module(maps)
        output.double().sin().sum().backward()
        gradients = [parameter.grad for parameter in module.parameters()]
        results.append([output.detach(), maps.grad, *gradients, *(buffer.double() for buffer in module.buffers())])
    true, torchs, ours = results
    assert as_one and ours[0].dtype == ours[1].dtype == torch.bfloat16
    for one, other, exact_one in zip(ours, torchs, true, strict=True):
        assert relative(one, exact_one) < 1.2 * relative(other, exact_one) + 2e-3


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
    "another forward": changed(lambda block: setattr(block.bn2, "forward", torch.neg)),
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
    assert not as_one  # torch adds such a shortcut in float32
    block(maps_of(2, 64, 16, 16, dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        block(maps_of(2, 64, 16, 16, dtype=torch.bfloat16))
    assert len(as_one) == 2
    use_direct(block)
    assert (type(block), list(block.state_dict())) == before


@pytest.mark.parametrize("mean", [0, 100])
def test_rounding_is_no_more_than_that_of_torchs_own(mean, as_one):
    """Also where the mean of what is normalised is far from 0 for its spread: the variance of it is a small difference."""
    torch.manual_seed(0)
    exact = drawn(BLOCKS["timm, half as wide"]())
    for filters in (exact.conv1.weight.data, exact.downsample[0].weight.data):
        filters[:, 7] = 0
        filters[:, 7, filters.shape[2] // 2, filters.shape[3] // 2] = 1
    maps = maps_of(16, 64, 16, 16) + mean * (torch.arange(64) == 7).double()[:, None, None]
    direct, results = copy.deepcopy(exact).float(), []
    winograd = copy.deepcopy(direct)
    use_winograd(winograd)
    for module, given in ((exact, maps), (direct, maps.float()), (winograd, maps.float())):
        output = module(given.clone().requires_grad_())
        output.square().mean().backward()
        gradients = [parameter.grad for parameter in module.parameters()]
        buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        results.append([output.detach(), *gradients, *buffers])
    ours, torchs = ([relative(a, b) for a, b in zip(found, results[0], strict=True)] for found in results[:0:-1])
    assert as_one and all(one < 4 * other + 1e-6 for one, other in zip(ours, torchs, strict=True)), (ours, torchs)


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


def test_what_is_not_finite_stays_so(as_one):
    """ReLU passes what is no number, and so does its gradient."""
    block = drawn(BLOCKS["timm"]())
    use_winograd(block)
    block.conv2.weight.data[5, 3, 1, 1] = float("nan")
    maps = maps_of(2, 64, 8, 8).requires_grad_()
    output = block(maps)
    assert as_one and torch.equal(output.isnan().any(dim=(0, 2, 3)), torch.arange(64) == 5)
    output.sum().backward()
    assert maps.grad.isnan().any() and block.conv1.weight.grad.isnan().any()


def test_what_does_not_fit_is_told_and_what_spreads_is_spread(as_one):
    """As by torch: a shortcut of other channels, and one of a single pixel; compiled code would read foreign memory."""
    wrong = BasicBlock(64, 128)
    gate = BasicBlock(64, 64, downsample=nn.Sequential(nn.AdaptiveAvgPool2d(1))).double()
    plain = copy.deepcopy(gate)
    for block in (wrong, gate):
        use_winograd(block)
    with pytest.raises(RuntimeError, match="must match|expanded size"):
        wrong(maps_of(2, 64, 8, 8, dtype=torch.float32))
    results = []
    for block in (plain, gate):
        maps = maps_of(2, 64, 8, 8).sin().requires_grad_() if not results else results[0][0]
        output = F.relu(block(maps))
        results.append(
            (maps, output.detach(), *torch.autograd.grad(output.square().sum(), (maps, *block.parameters())))
        )
    assert all(relative(other, one) < 1e-11 for one, other in zip(results[0][1:], results[1][1:], strict=True))
    other = BLOCKS["timm"]()
    other.bn1 = nn.BatchNorm2d(32)
    use_winograd(other)
    with pytest.raises((RuntimeError, ValueError)):
        other(maps_of(2, 64, 8, 8, dtype=torch.float32))


def test_a_block_in_use_can_be_pickled():
    block = drawn(BLOCKS["timm"]())
    use_winograd(block)
    again = pickle.loads(pickle.dumps(block))
    maps = maps_of(2, 64, 8, 8)
    assert type(again) is type(block) and torch.equal(again(maps), block(maps))


def test_whoever_listens_to_all_modules_hears_all_layers(as_one):
    block, heard = BLOCKS["timm"](), []
    use_winograd(block)
    handle = nn.modules.module.register_module_forward_hook(lambda module, given, output: heard.append(module))
    try:
        block(maps_of(2, 64, 8, 8, dtype=torch.float32))
    finally:
        handle.remove()
    assert not as_one and block.bn1 in heard
