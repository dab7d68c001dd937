"""When an encoder that is only used takes Winograd's convolutions, and that its features stay the same."""

import copy

import numpy as np
import pytest
import torch

import caco
from caco.backbone import create_backbone
from caco.data.arrays import ArraySource
from caco.evaluate import fast_convolutions
from caco.evaluate.fast_convolutions import WORTHWHILE, use_fast_convolutions
from caco.evaluate.features import backbone_features
from caco.weights import BackboneCard, save_backbone
from caco.winograd.network import uses_winograd

pytest.importorskip("numba")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return create_backbone("resnet18", 32).eval().to(memory_format=torch.channels_last)


def test_products_are_those_of_the_convolutions_that_suit(backbone):
    """All 3 × 3 ones of a ResNet-18 but the stem: by hand, at 32 px with the small stem."""
    stages = [(64, 32, 4), (128, 16, 3), (256, 8, 3), (512, 4, 3)]
    by_hand = sum(9 * width * width * side * side * count for width, side, count in stages)
    by_hand += sum(9 * width * 2 * width * (side // 2) ** 2 for width, side, _ in stages[:3])
    assert fast_convolutions._products(backbone, 32) == by_hand
    narrow = 9 * (64 * 64 * 16 + 64 * 128 * 4 + 128 * 128 * 4)  # of its channels, 16 to 128, only the last are enough
    assert fast_convolutions._products(create_backbone("resnet10_narrow", 32), 32) == narrow


@pytest.mark.parametrize(
    ("share", "precision", "taken"),
    [(1.01, torch.float32, True), (0.99, torch.float32, False), (9, torch.bfloat16, False)],
)
def test_they_are_taken_where_there_is_enough_to_do(backbone, share, precision, taken):
    network = copy.deepcopy(backbone)
    images = int(share * WORTHWHILE / fast_convolutions._products(network, 32)) + 1
    use_fast_convolutions(network, 32, images, CPU, precision)
    assert uses_winograd(network) is taken


def test_features_are_the_same_to_rounding(backbone):
    images = torch.randn(70, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    network = copy.deepcopy(backbone)
    use_fast_convolutions(network, 32, 10**9, CPU, torch.float32)
    with torch.no_grad():
        exact = copy.deepcopy(backbone).double()(images.double())
    for found in (backbone_features(each, images, torch.float32) for each in (backbone, network)):
        assert (found - exact).norm() < 5e-6 * exact.norm()


def test_the_commands_take_them(backbone, tmp_path, monkeypatch):
    """Of a file and of a user's own module, which stays as it is."""
    taken = []
    monkeypatch.setattr(fast_convolutions, "use_winograd", lambda network: taken.append(network))
    monkeypatch.setattr(fast_convolutions, "WORTHWHILE", 40 * fast_convolutions._products(backbone, 32))
    save_backbone(tmp_path / "b.safetensors", backbone, BackboneCard("resnet18", "small", size=32, resize=32))
    pictures = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    labelled = ArraySource(pictures, np.arange(40) % 2)
    caco.embed(tmp_path / "b.safetensors", pictures[:39], out=tmp_path / "few.npz", device="cpu")
    assert not taken
    caco.embed(tmp_path / "b.safetensors", pictures, out=tmp_path / "all.npz", device="cpu")
    assert len(taken) == 1
    caco.knn(tmp_path / "b.safetensors", labelled, device="cpu")
    assert len(taken) == 2
    caco.knn("random", labelled, backbone=backbone, size=32, device="cpu")
    assert len(taken) == 3 and taken[-1] is not backbone
