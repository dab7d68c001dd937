"""Extraction end to end on a tiny network and an in-memory source with a broken image."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from caco.backbone import evaluation_mode
from caco.data.decode import BrokenImage
from caco.errors import CacoError
from caco.evaluate import features
from caco.evaluate.centre_views import CentreViews
from caco.evaluate.features import backbone_features, extract, joined, pixel_features
from caco.views import IMAGENET_MEAN, IMAGENET_STD, Preparation

PREPARATION = Preparation(size=32, resize=36)


class Pictures:
    """Random pictures of many sizes, one broken, in two classes."""

    name = "pictures"
    classes = ("first", "second")

    def __init__(self, count=23, broken=(5,), labelled=True):
        generator = np.random.default_rng(0)
        sizes = generator.integers(34, 60, (count, 2))
        self.images = [generator.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in sizes]
        self.broken = broken
        self.labels = np.arange(count, dtype=np.int64) % 2 if labelled else None
        self.loads = []

    def __len__(self):
        return len(self.images)

    def key(self, index):
        return f"picture {index}"

    def load(self, index):
        self.loads.append(index)
        if index in self.broken:
            raise BrokenImage(self.key(index), "made so")
        return self.images[index]


def views(source, indices=None, workers=2, **options):
    return CentreViews(source, PREPARATION, indices, workers=workers, **options)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=0)


def one_by_one(backbone, source, index):
    """The validation transform on Pillow as torchvision defines it, and a forward pass of a single image."""
    image = Image.fromarray(source.images[index])
    scale = 36 / min(image.size)
    width, height = (36 if side == min(image.size) else int(scale * side) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - 32) / 2), round((height - 32) / 2)
    pixels = np.asarray(image.crop((left, top, left + 32, top + 32))) / 255
    values = torch.from_numpy((pixels - IMAGENET_MEAN) / IMAGENET_STD).permute(2, 0, 1).float()
    with torch.no_grad():
        return backbone.eval()(values[None])[0]


@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_every_good_image_once_and_in_order(backbone, batch_size):
    source = Pictures()
    features = extract(backbone, views(source, batch_size=batch_size), device="cpu")
    good = [index for index in range(23) if index != 5]
    assert features.keys == [f"picture {index}" for index in good]
    assert features.broken == [("picture 5", "made so")]
    assert features.labels.tolist() == [index % 2 for index in good]
    assert sorted(source.loads) == list(range(23))
    assert features.vectors.dtype == torch.float32
    assert not features.vectors.requires_grad
    expected = torch.stack([one_by_one(backbone, source, index) for index in good])
    # Resizing the crop alone rounds a few pixels otherwise than resizing the whole picture (0.3 % here).
    torch.testing.assert_close(features.vectors, expected, rtol=0, atol=0.01 * expected.abs().max().item())


def test_batch_size_and_workers_do_not_matter(backbone):
    first = extract(backbone, views(Pictures(), batch_size=3, workers=1), device="cpu")
    second = extract(backbone, views(Pictures(), batch_size=22, workers=4), device="cpu")
    torch.testing.assert_close(first.vectors, second.vectors, rtol=1e-5, atol=1e-6)


def test_chosen_images_and_no_labels(backbone):
    source = Pictures(labelled=False)
    whole = extract(backbone, views(source), device="cpu")
    part = extract(backbone, views(source, np.array([8, 2, 5])), device="cpu")
    assert part.labels is None
    assert part.keys == ["picture 8", "picture 2"]
    assert part.broken == [("picture 5", "made so")]
    torch.testing.assert_close(part.vectors, whole.vectors[[7, 2]])


@pytest.mark.parametrize(
    ("broken", "room", "loads"), [((), 0, 23), ((), -1, 46), ((5,), 0, 46)], ids=["kept", "too large", "one is broken"]
)
def test_small_views_are_decoded_once_where_all_are_good(backbone, broken, room, loads):
    source = Pictures(broken=broken)
    kept = views(source, batch_size=4, most_kept=23 * 3 * 32 * 32 + room)
    first, again = (extract(backbone, kept, device="cpu") for _ in range(2))
    assert len(source.loads) == loads and set(source.loads) == set(range(23))
    assert torch.equal(first.vectors, again.vectors) and first.labels.tolist() == again.labels.tolist()
    assert first.keys == again.keys and first.broken == again.broken == [("picture 5", "made so")] * len(broken)
    source.broken = ()
    assert len(extract(backbone, kept, device="cpu").keys) == 23


def test_a_pass_that_was_broken_off_is_not_kept(backbone):
    kept = views(Pictures(broken=()), batch_size=4, most_kept=10**9)
    next(iter(kept))
    assert len(extract(backbone, kept, device="cpu").vectors) == 23


def test_the_network_is_left_as_it_was(backbone):
    backbone.train()
    frozen = next(module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d))
    frozen.eval()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    modes = [module.training for module in backbone.modules()]
    strides = [parameter.stride() for parameter in backbone.parameters()]
    extract(backbone, views(Pictures()), device="cpu")
    assert [module.training for module in backbone.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert [parameter.stride() for parameter in backbone.parameters()] == strides
    with pytest.raises(ZeroDivisionError), evaluation_mode(backbone):
        1 / backbone.training
    assert [module.training for module in backbone.modules()] == modes


def test_bf16_is_close_to_fp32(backbone):
    exact = extract(backbone, views(Pictures()), device="cpu").vectors
    narrow = extract(backbone, views(Pictures()), device="cpu", precision=torch.bfloat16).vectors
    assert narrow.dtype == torch.float32
    assert not torch.equal(narrow, exact)
    assert torch.nn.functional.cosine_similarity(narrow, exact).min() > 0.99


def test_more_batches_than_are_kept_on_the_device(backbone, monkeypatch):
    whole = extract(backbone, views(Pictures()), device="cpu")
    monkeypatch.setattr("caco.evaluate.features.BATCHES_ON_DEVICE", 2)
    parts = extract(backbone, views(Pictures(), batch_size=3), device="cpu")
    torch.testing.assert_close(parts.vectors, whole.vectors, rtol=1e-5, atol=1e-6)


def test_a_few_images_at_a_time_give_the_same(backbone, monkeypatch):
    images = torch.randn(23, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    for pixels, at_a_time in ((4 * 32 * 32, 8), (10**9, 32), (0, 2)):
        monkeypatch.setattr("caco.evaluate.features.PIXELS_A_THREAD", pixels)
        assert features._at_a_time(backbone, images) == at_a_time
        with evaluation_mode(backbone), torch.no_grad():
            whole, parts = backbone(images), backbone_features(backbone, images, torch.float32)
        assert (parts - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_joined_lets_go_of_its_parts():
    parts = list(torch.randn(10, 3).split(4))
    whole = torch.cat(parts)
    assert torch.equal(joined(parts), whole) and not parts


def test_pixels_are_what_an_encoder_sees():
    source = Pictures()
    pixels = pixel_features(views(source))
    assert pixels.vectors.shape == (22, 32 * 32 * 3)
    assert pixels.labels.tolist() == [index % 2 for index in range(23) if index != 5]
    source.images[0] = np.full((40, 50, 3), (255, 0, 51), np.uint8)
    first = pixel_features(views(source, np.array([0]))).vectors
    seen = [
        (level - mean) / std
        for level, mean, std in zip((1.0, 0.0, 0.2), PREPARATION.mean, PREPARATION.std, strict=True)
    ]
    torch.testing.assert_close(first.view(3, 32, 32), torch.tensor(seen).view(3, 1, 1).expand(3, 32, 32))


def test_errors_say_what_is_wrong(backbone):
    with pytest.raises(CacoError, match="none of the 3 images of pictures can be read; the first, picture 0: made so"):
        extract(backbone, views(Pictures(3, broken=(0, 1, 2))), device="cpu")
    with pytest.raises(CacoError, match="none of the 0 images"):
        pixel_features(views(Pictures(0, broken=())))
    with pytest.raises(CacoError, match=r"not \[\d+, 3, 32, 32\]"):
        extract(nn.Identity(), views(Pictures()), device="cpu")
    spoiled = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    nn.init.constant_(spoiled[1].bias, torch.nan)
    with pytest.raises(CacoError, match="not finite"):
        extract(spoiled, views(Pictures()), device="cpu")
