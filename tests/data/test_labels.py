"""One numbering of classes for two sources, and parts of a source."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from caco.cli import main
from caco.data.arrays import ArraySource
from caco.data.labels import Relabelled, Subset
from caco.data.source import ImageSource, open_source
from caco.errors import UsageError
from caco.seen import say_shared


def source(labels, classes, name="pictures"):
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None].repeat(3, 3).repeat(8, 1).repeat(8, 2)
    return ArraySource(images, labels, classes, name=name)


def test_classes_are_renumbered_by_name():
    val = Relabelled(source([0, 1, 1, 0], ("dog", "ant")), ("ant", "bee", "cat", "dog"))
    assert val.labels.tolist() == [3, 0, 0, 3]
    assert val.labels.dtype == np.int64
    assert val.classes == ("ant", "bee", "cat", "dog")
    assert [val.classes[label] for label in val.labels] == ["dog", "ant", "ant", "dog"]
    assert (len(val), val.name) == (4, "pictures")


def test_images_stay_what_they_are():
    inner = source([0, 1, 1, 0], ("dog", "ant"))
    for outer in (Relabelled(inner, ("ant", "dog")), Subset(inner, np.arange(4))):
        assert isinstance(outer, ImageSource)
        for index in range(4):
            assert np.array_equal(outer.load(index), inner.load(index))
            assert outer.key(index) == inner.key(index)


def test_a_class_unknown_to_the_training_images():
    with pytest.raises(
        UsageError, match=r"pictures has the class 'dgo', which the training images lack\. Did you mean dog"
    ):
        Relabelled(source([0, 1], ("dgo", "ant")), ("ant", "dog"))


def test_two_classes_of_one_name():
    """They stay two where both sources have the same classes; else no name tells which is meant."""
    doubled = ("crane", "dog", "crane")
    assert Relabelled(source([0, 1, 2], doubled), doubled).labels.tolist() == [0, 1, 2]
    with pytest.raises(UsageError, match="several classes of the training images are called 'crane'"):
        Relabelled(source([0, 1], ("dog", "crane")), doubled)
    with pytest.raises(UsageError, match="several classes of pictures are called 'crane'; give each a name of its own"):
        Relabelled(source([0, 1, 2], doubled), ("crane", "dog"))


def test_no_labels():
    unlabelled = ArraySource(np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(UsageError, match="no labels"):
        Relabelled(unlabelled, ("ant",))
    part = Subset(unlabelled, np.array([1]))
    assert part.labels is None
    assert part.classes == ()


def test_images_that_are_judged_by_themselves_are_told(tmp_path, capsys):
    for name in ("train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    train, val = (open_source(tmp_path / part) for part in ("train", "val"))
    say_shared(train, val)
    assert capsys.readouterr().err == ""
    (tmp_path / "link").symlink_to(tmp_path / "train")
    say_shared(train, open_source(tmp_path / "link"))
    assert f"--val {tmp_path}/link shares 2 files with --data {tmp_path}/train" in capsys.readouterr().err
    assert main(["knn", "pixels", "--data", f"{tmp_path}/train", "--val", f"{tmp_path}/train", "--size", "8"]) == 0
    assert "shares 2 files" in capsys.readouterr().err
    pq.write_table(pa.table({"image": [b"1"], "label": [0]}), tmp_path / "a.parquet")
    say_shared(open_source(tmp_path / "a.parquet"), open_source(f"{tmp_path}/*.parquet"))
    assert "shares 1 file with" in capsys.readouterr().err


def test_a_subset_keeps_the_order_asked_for():
    part = Subset(source([0, 1, 1, 0], ("dog", "ant")), np.array([3, 1]))
    assert len(part) == 2
    assert part.labels.tolist() == [0, 1]
    assert [part.key(index) for index in range(2)] == ["image 3", "image 1"]
    assert [int(part.load(index)[0, 0, 0]) for index in range(2)] == [3, 1]
    nested = Subset(part, np.array([1]))
    assert nested.key(0) == "image 1"


def test_built_in_pictures_can_be_parted_and_relabelled():
    textures = open_source("textures:30")
    part = Subset(textures, np.array([7, 29]))
    assert np.array_equal(part.load(1), textures.load(29))
    assert np.array_equal(Relabelled(textures, textures.classes).load(3), textures.load(3))
