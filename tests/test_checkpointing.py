"""Activation checkpointing changes memory, not what is computed."""

import copy

import pytest
import torch
from torch import nn

from caco.backbone import create_backbone
from caco.checkpointing import checkpoint_blocks, keep_all_activations, repeated_blocks
from caco.errors import UsageError


@pytest.mark.parametrize(
    ("name", "size", "blocks"), [("resnet18", 32, 8), ("resnet10_narrow", 32, 4), ("test_vit", 160, 6)]
)
def test_same_features_gradients_and_statistics(name, size, blocks):
    torch.manual_seed(0)
    plain = create_backbone(name, size).train()
    again = copy.deepcopy(plain)
    checkpoint_blocks(again)
    assert sum("forward" in vars(part) for part in again.modules()) == blocks
    views = torch.randn(4, 3, size, size)
    for backbone in (plain, again):
        for part in views, views.flip(0) + 1:  # two views, as a step has
            backbone(part).square().mean().backward()
    for (key, one), other in zip(plain.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), key
    for (key, one), other in zip(plain.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-7, msg=key)


def test_it_is_undone():
    plain = create_backbone("resnet18", 32)
    own = plain.layer1[0].forward = plain.layer2[0].forward  # a block with a forward of its own
    checkpoint_blocks(plain)
    keep_all_activations(plain)
    assert [name for name, part in plain.named_modules() if "forward" in vars(part)] == ["layer1.0"]
    assert plain.layer1[0].forward is own


def test_fewer_activations_are_kept():
    def kept(backbone: nn.Module) -> int:
        total = 0

        def note(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            backbone(torch.randn(8, 3, 32, 32))
        return total

    plain = create_backbone("resnet18", 32).train()
    again = copy.deepcopy(plain)
    checkpoint_blocks(again)
    assert kept(again) < kept(plain) / 3


def test_blocks_of_other_families():
    convnext = create_backbone("convnext_atto", 64)
    assert len(list(repeated_blocks(convnext))) == 12
    with pytest.raises(UsageError, match="no repeated blocks"):
        checkpoint_blocks(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten()))
