"""Whether images are among those that a run was trained on: by their files, whatever names and links lead to them."""

import io
import os
import shutil
import tarfile

import numpy as np
import pytest
from colour_photos import make_photos
from PIL import Image

from caco.data.arrays import ArraySource
from caco.data.source import open_source
from caco.seen import TrainedOn, shared_files


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to be in: photos in `photos`, others in `others`."""
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "photos", 4)
    make_photos(tmp_path / "others", 4, seed=1)
    return tmp_path


def write_shards(folder, count):
    """Write tar files of one picture each."""
    picture = io.BytesIO()
    Image.new("RGB", (16, 16)).save(picture, "PNG")
    for number in range(count):
        with tarfile.open(folder / f"shard-{number:03}.tar", "w") as tar:
            member = tarfile.TarInfo(f"{number}.png")
            member.size = len(picture.getvalue())
            tar.addfile(member, io.BytesIO(picture.getvalue()))


@pytest.mark.parametrize(
    ("data", "judged", "seen"),
    [
        ("photos", "photos", True),
        ("photos", "{here}/photos/red", True),
        ("photos/red", "photos", True),  # some of them
        ("photos/red", "photos/blue", False),
        ("photos", "others", False),
        ("photos/*/*.jpg", "photos/red/002.jpg", True),
        ("photos/*/*0.jpg", "photos/red/002.jpg", False),
        ("list.txt", "photos/red", True),
        ("list.txt", "others", False),
        ("photos", "list.txt", True),
        ("photos", "links", True),
        ("links", "photos", True),
        ("links", "others", False),
        ("linked", "photos", True),
        ("shard-{{000..002}}.tar", "{here}/shard-001.tar", True),
        ("shard-{{000..001}}.tar", "{here}/shard-002.tar", False),
        ("shard-*.tar", "shard-00[12].tar", True),
        ("photos", "shard-000.tar", False),
        ("photos", "textures", False),
        ("textures:20", "photos", False),
        ("photos", "gone", None),
        ("gone", "photos", None),
        ("array", "array", None),  # what an array is called
        ("3 files", "photos", None),
        ("photos", "cifar10", None),  # which is not there
        ("photos", "", None),
    ],
)
def test_by_their_files(here, data, judged, seen):
    names = sorted((here / "photos").rglob("*.jpg"))
    (here / "list.txt").write_text("\n".join(map(str, names)))
    (here / "links").mkdir()
    for name in names:
        (here / "links" / name.name).symlink_to(name)
    (here / "linked").symlink_to(here / "photos")
    write_shards(here, 3)
    assert TrainedOn(data.format(here=here)).has(judged.format(here=here), "val") is seen


@pytest.mark.parametrize(
    ("data", "judged", "split", "seen"),
    [
        ("cifar10", "cifar10", "val", False),  # its test images
        ("cifar10", "cifar10", "train", True),  # a share of them
        ("cifar10:test", "cifar10", "val", True),
        ("cifar10", "cifar100", "train", False),
        ("stl10:train+unlabeled", "stl10", "train", True),
        ("stl10:train+unlabeled", "stl10", "val", False),
        ("textures:5000", "textures:2000", "val", False),
        ("textures:5000", "textures:2000", "train", True),
        ("eurosat", "eurosat", "val", None),  # which has no such part
    ],
)
def test_sets_by_name_by_their_parts(monkeypatch, tmp_path, data, judged, split, seen):
    """None of them is there: their names tell."""
    monkeypatch.setenv("CACO_DATA", str(tmp_path))
    assert TrainedOn(data).has(judged, split) is seen


def test_what_has_been_deleted_cannot_be_told(here):
    trained_on = TrainedOn("photos")
    shutil.rmtree(here / "photos")
    assert trained_on.has("others", "val") is None


def test_a_folder_goes_before_a_set_of_its_name(here):
    os.rename("photos", "cifar10")
    assert TrainedOn("cifar10").has("cifar10/red", "val") is True
    assert TrainedOn("cifar10").has("others", "val") is False


def test_how_many_files_two_sources_share(here):
    photos = open_source("photos")
    assert shared_files(photos, open_source("photos/red")) == 4
    assert shared_files(photos, open_source("others")) == 0
    assert shared_files(photos, ArraySource(np.zeros((2, 8, 8), np.uint8))) == 0
