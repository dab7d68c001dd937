"""Backbones by name and of one's own, their stems, and how they start."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from caco.backbone import Encoder, adopt_backbone, create_backbone, projector, stem_of, try_size
from caco.errors import UsageError


def features(backbone: nn.Module, size: int) -> torch.Tensor:
    with torch.no_grad():
        return backbone.eval()(torch.zeros(2, 3, size, size))


@pytest.fixture(scope="module")
def standard():
    return create_backbone("resnet18", 65)


@pytest.fixture(scope="module")
def small():
    return create_backbone("resnet18", 64)


def test_small_views_get_the_small_stem(small):
    assert (small.conv1.kernel_size, small.conv1.stride, small.conv1.padding) == ((3, 3), (1, 1), (1, 1))
    assert small.conv1.bias is None
    assert isinstance(small.maxpool, nn.Identity)
    assert stem_of(small) == "small"
    with torch.no_grad():
        assert small.layer1(small.act1(small.bn1(small.conv1(torch.zeros(1, 3, 32, 32))))).shape == (1, 64, 32, 32)
    assert features(small, 32).shape == (2, 512)


def test_large_views_keep_the_standard_stem(standard):
    assert (standard.conv1.kernel_size, standard.conv1.stride) == ((7, 7), (2, 2))
    assert isinstance(standard.maxpool, nn.MaxPool2d)
    assert stem_of(standard) == "standard"
    assert features(standard, 96).shape == (2, 512)


def test_stem_can_be_chosen():
    assert stem_of(create_backbone("resnet18", 224, "small")) == "small"
    assert stem_of(create_backbone("resnet18", 32, "standard")) == "standard"
    assert stem_of(create_backbone("test_vit", 32)) == "standard"  # no stem to make small, and none was asked for
    with pytest.raises(UsageError, match="test_vit has no ResNet stem to replace"):
        create_backbone("test_vit", 32, "small")


def test_residual_branches_are_not_zeroed(standard, small):
    """As torchvision's and the published code's; timm's default zeroes the last norm of each block."""
    assert not timm.create_model("resnet18", num_classes=0).layer1[0].bn2.weight.any()
    for backbone in (standard, small):
        norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
        assert len(norms) == 20
        assert all(bool((norm.weight == 1).all()) for norm in norms)


def test_state_dict_has_torchvisions_names(standard):
    import torchvision

    reference = torchvision.models.resnet18(weights=None).state_dict()
    ours = {name: tensor.shape for name, tensor in standard.state_dict().items()}
    assert ours == {name: tensor.shape for name, tensor in reference.items() if not name.startswith("fc.")}


