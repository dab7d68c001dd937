"""Every kind of `--data` gives the same pictures, keys and labels; everything else gives one clear line."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from caco.config import Pretrain
from caco.data import parquet, shards
from caco.data.arrays import ArraySource
from caco.data.decode import BrokenImage
from caco.data.folder import say_left_out
from caco.data.source import ImageSource, open_source
from caco.data.torchvision_sets import SETS
from caco.errors import UsageError
from caco.files import one_at_a_time
from caco.train.run_folder import write_config

COLOURS = [(250, 0, 0), (0, 240, 0), (0, 0, 230), (90, 90, 90), (0, 200, 200), (120, 0, 120)]


def image_bytes(number: int, kind: str = "PNG", side: int = 16) -> bytes:
    """A picture of one colour, by which it is known again."""
    file = io.BytesIO()
    Image.new("RGB", (side, side + 4), COLOURS[number]).save(file, kind)
    return file.getvalue()


def write(path: Path, data: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def keys(source: ImageSource) -> list[str]:
    return [source.key(index) for index in range(len(source))]


def seen(source: ImageSource) -> list[int]:
    """Which of COLOURS each image of a source shows."""
    images = [source.load(index) for index in range(len(source))]
    assert all(image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 for image in images)
    return [COLOURS.index(tuple(image[8, 8].tolist())) for image in images]


def labels(source: ImageSource) -> list[int]:
    assert source.labels is not None
    assert source.labels.dtype == np.int64
    return source.labels.tolist()


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    write(root / "dog" / "b.png", image_bytes(2))
    write(root / "dog" / "a.PNG", image_bytes(1))
    write(root / "cat" / "deep" / "down" / "z.webp", image_bytes(0))
    write(root / "cat" / "y.bmp", image_bytes(3, "BMP"))
    write(root / "empty" / "notes.txt", b"no image")
    return root


class TestFolder:
    def test_class_folders(self, class_folders: Path) -> None:
        source = open_source(class_folders)
        assert isinstance(source, ImageSource)
        assert source.name == str(class_folders)
        assert keys(source) == ["cat/deep/down/z.webp", "cat/y.bmp", "dog/a.PNG", "dog/b.png"]
        assert source.classes == ("cat", "dog")
        assert labels(source) == [0, 0, 1, 1]
        assert seen(source) == [0, 3, 1, 2]

    def test_an_image_beside_the_folders_means_no_labels(self, class_folders: Path) -> None:
        write(class_folders / "cover.png", image_bytes(4))
        source = open_source(str(class_folders))
        assert len(source) == 5
        assert source.labels is None
        assert source.classes == ()

    def test_one_folder_is_no_class(self, class_folders: Path) -> None:
        source = open_source(class_folders.parent)
        assert len(source) == 4
        assert source.labels is None

    def test_flat(self, tmp_path: Path) -> None:
        for number, name in enumerate(["b.png", "B.png", "a10.png", "a9.png"]):
            write(tmp_path / name, image_bytes(number))
        source = open_source(tmp_path)
        assert keys(source) == ["B.png", "a10.png", "a9.png", "b.png"]
        assert seen(source) == [1, 2, 3, 0]
        assert source.labels is None

    def test_order_is_by_whole_path(self, tmp_path: Path) -> None:
        for name in ("a/2.png", "a-b/1.png", "a/1/9.png", "a.x/0.png"):
            write(tmp_path / name, image_bytes(0))
        assert keys(open_source(tmp_path)) == ["a-b/1.png", "a.x/0.png", "a/1/9.png", "a/2.png"]

    def test_hidden_and_other_files_are_ignored(self, class_folders: Path) -> None:
        for name in (".hidden.png", ".git/x.png", "__MACOSX/dog/a.png", "dog/._b.png", "dog/readme.md", "cat/noending"):
            write(class_folders / name, image_bytes(0))
        (class_folders / "dog" / "folder.png").mkdir()
        for name in ("pipe.png", "config.json"):
            os.mkfifo(class_folders / "dog" / name)  # to open it would wait for ever
        os.symlink("pipe.png", class_folders / "dog" / "to a pipe.png")
        assert len(open_source(class_folders)) == 4

    def test_runs_below_are_left_out(self, class_folders: Path, tmp_path: Path) -> None:
        """`cd photos; caco pretrain --data . --out runs/first`: pictures of its report are none of its own images."""
        write(class_folders / "cat" / "config.json", b'{"model_type": "bert"}')  # another program's
        before = open_source(class_folders, index_cache=tmp_path / "index.npz")
        run = class_folders / "runs" / "my first"
        write_config(run, Pretrain(data=".", out="runs/my first"))
        write(run / "gallery.png", image_bytes(0))
        after = open_source(class_folders, index_cache=tmp_path / "index.npz")
        assert keys(after) == keys(before) and len(after) == 4
        assert after.classes == ("cat", "dog")
        assert keys(open_source(run)) == ["gallery.png"]  # who names the folder itself means it

    def test_links_that_lead_nowhere_end_nothing(self, class_folders: Path) -> None:
        """Those with an image's ending count as broken images, like any file that cannot be read; others are not images."""
        os.symlink("self", class_folders / "self")
        os.symlink("nowhere", class_folders / "dog" / "gone")
        os.symlink("nowhere.png", class_folders / "dog" / "c.png")
        os.symlink("d.png", class_folders / "dog" / "d.png")
        source = open_source(class_folders)
        assert keys(source)[2:] == ["dog/a.PNG", "dog/b.png", "dog/c.png", "dog/d.png"]
        assert labels(source) == [0, 0, 1, 1, 1, 1]
        with pytest.raises(BrokenImage, match=r"^dog/c.png: cannot be read: No such file"):
            source.load(4)
        with pytest.raises(BrokenImage, match=r"^dog/d.png: cannot be read: Too many levels of symbolic links"):
            source.load(5)

    def test_a_folder_with_a_link_to_itself_alone(self, tmp_path: Path) -> None:
        os.symlink("self", tmp_path / "self")
        with pytest.raises(UsageError, match=r"holds no images; found: 1 without ending"):
            open_source(tmp_path)

    def test_links_are_followed_but_not_round_in_circles(self, class_folders: Path, tmp_path: Path) -> None:
        outside = write(tmp_path / "elsewhere" / "far.png", image_bytes(5)).parent
        os.symlink(outside, class_folders / "cat" / "linked")
        os.symlink(class_folders, class_folders / "dog" / "up")
        os.symlink(class_folders / "dog", outside / "across")
        source = open_source(class_folders)
        assert keys(source) == [
            "cat/deep/down/z.webp", "cat/linked/across/a.PNG", "cat/linked/across/b.png", "cat/linked/far.png",
            "cat/y.bmp", "dog/a.PNG", "dog/b.png",
        ]  # fmt: skip
        assert seen(source) == [0, 1, 2, 5, 3, 1, 2]

    def test_a_broken_file_is_told_when_loaded(self, class_folders: Path) -> None:
        write(class_folders / "cat" / "a.jpg", b"")
        source = open_source(class_folders)
        with pytest.raises(BrokenImage, match=r"^cat/a.jpg: empty"):
            source.load(0)
        (class_folders / "dog" / "b.png").unlink()
        with pytest.raises(BrokenImage, match=r"^dog/b.png: cannot be read: No such file"):
            source.load(4)

    def test_shrink_reaches_the_decoder(self, tmp_path: Path) -> None:
        write(tmp_path / "a.jpg", image_bytes(0, "JPEG", side=64))
        source = open_source(tmp_path)
        assert source.load(0).shape == (68, 64, 3)
        decoded = source.load_shrunk(0, lambda height, width: 4 if (height, width) == (68, 64) else 1)
        assert decoded.pixels.shape == (17, 16, 3)

    def test_without_images(self, tmp_path: Path) -> None:
        write(tmp_path / "a.heic")
        write(tmp_path / "b" / "c.HEIC")
        write(tmp_path / "readme")
        with pytest.raises(UsageError, match=r"no images; found: 2 \.heic, 1 without ending .*\.jpeg"):
            open_source(tmp_path)
        (tmp_path / "void").mkdir()
        with pytest.raises(UsageError, match="no files at all"):
            open_source(tmp_path / "void")

    def test_parts_of_a_set_are_not_classes(self, tmp_path: Path) -> None:
        for part in ("train", "val"):
            write(tmp_path / part / "cat" / "a.png", image_bytes(0))
        with pytest.raises(UsageError, match="parts train, val of a set: say which, such as .*/train"):
            open_source(tmp_path)

    def test_images_beside_parquet_files_are_ambiguous(self, tmp_path: Path) -> None:
        write(tmp_path / "preview.png", image_bytes(0))
        write(tmp_path / "data" / "train.parquet")
        with pytest.raises(UsageError, match=r"both images \(1\) and Parquet or tar files \(1\).*\*\*/\*\.parquet"):
            open_source(tmp_path)

    def test_pictures_that_are_not_read_are_told(self, tmp_path: Path, capsys) -> None:
        for name in ("a.png", "b.HEIC", "deep/c.heic", "deep/d.avif", "notes.txt"):
            write(tmp_path / name, image_bytes(0))
        cache = tmp_path / "index" / "index.npz"
        say_left_out(open_source(tmp_path, index_cache=cache))
        said = f"{tmp_path}: pictures that caco does not read are left out: 1 .avif, 2 .heic\n"
        assert capsys.readouterr().err == said
        say_left_out(open_source(tmp_path / "a.png"))
        assert capsys.readouterr().err == ""


