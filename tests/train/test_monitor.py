"""Which images refer and which ask in the kNN check, and what it returns."""

import shutil

import numpy as np
import pytest
import torch
from colour_photos import make_photos
from torch import nn

from caco.config import MonitorOptions, Views
from caco.data.arrays import ArraySource
from caco.data.source import open_source
from caco.distributed.world import World
from caco.errors import UsageError
from caco.train.monitor import create_monitor, knn_is_due

WORLD = World(torch.device("cpu"))
VIEWS = Views(size=8, evaluation_resize=8)


def source(labels, classes=("dark", "grey", "light"), flip=()):
    """Pictures whose brightness is their class (but for those in `flip`)."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 30, (len(labels), 8, 8, 3), dtype=np.uint8)
    for number, label in enumerate(labels):
        shown = (label + 1) % 3 if number in flip else label
        images[number] += np.uint8(100 * shown)
    return ArraySource(images, labels, classes)


class Brightness(nn.Module):
    """A backbone that sees one thing, with a part whose mode matters."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.9)

    def forward(self, images):
        mean = self.dropout(images).mean(dim=(1, 2, 3))
        angle = (mean + 2.2) / 5
        return torch.stack([angle.cos(), angle.sin()], dim=1)


def monitor(train, val=None, **options):
    return create_monitor(
        train, val, MonitorOptions(**{"knn_neighbours": 3, **options}), VIEWS, 0, WORLD, torch.float32, 2
    )


LABELS = [0, 1, 2] * 10


def test_a_held_out_share_asks_the_rest():
    check = monitor(source(LABELS), held_out=0.2)
    assert len(check.query_indices) == 6
    assert not set(check.query_indices) & set(check.reference_indices)
    assert sorted([*check.query_indices, *check.reference_indices]) == list(range(30))
    assert np.array_equal(check.query_indices, monitor(source(LABELS), held_out=0.2).query_indices)  # fixed
    assert check(Brightness()) == {"top1": 100.0, "top5": 100.0, "queries": 6, "reference": 24}


def test_val_asks_and_a_share_of_each_class_refers():
    check = monitor(source(LABELS), source([0, 1, 2, 2], flip=[3]), knn_share=0.2)
    assert check.reference_indices.tolist() == [0, 1, 2, 3, 4, 5]  # the first two of each class, in path order
    result = check(Brightness())
    assert (result["top1"], result["queries"], result["reference"]) == (75.0, 4, 6)


def test_classes_are_matched_by_name_not_by_number():
    check = monitor(source(LABELS), ArraySource(source([1, 2]).images, [0, 1], ("grey", "light")))
    assert check(Brightness())["top1"] == 100.0


def test_unlabelled_training_images_use_val_alone_leaving_each_out():
    train, val = ArraySource(source(LABELS).images), source(LABELS, flip=[7])
    check = monitor(train, val)
    assert check.queries is None
    share = pytest.approx(100 * 29 / 30)  # of the three that vote for picture 7, none is of its class
    assert check(Brightness()) == {"top1": share, "top5": share, "queries": 30, "reference": 30}


def test_training_images_that_ask_are_told(tmp_path, capsys):
    """A labelled part of an unlabelled whole: a loose picture beside the folders takes its labels away."""
    photos = make_photos(tmp_path / "photos", 4)
    whole, others = open_source(photos), open_source(make_photos(tmp_path / "others", 4))
    shutil.copy(photos / "red" / "002.jpg", photos / "loose.jpg")
    unlabelled = open_source(photos)
    assert unlabelled.labels is None
    assert monitor(unlabelled, whole).queries is None
    shared = f"--val {photos} shares 12 files with --data {photos}: images that the run is trained on"
    assert capsys.readouterr().err.startswith(shared)
    monitor(unlabelled, others)
    assert capsys.readouterr().err == ""


def test_without_labels_there_is_no_check():
    unlabelled = ArraySource(source(LABELS).images)
    assert monitor(unlabelled) is None
    assert monitor(unlabelled, unlabelled) is None
    assert monitor(source(LABELS), knn_epochs=0) is None
    assert monitor(source(LABELS), unlabelled).query_indices is not None  # val has no labels: held out as without it


def test_classes_of_one_image_each_have_none_to_hold_out(capsys):
    assert monitor(source([0, 1, 2])) is None
    assert "every class has only one image, so none can be held out" in capsys.readouterr().err
    assert monitor(source([0, 1, 2]), source([0, 1, 2]))(Brightness())["queries"] == 3


def test_a_class_that_only_val_has():
    with pytest.raises(UsageError, match="has the class 'blue', which the training images lack"):
        monitor(source(LABELS), ArraySource(source([0, 1]).images, [0, 1], ("dark", "blue")))


def test_the_backbone_is_judged_in_evaluation_mode_and_left_as_it_was():
    backbone = Brightness().train()
    result = monitor(source(LABELS))(backbone)
    assert result["top1"] == 100.0  # with dropout it would not be
    assert backbone.training
    assert backbone.dropout.training
    assert monitor(source(LABELS))(backbone) == result


def test_small_views_are_decoded_for_the_first_check_only(monkeypatch):
    train = source(LABELS)
    check, loads, load = monitor(train, held_out=0.2), [], train.load
    monkeypatch.setattr(train, "load", lambda index: loads.append(index) or load(index))
    first = check(Brightness())
    assert sorted(loads) == list(range(30))
    assert check(Brightness()) == first and len(loads) == 30


def test_when_it_is_due():
    def due(epochs, **options):
        return [epoch + 1 for epoch in range(epochs) if knn_is_due(epoch, epochs, MonitorOptions(**options))]

    assert due(25, knn_epochs=10) == [10, 20, 25]
    assert due(6, knn_epochs=100) == [6]
    assert due(200, knn_epochs=50, knn_first_epochs=20) == [*range(1, 21), 50, 100, 150, 200]  # published
