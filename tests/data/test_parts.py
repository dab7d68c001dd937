"""Parts of a set that lie in one folder are not mixed: who trains on `set/` would train on the test images."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from caco.data.source import ImageSource, open_source
from caco.errors import UsageError


def images(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(root / name)
    return root


def keys(source: ImageSource) -> list[str]:
    return [source.key(index) for index in range(len(source))]


def parquet_files(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": [b"bytes"]}), root / name)
    return root


@pytest.mark.parametrize(
    ("names", "first"),
    [
        (("train/a.png", "val/b.png"), "train"),
        (("test2017/a.png", "train2017/b.png", "annotated/c.png"), "train2017"),  # COCO; before: three classes
        (("test/a.png", "train/b.png", "logo.png"), "train"),  # before: no classes, all trained on
        (("tiny/a/test/1.png", "tiny/a/train/2.png"), "tiny/a/train"),  # before: one class
        (("train_images/a.png", "test_images/b.png"), "train_images"),
    ],
)
def test_folders(tmp_path: Path, names: tuple[str, ...], first: str) -> None:
    root = images(tmp_path / "set", *names)
    with pytest.raises(UsageError, match=f"holds the parts .* of a set: say which, such as {root}/{first}$"):
        open_source(root)
    assert len(open_source(root / first)) == 1


@pytest.mark.parametrize(
    "names",
    [
        ("train station/a.png", "test tube/b.png"),
        ("bus/a.png", "train/b.png", "ship/c.png"),
        ("cat/train/a.png", "dog/train/b.png"),
        ("train/cat/a.png", "train/dog/b.png"),
    ],
)
def test_folders_that_are_no_parts(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert keys(open_source(images(tmp_path, *names))) == sorted(names)


@pytest.mark.parametrize("names", [("train_1/a.png", "train_2/b.png"), ("set/val2014/a.png", "set/val2017/b.png")])
def test_pieces_of_one_part(tmp_path: Path, names: tuple[str, ...]) -> None:
    """They are taken together, as Parquet files of such names are; and they are no classes."""
    source = open_source(images(tmp_path, *names))
    assert keys(source) == sorted(names)
    assert source.labels is None and source.classes == ()


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (("data/test-0.parquet", "data/train-0.parquet"), "**/*train*.parquet"),  # as Hugging Face has them
        (("d/train/0.parquet", "d/validation/0.parquet"), "**/train/**/*.parquet"),
        (("valid.parquet", "test.parquet"), "**/*test*.parquet"),
    ],
)
def test_parquet_files(tmp_path: Path, names: tuple[str, ...], pattern: str) -> None:
    root = parquet_files(tmp_path / "set", *names)
    with pytest.raises(UsageError, match="holds the parts .* of a set") as error:
        open_source(root)
    assert f"such as '{root}/{pattern}' (all of them: '{root}/**/*.parquet')" in str(error.value)
    assert len(open_source(f"{root}/{pattern}")) == 1
    assert len(open_source(f"{root}/**/*.parquet")) == 2


def test_files_of_one_part(tmp_path: Path) -> None:
    assert len(open_source(parquet_files(tmp_path, "train-0.parquet", "train-1.parquet", "more.parquet"))) == 3


def test_shards(tmp_path: Path) -> None:
    for part in ("train", "val"):
        with tarfile.open(tmp_path / f"set-{part}-000.tar", "w") as tar:
            tar.add(images(tmp_path / "all", "1.png") / "1.png", f"{part}/1.png")
    shutil.rmtree(tmp_path / "all")
    with pytest.raises(UsageError, match=r"holds the parts train, val of a set: say which, such as '.*/\*train\*.tar'"):
        open_source(tmp_path)
    assert keys(open_source(f"{tmp_path}/**/*train*.tar")) == ["set-train-000.tar/train/1.png"]