class TestIndex:
    def test_is_written_and_used_again(self, class_folders: Path, tmp_path: Path, monkeypatch) -> None:
        cache = tmp_path / "run" / "index.npz"
        first = open_source(class_folders, index_cache=cache)
        assert cache.exists()
        monkeypatch.setattr(os, "scandir", None)  # a second listing would fail
        again = open_source(class_folders, index_cache=cache)
        assert keys(again) == keys(first)
        assert again.classes == first.classes
        assert labels(again) == labels(first)
        assert seen(again) == seen(first)

    @pytest.mark.parametrize("change", ["added", "added deep", "removed", "renamed", "folder gone"])
    def test_is_made_anew_after_a_change(self, class_folders: Path, tmp_path: Path, change: str) -> None:
        cache = tmp_path / "index.npz"
        for folder in [class_folders, *class_folders.rglob("*")]:
            os.utime(folder, ns=(10**18, 10**18))  # long ago, so that any change shows
        before = keys(open_source(class_folders, index_cache=cache))
        if change == "added":
            write(class_folders / "dog" / "new.png", image_bytes(0))
        elif change == "added deep":
            write(class_folders / "cat" / "deep" / "down" / "new.png", image_bytes(0))
        elif change == "removed":
            (class_folders / "dog" / "b.png").unlink()
        elif change == "renamed":
            (class_folders / "dog" / "b.png").rename(class_folders / "dog" / "c.png")
        else:
            (class_folders / "empty" / "notes.txt").unlink()
            (class_folders / "empty").rmdir()
        after = keys(open_source(class_folders, index_cache=cache))
        assert after == keys(open_source(class_folders))
        assert (after == before) == (change == "folder gone")

    def test_of_another_folder_or_damaged_is_not_used(self, class_folders: Path, tmp_path: Path) -> None:
        cache = tmp_path / "index.npz"
        open_source(class_folders / "dog", index_cache=cache)
        assert len(open_source(class_folders, index_cache=cache)) == 4
        whole = cache.read_bytes()
        for content in (b"", whole[: len(whole) // 2], b"not an index", whole[:200] + b"????" + whole[204:]):
            cache.write_bytes(content)
            assert len(open_source(class_folders, index_cache=cache)) == 4
            assert len(cache.read_bytes()) == len(whole)

    def test_names_that_are_not_unicode_survive(self, tmp_path: Path) -> None:
        folder = os.fsencode(tmp_path / "odd")
        os.mkdir(folder)
        with open(os.path.join(folder, b"caf\xe9 \n\xf0\x9f\x90\x88.png"), "wb") as file:
            file.write(image_bytes(3))
        for _ in range(2):
            source = open_source(tmp_path / "odd", index_cache=tmp_path / "index.npz")
            assert seen(source) == [3]
            assert os.fsencode(source.key(0)) == b"caf\xe9 \n\xf0\x9f\x90\x88.png"


class TestFiles:
    def test_list(self, class_folders: Path) -> None:
        absolute = class_folders / "cat" / "y.bmp"
        images = write(class_folders / "list.txt", f"dog/b.png\n\n{absolute}\r\ndog/gone.png\n".encode())
        source = open_source(images)
        assert keys(source) == ["dog/b.png", str(absolute), "dog/gone.png"]
        assert source.labels is None
        assert source.load(0)[8, 8].tolist() == list(COLOURS[2])
        assert source.load(1)[8, 8].tolist() == list(COLOURS[3])
        with pytest.raises(BrokenImage, match="dog/gone.png: cannot be read"):
            source.load(2)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "it is empty"),
            (b"a,b\n1,2\n", "none of its first paths is a file"),
            (b"\xff\xfe\0", "not a text file"),
        ],
    )
    def test_bad_list(self, tmp_path: Path, content: bytes, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            open_source(write(tmp_path / "list.txt", content))

    def test_one_image_a_pattern_and_a_sequence(self, class_folders: Path, monkeypatch) -> None:
        one = open_source(class_folders / "dog" / "b.png")
        assert keys(one) == ["b.png"]
        assert seen(one) == [2]
        monkeypatch.chdir(class_folders)
        assert keys(open_source("dog/*.png")) == ["b.png"]
        several = open_source("**/[ab].*")
        assert keys(several) == ["a.PNG", "b.png"]
        assert seen(several) == [1, 2]
        sequence = open_source([class_folders / "dog" / "b.png", "cat/y.bmp"])
        assert keys(sequence) == ["dog/b.png", "cat/y.bmp"]
        assert seen(sequence) == [2, 3]

    def test_unfit_files(self, tmp_path: Path) -> None:
        for name, message in (
            ("a.zip", "unpack it first"),
            ("b.tar.gz", "unpack it first"),
            ("c.csv", "cannot read images from"),
        ):
            with pytest.raises(UsageError, match=message):
                open_source(write(tmp_path / name))
        write(tmp_path / "d.png")
        with pytest.raises(UsageError, match="several kinds .*csv, image"):
            open_source(f"{tmp_path}/*.[cp][sn][vg]")
        with pytest.raises(UsageError, match="no files given"):
            open_source([])

    def test_lists_of_windows_and_odd_names(self, tmp_path: Path) -> None:
        names = ["a.png", "line\u2028break.png", "next\x85line.png"]
        for number, name in enumerate(names):
            write(tmp_path / name, image_bytes(number))
        path = write(tmp_path / "list.txt", "\r\n".join(names).encode("utf-8-sig"))
        assert keys(open_source(path)) == names
        assert seen(open_source(path)) == [0, 1, 2]


def write_shard(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT, **fields) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for field, value in fields.items():
                setattr(member, field, value)
            tar.addfile(member, io.BytesIO(data))
    return path


class TestShards:
    def test_labels_order_and_keys(self, tmp_path: Path) -> None:
        write_shard(tmp_path / "s-000.tar", [("0001.cls", b"2"), ("0001.png", image_bytes(0)), ("0001.json", b"{}"),
                                             ("0000.png", image_bytes(1)), ("0000.cls", b"0\n")])  # fmt: skip
        write_shard(tmp_path / "s-001.tar", [("sub/0.jpg", image_bytes(2)), ("sub/0.cls", b"2"), ("._0.jpg", b"x")])
        for data in (
            str(tmp_path),
            f"{tmp_path}/s-{{000..001}}.tar",
            f"{tmp_path}/*.tar",
            f"{tmp_path}/s-00{{1,0}}.tar",
        ):
            source = open_source(data)
            assert keys(source) == ["s-000.tar/0001.png", "s-000.tar/0000.png", "s-001.tar/sub/0.jpg"]
            assert seen(source) == [0, 1, 2]
            assert [source.classes[label] for label in labels(source)] == ["2", "0", "2"]

    def test_labels_by_name_and_missing_labels(self, tmp_path: Path) -> None:
        members = [("a.png", image_bytes(0)), ("a.cls", b"dog"), ("b.png", image_bytes(1)), ("b.cls", b"cat")]
        source = open_source(write_shard(tmp_path / "a.tar", members))
        assert source.classes == ("cat", "dog")
        assert labels(source) == [1, 0]
        source = open_source(write_shard(tmp_path / "b.tar", members[:3]))
        assert source.classes == ()
        assert source.labels is None
        assert seen(source) == [0, 1]

    @pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    @pytest.mark.parametrize("length", [5, 99, 120, 180])
    def test_every_tar_format(self, tmp_path: Path, form: int, length: int) -> None:
        stem = ("folder/" * 30)[: length // 2] + "/" + "n" * (length - length // 2 - 6)
        members = [(f"{stem}{number}.png", image_bytes(number)) for number in range(6)]
        members.insert(3, (f"{stem}é.cls", b"0"))
        path = write_shard(tmp_path / "a.tar", members, form, mtime=1.5 if form == tarfile.PAX_FORMAT else 1)
        source = open_source(path)
        assert seen(source) == [0, 1, 2, 3, 4, 5]
        assert keys(source)[0] == f"a.tar/{stem}0.png"
        assert shards._any_members(str(path))  # the oracle below saw something
        with open(path, "rb") as file:
            for member in shards._any_members(str(path)):
                file.seek(member.offset)
                assert file.read(member.size) == dict(members)[member.name]

    def test_quick_reader_agrees_with_tarfile_or_declines(self, tmp_path: Path) -> None:
        generator = np.random.default_rng(0)
        members = [(f"{number:04d}.jpg", generator.bytes(int(generator.integers(0, 1500)))) for number in range(50)]
        for form, quick in ((tarfile.USTAR_FORMAT, True), (tarfile.GNU_FORMAT, True), (tarfile.PAX_FORMAT, True)):
            path = write_shard(tmp_path / f"{form}.tar", members, form, mtime=1.5 if form == tarfile.PAX_FORMAT else 1)
            found = shards._plain_members(path.read_bytes())
            assert (found is not None) == quick
            assert found == shards._any_members(str(path))
        long_names = write_shard(tmp_path / "long.tar", [("x" * 200 + ".jpg", b"1")], tarfile.PAX_FORMAT)
        assert shards._plain_members(long_names.read_bytes()) is None
        content = bytearray(path.read_bytes())
        content[3] ^= 1
        assert shards._plain_members(bytes(content)) is None

    def test_broken_members_and_shards(self, tmp_path: Path) -> None:
        path = write_shard(tmp_path / "a.tar", [("a.png", image_bytes(0)), ("b.png", b"no image")])
        source = open_source(path)
        with pytest.raises(BrokenImage, match="a.tar/b.png: not an image"):
            source.load(1)
        whole = path.read_bytes()
        path.write_bytes(whole[:560])
        with pytest.raises(BrokenImage, match="a.tar/a.png: truncated"):
            source.load(0)
        for content in (whole[:560], b"", b"no tar" * 200):
            path.write_bytes(content)
            with pytest.raises(UsageError, match="a.tar cannot be read as an uncompressed tar file"):
                open_source(path)
        with pytest.raises(UsageError, match="no images in 1 tar files"):
            open_source(write_shard(tmp_path / "b.tar", [("a.txt", b"")]))
        with pytest.raises(UsageError, match=r"a-\{0..1\}.tar names .*a-0.tar, which is not there"):
            open_source(f"{tmp_path}/a-{{0..1}}.tar")
        with pytest.raises(UsageError, match="matches no file"):
            open_source(f"{tmp_path}/q*.tar")

    def test_index_and_threads(self, tmp_path: Path, monkeypatch) -> None:
        cache = tmp_path / "index.npz"
        members = [(f"{number}.png", image_bytes(number)) for number in range(6)]
        labelled = [*members, *((f"{number}.cls", b"%d" % number) for number in range(6))]
        path = write_shard(tmp_path / "a.tar", labelled)
        first = open_source(path, index_cache=cache)
        with monkeypatch.context() as patch:
            patch.setattr(shards, "_members", None)  # a second listing would fail
            source = open_source(path, index_cache=cache)
        assert keys(source) == keys(first)
        assert labels(source) == labels(first) == [0, 1, 2, 3, 4, 5]
        assert source.classes == first.classes
        with ThreadPoolExecutor(8) as pool:
            colours = list(pool.map(lambda number: source.load(number % 6)[8, 8].tolist(), range(300)))
        assert colours == [list(COLOURS[number % 6]) for number in range(300)]
        write_shard(path, members[::-1] + members[:1])
        assert seen(open_source(path, index_cache=cache)) == [5, 4, 3, 2, 1, 0, 0]

    def test_numbers_below_zero_mean_no_label(self, tmp_path: Path) -> None:
        members = [("0.png", image_bytes(0)), ("0.cls", b"-1"), ("1.png", image_bytes(1)), ("1.cls", b"-1")]
        source = open_source(write_shard(tmp_path / "a.tar", members))
        assert (source.labels, source.classes) == (None, ())  # as in Parquet; before: one class, "-1"

    def test_links_keep_their_names(self, tmp_path: Path) -> None:
        snapshot = tmp_path / "snapshot"
        snapshot.mkdir()
        for number, blob in enumerate(["ff0", "aa1"]):
            write_shard(tmp_path / "blobs" / blob, [("0.png", image_bytes(number))])
            (snapshot / f"shard-{number}.tar").symlink_to(tmp_path / "blobs" / blob)
        source = open_source(snapshot)
        assert keys(source) == ["shard-0.tar/0.png", "shard-1.tar/0.png"]
        assert seen(source) == [0, 1]


def write_parquet(path: Path, rows: dict[str, list], names: list[str] | None = None, group: int = 2) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(rows)
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group, compression="zstd")
    return path


def image_column(*numbers: int) -> list[dict]:
    return [{"bytes": image_bytes(number), "path": f"{number}.png"} for number in numbers]


class TestParquet:
    def test_hugging_face_layout(self, tmp_path: Path) -> None:
        rows = {"image": image_column(3, 1, 4, 1, 5), "label": [2, 0, 1, 0, 0]}
        source = open_source(write_parquet(tmp_path / "a.parquet", rows, ["cat", "dog", "emu", "fox"]))
        assert keys(source) == [f"row {number}" for number in range(5)]
        assert seen(source) == [3, 1, 4, 1, 5]
        assert source.classes == ("cat", "dog", "emu", "fox")
        assert labels(source) == [2, 0, 1, 0, 0]

    def test_several_files(self, tmp_path: Path) -> None:
        for number in range(3):
            rows = {"image": image_column(number, number + 1), "label": [number, 7]}
            write_parquet(tmp_path / "data" / f"p-{number}.parquet", rows)
        for data in (tmp_path, f"{tmp_path}/**/p-*.parquet", f"{tmp_path}/data/p-{{0..2}}.parquet"):
            source = open_source(data)
            assert seen(source) == [0, 1, 1, 2, 2, 3]
            assert keys(source)[1:3] == [
                "p-0.parquet/row 1",
                "p-1.parquet/row 0",
            ]
            assert [source.classes[label] for label in labels(source)] == ["0", "7", "1", "7", "2", "7"]

    @pytest.mark.parametrize(
        ("rows", "classes", "expected"),
        [
            ({"img": image_column(0, 1), "fine_label": [1, 0]}, ("0", "1"), [1, 0]),
            ({"photo": image_column(0, 1), "label": ["dog", "cat"]}, ("cat", "dog"), [1, 0]),
            ({"id": [1, 2], "image": [image_bytes(0), image_bytes(1)]}, (), None),
            ({"image": image_column(0, 1), "label": [-1, -1]}, (), None),
            ({"image": image_column(0, 1), "label": [1, None]}, (), None),
            ({"image": image_column(0, 1), "label": [0.5, 1.5]}, (), None),
            (
                {"image": image_column(0, 1), "label": np.array([2**63, 2**64 - 1], np.uint64)},
                (str(2**64 - 1), str(2**63)),
                [1, 0],
            ),
            ({"image.bytes": [image_bytes(0), image_bytes(1)], "label": [1, 0]}, ("0", "1"), [1, 0]),  # flatten()
            ({"image": [{"bytes": "text"}] * 2, "jpg": [image_bytes(0), image_bytes(1)]}, (), None),
        ],
    )
    def test_other_columns(self, tmp_path: Path, rows: dict, classes: tuple, expected: list[int] | None) -> None:
        source = open_source(write_parquet(tmp_path / "a.parquet", rows))
        assert seen(source) == [0, 1]
        assert source.classes == classes
        assert source.labels is None if expected is None else labels(source) == expected

    def test_unpacked_once_to_a_file(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(parquet, "IN_MEMORY", 0)
        rows = {"image": image_column(3, 1, 4), "label": [1, 0, 1]}
        path = write_parquet(tmp_path / "a.parquet", rows, ["cat", "dog"])
        first = open_source(path, root=tmp_path / "cache")
        assert sorted(file.suffix for file in (tmp_path / "cache").iterdir()) == [".bytes", ".lock", ".npz"]
        with monkeypatch.context() as patch:
            patch.setattr(parquet, "_unpack", None)  # to unpack again would fail
            again = open_source(path, root=tmp_path / "cache")
        for source in (first, again):
            assert seen(source) == [3, 1, 4]
            assert labels(source) == [1, 0, 1]
            assert source.classes == ("cat", "dog")
        next((tmp_path / "cache").glob("*.bytes")).write_bytes(b"cut short")
        assert seen(open_source(path, root=tmp_path / "cache")) == [3, 1, 4]
        write_parquet(path, {"image": image_column(5, 5), "label": [0, 0]}, ["cat", "dog"])
        assert seen(open_source(path, root=tmp_path / "cache")) == [5, 5]
        assert len(list((tmp_path / "cache").iterdir())) == 3

    def test_several_processes_unpack_once(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "a.parquet", {"image": [os.urandom(1000) for _ in range(500)]}, group=100)
        cache = tmp_path / "cache"
        write(cache / f".parquet-{'0' * 16}.bytes.1.tmp")  # of other files: stays
        script = (
            "import sys; from pathlib import Path; from caco.data import parquet; from caco.data.source import open_source\n"
            "parquet.IN_MEMORY = 0; print(len(open_source(sys.argv[1], root=Path(sys.argv[2]))), flush=True)"
        )
        command = [sys.executable, "-c", script, str(path), str(cache)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        outputs = [process.communicate() for process in [subprocess.Popen(command, **pipes) for _ in range(4)]]
        assert [out for out, _ in outputs] == ["500\n"] * 4
        said = [error for _, error in outputs if error]
        assert len(said) == 1
        assert "the images of 1 Parquet file are unpacked to" in said[0]
        (content,) = cache.glob("*.bytes")
        left = write(cache / f".{content.name}.12345.tmp", b"by a process that was killed")
        content.write_bytes(b"cut short")
        assert subprocess.run(command, capture_output=True, check=True).stdout == b"500\n"
        assert not left.exists()
        assert len(list(cache.iterdir())) == 4

    @pytest.mark.parametrize("in_memory", [0, 10**6])
    def test_can_be_sent_to_another_process(self, tmp_path: Path, monkeypatch, in_memory: int) -> None:
        monkeypatch.setattr(parquet, "IN_MEMORY", in_memory)
        rows = {"image": image_column(3, 1, 4), "label": [1, 0, 1]}
        write_parquet(tmp_path / "a.parquet", rows)
        monkeypatch.chdir(tmp_path)
        data = pickle.dumps(open_source("a.parquet", root=tmp_path / "cache"))
        monkeypatch.chdir("/")
        again = pickle.loads(data)
        assert (again.name, seen(again), labels(again)) == ("a.parquet", [3, 1, 4], [1, 0, 1])

    def test_links_keep_their_names(self, tmp_path: Path) -> None:
        snapshot = tmp_path / "snapshot"  # as in the cache of Hugging Face, where the files have hashes for names
        snapshot.mkdir()
        for number, blob in enumerate(["ff0", "aa1"]):
            write_parquet(tmp_path / "blobs" / blob, {"image": image_column(number)})
            (snapshot / f"train-{number}.parquet").symlink_to(tmp_path / "blobs" / blob)
        source = open_source(snapshot)
        assert keys(source) == ["train-0.parquet/row 0", "train-1.parquet/row 0"]
        assert seen(source) == [0, 1]

    def test_two_columns_of_one_name_are_no_choice(self, tmp_path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        def table(*names: str) -> Path:
            pq.write_table(
                pa.Table.from_arrays([pa.array([image_bytes(0)])] * len(names), names), tmp_path / "a.parquet"
            )
            return tmp_path / "a.parquet"

        with pytest.raises(UsageError, match="no column of images .*only image, image"):
            open_source(table("image", "image"))
        assert seen(open_source(table("other", "other", "picture"))) == [0]

    def test_broken_rows_and_files(self, tmp_path: Path) -> None:
        rows = {"image": [*image_column(0), {"bytes": None, "path": "x.png"}, {"bytes": b"text", "path": ""}]}
        source = open_source(write_parquet(tmp_path / "a.parquet", rows))
        assert source.load(0).shape == (20, 16, 3)
        for row, reason in ((1, "empty"), (2, "not an image")):
            with pytest.raises(BrokenImage, match=f"^row {row}: {reason}"):
                source.load(row)
        with pytest.raises(UsageError, match="no column of images .*only label, text"):
            open_source(write_parquet(tmp_path / "b.parquet", {"label": [1], "text": ["a"]}))
        with pytest.raises(UsageError, match="c.parquet cannot be read as Parquet"):
            open_source(write(tmp_path / "c.parquet", b"PAR1 no"))
        write_parquet(tmp_path / "d" / "1.parquet", {"image": image_column(0)})
        write_parquet(tmp_path / "d" / "2.parquet", {"img": image_column(0)})
        with pytest.raises(UsageError, match="2.parquet has other columns"):
            open_source(tmp_path / "d")

    def test_without_pyarrow(self, tmp_path: Path, monkeypatch) -> None:
        path = write_parquet(tmp_path / "a.parquet", {"image": image_column(0)})
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(UsageError, match=r"pip install pyarrow"):
            open_source(path)


class TestNamedSets:
    def test_arrays(self, tmp_path: Path) -> None:
        raw = tmp_path / "MNIST" / "raw"
        images = np.arange(3, dtype=np.uint8)[:, None, None].repeat(28, 1).repeat(28, 2) * 100
        for part, count in (("train", 3), ("t10k", 2)):
            header = struct.pack(">IIII", 0x803, count, 28, 28)
            write(raw / f"{part}-images-idx3-ubyte", header + images[:count].tobytes())
            write(raw / f"{part}-labels-idx1-ubyte", struct.pack(">II", 0x801, count) + bytes([7, 0, 7])[:count])
        source = open_source("mnist", root=tmp_path)
        assert len(source) == 3
        assert labels(source) == [7, 0, 7]
        assert source.classes[7] == "7 - seven"
        assert source.load(2).shape == (28, 28, 3)
        assert (source.load(2) == 200).all()
        assert len(open_source("mnist", split="val", root=tmp_path)) == 2  # test stands in for val
        assert len(open_source("mnist:test", root=tmp_path)) == 2

    def test_one_process_at_a_time_downloads(self, tmp_path: Path) -> None:
        for part in ("train", "t10k"):  # all is there, so there is nothing to download
            write(tmp_path / f"MNIST/raw/{part}-images-idx3-ubyte", struct.pack(">IIII", 0x803, 1, 28, 28) + bytes(784))
            write(tmp_path / f"MNIST/raw/{part}-labels-idx1-ubyte", struct.pack(">II", 0x801, 1) + bytes(1))
        open_source("mnist", root=tmp_path)  # torchvision is imported
        with ThreadPoolExecutor(1) as pool:
            with one_at_a_time(tmp_path / ".mnist.lock") as held:
                assert held
                waiting = pool.submit(open_source, "mnist", root=tmp_path, download=True)
                with pytest.raises(TimeoutError):
                    waiting.result(timeout=1)
            assert len(waiting.result(timeout=60)) == 1

    def test_channels_first_arrays_and_unlabelled_parts(self, tmp_path: Path, monkeypatch) -> None:
        import torchvision.datasets as datasets

        folder = tmp_path / "stl10_binary"
        pixels = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), dtype=np.uint8)
        for part in ("train", "unlabeled"):
            write(folder / f"{part}_X.bin", pixels.transpose(0, 3, 2, 1).tobytes())  # columns first, as they publish it
        write(folder / "train_y.bin", bytes([1, 10]))
        write(folder / "class_names.txt", b"\n".join(b"class %d" % number for number in range(10)))
        write(folder / "fold_indices.txt")
        monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)  # real files are gigabytes
        source = open_source("stl10", root=tmp_path)
        assert np.array_equal(source.load(1), pixels[1])
        assert source.load(1).flags.c_contiguous
        assert labels(source) == [0, 9]
        assert source.classes[9] == "class 9"
        unlabelled = open_source("stl10:unlabeled", root=tmp_path)
        assert unlabelled.labels is None
        assert unlabelled.classes == ()
        assert np.array_equal(unlabelled.load(0), pixels[0])

    def test_files(self, tmp_path: Path, monkeypatch) -> None:
        for number, (wordnet, part) in enumerate(
            [("n01440764", "train"), ("n02102040", "train"), ("n01440764", "val")]
        ):
            write(tmp_path / "imagenette2" / part / wordnet / "a.JPEG", image_bytes(number))
        monkeypatch.setenv("CACO_DATA", str(tmp_path))
        source = open_source("imagenette")
        assert keys(source)[0] == "imagenette2/train/n01440764/a.JPEG"
        assert seen(source) == [0, 1]
        assert labels(source) == [0, 1]
        assert source.classes == ("tench", "English springer")
        assert seen(open_source("imagenette", split="test")) == [2]  # val stands in for test

    def test_files_without_loader(self, tmp_path: Path) -> None:
        folder = tmp_path / "oxford-iiit-pet"
        write(folder / "images" / "Abyssinian_1.jpg", image_bytes(4))
        write(folder / "images" / "basset_hound_2.jpg", image_bytes(5))
        write(folder / "annotations" / "trainval.txt", b"Abyssinian_1 1 1 1\nbasset_hound_2 2 2 1\n")
        source = open_source("pets", root=tmp_path)
        assert seen(source) == [4, 5]
        assert labels(source) == [0, 1]
        assert source.classes == ("Abyssinian", "Basset Hound")

    @pytest.mark.parametrize("name", SETS)
    def test_absent_sets_say_how_to_get_them(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="--download.*CACO_DATA"):
            open_source(name, root=tmp_path / "data")

    def test_absent_part(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="stl10 has no part 'unlabelled'.*Did you mean unlabeled"):
            open_source("stl10:unlabelled", root=tmp_path)
        with pytest.raises(UsageError, match="eurosat has no part 'val', only train"):
            open_source("eurosat", split="val", root=tmp_path)

    def test_textures(self) -> None:
        source = open_source("textures:20")
        assert isinstance(source, ImageSource)
        assert len(source) == 20
        assert source.load(0).shape[2] == 3
        assert len(source.classes) > 1
        assert len(labels(source)) == 20
        held_out = open_source("textures:20", split="val")
        assert not np.array_equal(source.load(0), held_out.load(0))
        for wrong in ("textures:many", "textures:0", "textures:-3"):
            with pytest.raises(UsageError, match="number of pictures"):
                open_source(wrong)


class TestUnknown:
    def test_the_folder_of_a_user_who_is_not_there(self, monkeypatch) -> None:
        with pytest.raises(UsageError, match="^~nosuchuser/photos: no such file or folder"):
            open_source("~nosuchuser/photos")
        monkeypatch.setenv("CACO_DATA", "~nosuchuser/sets")
        with pytest.raises(UsageError, match="mnist is not in ~nosuchuser/sets"):
            open_source("mnist")

    @pytest.mark.parametrize(
        ("data", "hint"),
        [
            ("cifr10", "Did you mean cifar10"),
            ("texture", "Did you mean textures"),
            ("fotos", "Did you mean photos"),
            ("photos/dgo", r"Did you mean dog\? \(in photos\)"),
            ("fotos/dog", r"Did you mean photos\?"),
            ("photos/dog/b.png/c", r"no such file"),
            ("pots/", r"no such file or folder\.( Did you mean photos\?)?$"),
            ("cifr10.tar", r"no such file or folder\.$"),
            ("./cifar10", r"no such file or folder\.$"),
            ("qqqqqqqq", "Named sets: textures, aircraft, cifar10"),
            ("/qqqqqqqq/rrrr", "no such file"),
            ("", "no images named"),
            ("x" * 5000, "no such file"),
        ],
    )
    def test_unknown(self, class_folders: Path, monkeypatch, data: str, hint: str) -> None:
        monkeypatch.chdir(class_folders.parent)
        with pytest.raises(UsageError, match=hint) as caught:
            open_source(data)
        assert "\n" not in str(caught.value)

    def test_a_path_that_exists_goes_before_a_name(self, class_folders: Path, monkeypatch) -> None:
        monkeypatch.chdir(class_folders.parent)
        class_folders.rename("cifar10")
        assert len(open_source("cifar10")) == 4


class TestArrays:
    def test_colour_and_grey(self) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (3, 9, 8, 3), dtype=np.uint8)
        source = ArraySource(pixels, [5, 0, 5])
        assert isinstance(source, ImageSource)
        assert len(source) == 3
        assert source.key(2) == "image 2"
        assert np.array_equal(source.load(1), pixels[1])
        assert np.array_equal(source.load(1), pixels[1])
        assert [source.classes[label] for label in labels(source)] == ["5", "0", "5"]
        assert ArraySource(pixels, np.array([1, 0, 1]), ["cat", "dog", "emu"]).classes == ("cat", "dog", "emu")
        grey = ArraySource(pixels[..., 0])
        assert np.array_equal(grey.load(0), pixels[0, :, :, :1].repeat(3, axis=2))
        assert grey.labels is None

    @pytest.mark.parametrize(
        ("images", "given", "message"),
        [
            (np.zeros((2, 9, 8, 3), np.float32), None, r"not float32 \[2, 9, 8, 3\]"),
            (np.zeros((2, 3, 9, 8), np.uint8), None, r"not uint8 \[2, 3, 9, 8\]"),
            (np.zeros((9, 8), np.uint8), None, "must be uint8"),
            (np.zeros((2, 9, 8, 3), np.uint8), [0], "2 whole numbers"),
            (np.zeros((2, 9, 8, 3), np.uint8), [0, -1], "2 whole numbers"),
            (np.zeros((2, 9, 8, 3), np.uint8), np.array([0.5, 1.5]), "2 whole numbers"),
        ],
    )
    def test_unfit(self, images: np.ndarray, given: object, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            ArraySource(images, given)
