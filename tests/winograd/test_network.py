"""Networks with Winograd's convolutions: the same numbers, names, hooks, and what stays torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from maps import maps_of, relative
from timm.models.resnet import BasicBlock
from torch import nn
from torch.nn import functional as F

from caco.backbone import create_backbone
from caco.checkpointing import checkpoint_blocks, keep_all_activations
from caco.winograd.network import Convolution, suits_winograd, use_direct, use_winograd

pytest.importorskip("numba")


def test_a_network_computes_the_same_and_keeps_its_names():
    torch.manual_seed(0)
    direct = create_backbone("resnet18", 32).double().train()
    winograd = copy.deepcopy(direct)
    use_winograd(winograd)
    replaced = [name for name, module in winograd.named_modules() if type(module) is Convolution]
    assert len(replaced) == 16 and "conv1" not in replaced and "layer2.0.conv1" in replaced  # 3 channels; stride 2
    assert list(winograd.state_dict()) == list(direct.state_dict())
    view = maps_of(4, 3, 32, 32)
    outputs = []
    for network in (direct, winograd, copy.deepcopy(winograd)):
        output = network(view)
        output.square().mean().backward()
        outputs.append(output.detach())
    assert relative(outputs[1], outputs[0]) < 1e-12 and torch.equal(outputs[1], outputs[2])
    for (name, one), other in zip(direct.named_parameters(), winograd.parameters(), strict=True):
        assert relative(other.grad, one.grad) < 1e-10, name
    use_direct(winograd)
    assert not any(type(module) is Convolution for module in winograd.modules()) and suits_winograd(winograd)


def test_what_it_does_not_suit_stays():
    """Other strides, groups, dilations, borders and narrow ones, and what a subclass may do otherwise."""

    class Scaled(nn.Conv2d):
        pass

    others = [
        nn.Conv2d(64, 64, 3, stride=3, padding=1),
        nn.Conv2d(64, 64, 3, stride=(1, 2), padding=1),
        nn.Conv2d(64, 64, 3),
        nn.Conv2d(64, 64, 3, padding=2, dilation=2),
        nn.Conv2d(64, 64, 3, padding=1, groups=64),
        nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(64, 64, 1),
        nn.Conv2d(16, 64, 3, padding=1),
        nn.Conv2d(64, 72, 3, padding=1),
        Scaled(64, 64, 3, padding=1),
    ]
    for other in others:
        assert not suits_winograd(other), other


@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_falls_back_where_it_does_not_pay(bias):
    torch.manual_seed(0)
    direct = nn.Conv2d(64, 64, 3, padding="same", bias=bias)
    winograd = copy.deepcopy(direct)
    use_winograd(winograd)
    large = maps_of(2, 64, 8, 8, dtype=torch.float32)
    for side in (2, 5, 6):  # most of a tile lies beyond the border
        small = maps_of(2, 64, side, side, dtype=torch.float32)
        assert torch.equal(winograd(small), direct(small))
    assert not torch.equal(winograd(large), direct(large))
    assert relative(winograd(large).detach(), direct(large).detach().double()) < 4e-6
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, torchs = winograd(large), direct(large)
        assert found.dtype == torchs.dtype == torch.bfloat16 and 0 < relative(found, torchs.double()) < 1e-2
        assert relative(winograd(large.bfloat16()), found.double()) < 1e-2
        assert winograd.double()(large.double()).dtype == torch.float64 == direct.double()(large.double()).dtype
    for module in (winograd, direct):  # a network that is bfloat16 altogether
        module.bfloat16()
    assert torch.equal(winograd(large.bfloat16()), direct(large.bfloat16()))
    for module in (winograd, direct):
        module.float()
    for module in (winograd, direct):  # without autocast torch refuses it
        with pytest.raises(RuntimeError, match="same"):
            module(large.bfloat16())
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(winograd(large), direct(large))


def test_in_bfloat16_it_is_no_further_from_the_truth_than_torchs_own():
    """Features and all gradients of a whole network, against float64; a tenth is left for pairs, backward (docs/performance.md)."""
    torch.manual_seed(0)
    exact, direct = create_backbone("resnet18", 32).double().train(), create_backbone("resnet18", 32).train()
    direct.load_state_dict(exact.state_dict())
    winograd, goal, view = copy.deepcopy(direct), torch.randn(16, 512), maps_of(16, 3, 32, 32)
    use_winograd(winograd)
    found = []
    for network in (exact, direct, winograd):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=network is not exact):
            features = network(view.to(next(network.parameters()).dtype)).double()
        (F.normalize(features, dim=1) * goal).sum().backward()
        gradients = torch.cat([parameter.grad.double().flatten() for parameter in network.parameters()])
        found.append((features, gradients))
    for true, torchs, ours in zip(*found, strict=True):
        assert 1e-3 < relative(ours, true) < 1.1 * relative(torchs, true)


def test_wrong_and_odd_inputs_are_torchs_own():
    torch.manual_seed(0)
    direct = nn.Conv2d(64, 64, 3, padding=1)
    winograd = copy.deepcopy(direct)
    use_winograd(winograd)
    for odd in (torch.randn(64, 8, 8), torch.randn(0, 64, 8, 8)):  # one image without a batch; a batch without images
        assert torch.equal(winograd(odd), direct(odd))
    with pytest.raises(RuntimeError, match="to have 64 channels, but got 32 channels"):
        winograd(torch.randn(2, 32, 8, 8))


@pytest.mark.parametrize("frozen", [False, True])
def test_layouts_expanded_gradients_and_frozen_filters(frozen):
    torch.manual_seed(0)
    direct = nn.Conv2d(64, 64, 3, padding=1).double()
    direct.weight.requires_grad_(not frozen)
    winograd = copy.deepcopy(direct)
    use_winograd(winograd)
    gradients = []
    for module in (direct, winograd):
        maps = torch.arange(2 * 64 * 9 * 6, dtype=torch.float64).sin().view(2, 64, 9, 6).requires_grad_()  # contiguous
        module(maps).sum().backward()  # an expanded gradient
        gradients.append([maps.grad, module.bias.grad, *([] if frozen else [module.weight.grad])])
    assert all(relative(one, other) < 1e-12 for one, other in zip(*gradients, strict=True))
    assert (winograd.weight.grad is None) == frozen


def test_hooks_parameters_and_optimizers_stay_and_parametrized_ones_are_left():
    plain, normalised = (
        nn.Conv2d(64, 64, 3, padding=1),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(64, 64, 3, padding=1)),
    )
    calls: list[int] = []
    plain.register_forward_hook(lambda *given: calls.append(1))
    network, weight = nn.Sequential(plain, normalised), plain.weight
    kind = type(normalised)
    use_winograd(network)
    network(torch.randn(1, 64, 8, 8))
    assert type(plain) is Convolution and plain.weight is weight and calls == [1]
    assert type(normalised) is kind


@pytest.mark.parametrize("first", [use_winograd, checkpoint_blocks])
def test_checkpointed_blocks_compute_the_same(first):
    """Whichever is done first: a run checkpoints first."""
    torch.manual_seed(0)
    plain = create_backbone("resnet18", 32).double().train()
    checkpointed = copy.deepcopy(plain)
    use_winograd(plain)
    for change in (first, *({use_winograd, checkpoint_blocks} - {first})):
        change(checkpointed)
    view, gradients = maps_of(2, 3, 32, 32), []
    for network in (plain, checkpointed):
        network(view).square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    use_direct(checkpointed)
    keep_all_activations(checkpointed)
    assert type(checkpointed.layer1[0]) is BasicBlock and "forward" not in vars(checkpointed.layer1[0])
    checkpointed(view)