def test_seed_decides_the_start():
    first, second, third = (_seeded("test_resnet", seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)


def _seeded(name: str, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return create_backbone(name, 32).state_dict()


@pytest.mark.parametrize("size", [32, 96, 160])
def test_transformers_at_another_size(size):
    backbone = create_backbone("test_vit", size)
    assert backbone.num_features == 64
    assert features(backbone, size).shape == (2, 64)
    assert features(backbone, 32).shape == (2, 64)  # multi crop: small views through the same network


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet", "test_vit"])
def test_families(name):
    backbone = create_backbone(name, 64)
    assert features(backbone, 64).shape == (2, backbone.num_features)


def test_num_features_is_measured():
    """timm says 960 for MobileNetV3, but what comes out is behind a head of 1,280."""
    backbone = create_backbone("mobilenetv3_small_050", 32)
    assert features(backbone, 32).shape == (2, backbone.num_features)


@pytest.mark.parametrize(("name", "near"), [("resnet5", "resnet50"), ("vit_smal_patch16_224", "vit_small_patch16_224")])
def test_unknown_names_get_the_nearest(name, near):
    with pytest.raises(UsageError, match=rf"timm has no model '{name}'\. Did you mean .*{near}"):
        create_backbone(name, 224)


def test_far_from_any_name():
    with pytest.raises(UsageError, match=r"timm\.list_models\(\)"):
        create_backbone("qqqqqqqqqqqqqqqqqqqqqqqqq", 224)


def test_a_size_the_model_does_not_take():
    with pytest.raises(UsageError, match="does not take pictures of 100 x 100 pixels: .*divisible"):
        create_backbone("test_vit", 100)
    with pytest.raises(UsageError, match="does not take pictures of 16 x 16 pixels"):
        create_backbone("test_convnext", 16)


class Flat(nn.Module):
    """A user's own network, with features [B, F]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.ReLU())

    def forward(self, images):
        return self.layers(images).mean(dim=(2, 3))


class Maps(Flat):
    """The same, with feature maps [B, F, H, W]."""

    def forward(self, images):
        return self.layers(images)


def test_own_modules_are_adopted():
    own = Flat()
    adopted = adopt_backbone(own, 16)
    assert adopted is own
    assert adopted.num_features == 7
    maps = Maps()
    pooled = adopt_backbone(maps, 16)
    assert pooled.num_features == 7
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(pooled.eval()(images), maps(images).mean(dim=(2, 3)))
    assert list(pooled.state_dict()) == list(maps.state_dict())


def test_pooled_modules_go_by_their_own_names_inside_others():
    """In an encoder's state dict, in a copy of it, and back again."""
    encoder = Encoder(adopt_backbone(Maps(), 16), projector(7, 20, 5))
    state = encoder.state_dict()
    assert "backbone.layers.0.weight" in state and not any("maps" in name for name in state)
    other = copy.deepcopy(Encoder(adopt_backbone(Maps(), 16), projector(7, 20, 5)))
    other.load_state_dict(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_adoption_changes_neither_mode_nor_statistics(training):
    own = Flat().train(training)
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    adopt_backbone(own, 16)
    assert own.training is training
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())


class Wrong(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, images):
        return self.make(images)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda images: images.mean(dim=(1, 2, 3)), r"not \(2,\)"),
        (lambda images: [images], "not list"),
        (lambda images: images @ torch.zeros(5, 5), "does not take pictures of 16 x 16 pixels"),
        (lambda images: images[0, 0, 0, 0] / 0 if images.sum() else {}["nothing"], "does not take pictures"),
    ],
)
def test_unusable_modules_are_usage_errors(make, words):
    module = Wrong(make).train()
    with pytest.raises(UsageError, match=words):
        adopt_backbone(module, 16)
    assert module.training


def test_projector_is_the_published_head():
    head = projector(10, 20, 5)
    shapes = {name: tuple(parameter.shape) for name, parameter in head.named_parameters()}
    norms = {f"{layer}.{part}": (20,) for layer in (1, 4) for part in ("weight", "bias")}
    assert shapes == {"0.weight": (20, 10), "3.weight": (20, 20), "6.weight": (5, 20), **norms}
    assert [type(layer) for layer in head][1:3] == [nn.BatchNorm1d, nn.ReLU]
    encoder = Encoder(adopt_backbone(Flat(), 16), projector(7, 20, 5))
    assert encoder(torch.randn(4, 3, 16, 16)).shape == (4, 5)


def test_a_module_is_tried_where_it_is():
    """One that has just been trained on a GPU is judged by its owner next."""
    with torch.device("meta"):
        module = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert try_size(module, 32).device.type == "meta"
    assert adopt_backbone(module, 32).num_features == 5


class OfItsOwn(nn.Module):
    """A module that says itself how many features it has."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layer = nn.Linear(3, features)

    @property
    def num_features(self) -> int:
        return 7

    def forward(self, view: Tensor) -> Tensor:
        return self.layer(view.mean((2, 3)))


def test_a_number_of_features_that_cannot_be_set():
    assert adopt_backbone(OfItsOwn(7), 16).num_features == 7
    with pytest.raises(UsageError, match="gives 8 features; its num_features says otherwise"):
        adopt_backbone(OfItsOwn(8), 16)
