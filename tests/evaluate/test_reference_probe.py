"""The published linear evaluation: its views, and a whole run on a tiny network."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from caco.data.augment import draw_parameters, render_views
from caco.data.decode import BrokenImage
from caco.data.order import epoch_order
from caco.distributed.world import World
from caco.errors import CacoError, UsageError
from caco.evaluate import reference_probe
from caco.evaluate.centre_views import CentreViews
from caco.evaluate.encoder import UsableEncoder
from caco.evaluate.features import extract
from caco.evaluate.reference_probe import ProbeSettings, train_reference_probe
from caco.optim import LayerWiseSGD
from caco.views import IMAGENET_MEAN, IMAGENET_STD, Augmentation, Preparation

PREPARATION = Preparation(size=16, resize=20)


def probe(backbone, train, val, on_epoch=None, **settings):
    encoder = UsableEncoder(backbone, PREPARATION, World(torch.device("cpu")), torch.float32, workers=2)
    return train_reference_probe(encoder, train, val, ProbeSettings(**settings), on_epoch)


class Stripes:
    """Horizontal or vertical stripes of random width and place; some broken."""

    name = "stripes"
    classes = ("across", "down")

    def __init__(self, count, seed, broken=(), labelled=True):
        generator = np.random.default_rng(seed)
        self.broken = broken
        targets = np.arange(count, dtype=np.int64) % 2
        self.labels = targets if labelled else None
        self.images = []
        for target in targets:
            line = 255 * (np.sin(np.arange(24) * generator.uniform(1, 2) + generator.uniform(0, 6)) > 0)
            image = np.broadcast_to(line[:, None] if target == 0 else line, (24, 24))
            self.images.append(np.ascontiguousarray(np.broadcast_to(image[..., None], (24, 24, 3)).astype(np.uint8)))

    def __len__(self):
        return len(self.images)

    def key(self, index):
        return f"stripes {index}"

    def load(self, index):
        if index in self.broken:
            raise BrokenImage(self.key(index), "made so")
        return self.images[index]


class Edges(nn.Module):
    """Mean absolute differences down and across, and how they differ; behind a batch norm that must stay as it is."""

    num_features = 6

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images):
        images = self.norm(images)
        down, across = images.diff(dim=2).abs().mean(dim=(2, 3)), images.diff(dim=3).abs().mean(dim=(2, 3))
        return torch.cat([10 * (down - across), down], dim=1)


@pytest.mark.parametrize(("broken", "batch_size", "forward"), [((), 8, 256), ((3, 10), 8, 5), ((3,), 4096, 4)])
def test_a_run_equals_plain_steps(monkeypatch, broken, batch_size, forward):
    """Views, order, schedule and optimizer written out once more, one image and one step at a time."""
    monkeypatch.setattr(reference_probe, "FORWARD_BATCH", forward)
    train, val, backbone = Stripes(21, 0, broken), Stripes(15, 1, broken=(2,)), Edges()
    backbone.train()
    losses = []
    trained = probe(
        backbone,
        train,
        val,
        epochs=3,
        batch_size=batch_size,
        learning_rate=5.0,
        seed=4,
        on_epoch=lambda epoch, loss: losses.append((epoch, loss)),
    )
    assert trained.train_broken == [(f"stripes {index}", "made so") for index in broken]
    assert trained.val_broken == [("stripes 2", "made so")]
    result, used = trained.head, min(batch_size, 21)
    head = nn.Linear(6, 2)
    with torch.no_grad():
        head.weight.normal_(0, 0.01, generator=torch.Generator().manual_seed(4))
        head.bias.zero_()
    optimizer = LayerWiseSGD(head.parameters(), 0.0)
    augmentation = Augmentation.crop_and_flip(16)
    frozen = Edges().eval()
    for epoch in range(3):
        total = 0.0
        order = [int(index) for index in epoch_order(21, 4, epoch) if index not in broken]
        for start in range(0, len(order), used):
            chosen = order[start : start + used]
            views = []
            for index in chosen:
                drawn = draw_parameters(augmentation, [24], [24], seed=4, epoch=epoch, indices=[index], view=0)
                views.append(render_views([train.images[index]], drawn, augmentation, IMAGENET_MEAN, IMAGENET_STD))
            optimizer.param_groups[0]["lr"] = 5.0 * used / 256 * 0.5 * (1 + math.cos(math.pi * epoch / 3))
            with torch.no_grad():
                features = frozen(torch.cat(views))
            loss = F.cross_entropy(head(features), torch.from_numpy(train.labels)[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(chosen)
        assert losses[epoch] == (epoch, pytest.approx(total / len(order), rel=1e-5))
    torch.testing.assert_close(result.weight, head.weight.detach(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(result.bias, head.bias.detach(), rtol=1e-4, atol=1e-7)

    seen = extract(backbone, CentreViews(val, PREPARATION, workers=2), device="cpu")
    correct = (seen.vectors @ result.weight.T + result.bias).argmax(dim=1) == seen.labels
    assert torch.equal(result.correct, correct)
    assert len(correct) == 14  # the broken one is not judged, no other is judged twice
    assert (result.epochs, result.batch_size, result.learning_rate, result.trials) == (3, used, 5.0, ())
    assert backbone.training
    assert torch.equal(backbone.norm.running_mean, torch.zeros(3))


def test_it_learns():
    losses = []
    result = probe(
        Edges(),
        Stripes(48, 0),
        Stripes(40, 1),
        epochs=20,
        batch_size=48,
        learning_rate=100.0,
        on_epoch=lambda epoch, loss: losses.append(loss),
    ).head
    assert losses[-1] < 0.5 * losses[0]
    assert result.top1 > 0.9
    assert result.per_class.shape == (2,)


def test_crops_are_those_of_the_published_transform():
    augmentation = Augmentation.crop_and_flip(16)
    drawn = draw_parameters(augmentation, 400, 400, seed=0, epoch=0, indices=np.arange(2000), view=0)
    area = drawn.height.astype(float) * drawn.width / 400**2
    assert 0.07 < area.min() < 0.12
    assert area.max() > 0.9
    assert abs(drawn.flip.mean() - 0.5) < 0.05
    assert not drawn.gray.any()
    assert not drawn.solarize.any()
    assert not drawn.sigma.any()
    assert not drawn.hue.any()
    assert (drawn.brightness == 1).all()


def test_errors_say_what_is_wrong():
    labelled = Stripes(4, 0)
    with pytest.raises(CacoError, match="stripes has no labels"):
        probe(Edges(), Stripes(4, 0, labelled=False), labelled)
    with pytest.raises(CacoError, match="stripes has no labels"):
        probe(Edges(), labelled, Stripes(4, 0, labelled=False))
    with pytest.raises(CacoError, match="none of the 4 images"):
        probe(Edges(), Stripes(4, 0, broken=range(4)), labelled)
    with pytest.raises(CacoError, match="diverged in epoch . at --lr 1e\\+30; try a lower one"):
        probe(Edges(), labelled, labelled, epochs=9, learning_rate=1e30)
    with pytest.raises(UsageError, match="at least one epoch"):
        probe(Edges(), labelled, labelled, epochs=0)
    with pytest.raises(UsageError, match="judges encoders, not pixels"):
        probe(None, labelled, labelled)
