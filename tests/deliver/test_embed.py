"""Features in files that other tools read."""

import os
import subprocess
import sys

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch

from caco.deliver.embed import check_features_path, write_features
from caco.errors import UsageError
from caco.evaluate.features import Features

KEYS = ["b/1.jpg", "a/naïve ☃.png", "c/caf\udce9.jpg"]  # the last: a name that is not UTF-8, as Python holds it
CLASSES = ("cat", "dog", "never seen")


def features(labels=True):
    vectors = torch.arange(12, dtype=torch.float32).view(3, 4) / 7
    return Features(vectors, torch.tensor([1, 0, 1]) if labels else None, list(KEYS))


def test_npz(tmp_path):
    write_features(tmp_path / "f.npz", features(), CLASSES)
    with np.load(tmp_path / "f.npz", allow_pickle=False) as file:
        assert set(file) == {"keys", "vectors", "labels", "classes"}
        assert file["keys"].tolist() == KEYS
        assert file["vectors"].dtype == np.float32
        assert np.array_equal(file["vectors"], features().vectors.numpy())
        assert file["labels"].tolist() == [1, 0, 1]
        assert [str(file["classes"][label]) for label in file["labels"]] == ["dog", "cat", "dog"]


def test_parquet(tmp_path):
    write_features(tmp_path / "f.parquet", features(), CLASSES)
    table = parquet.read_table(tmp_path / "f.parquet")
    assert table.column_names == ["key", "vector", "label", "class"]
    kind = table.schema.field("vector").type
    assert (str(kind.value_type), kind.list_size) == ("float", 4)
    assert table["key"].to_pylist() == [*KEYS[:2], "c/caf\ufffd.jpg"]
    vectors = np.array(table["vector"].to_pylist(), np.float32)
    assert np.array_equal(vectors, features().vectors.numpy())
    assert table["label"].to_pylist() == [1, 0, 1]
    assert table["class"].to_pylist() == ["dog", "cat", "dog"]


def test_classes_need_not_be_utf8(tmp_path):
    for name in ("f.npz", "f.parquet"):
        write_features(tmp_path / name, features(), ("cat", "\udce9t\udce9"))
    assert parquet.read_table(tmp_path / "f.parquet")["class"].to_pylist() == ["\ufffdt\ufffd", "cat", "\ufffdt\ufffd"]
    with np.load(tmp_path / "f.npz") as file:
        assert file["classes"].tolist() == ["cat", "\udce9t\udce9"]


@pytest.mark.parametrize("name", ["f.npz", "f.parquet"])
def test_without_labels(tmp_path, name):
    write_features(tmp_path / name, features(labels=False), ())
    if name == "f.npz":
        with np.load(tmp_path / name) as file:
            assert set(file) == {"keys", "vectors"}
    else:
        assert parquet.read_table(tmp_path / name).column_names == ["key", "vector"]


@pytest.mark.parametrize("name", ["f.npz", "f.parquet"])
def test_a_crash_keeps_the_old_file(tmp_path, monkeypatch, name):
    write_features(tmp_path / name, features(labels=False), ())
    before = (tmp_path / name).read_bytes()
    monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_features(tmp_path / name, features(), CLASSES)
    assert (tmp_path / name).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_vector_is_its_own_row_after_slicing(tmp_path):
    """Vectors need not lie in memory one behind the other."""
    wide = torch.arange(24, dtype=torch.float32).view(3, 8)
    strided = Features(wide[:, ::2], None, list("abc"))
    write_features(tmp_path / "f.parquet", strided, ())
    rows = parquet.read_table(tmp_path / "f.parquet")["vector"].to_pylist()
    assert rows == wide[:, ::2].tolist()


MEMORY = """
import re, sys, torch
from pathlib import Path
from caco.deliver.embed import write_features
from caco.evaluate.features import Features

features = Features(torch.rand(50_000, 1024), None, [f"row {row}" for row in range(50_000)])
if sys.argv[1].endswith(".parquet"):
    import pyarrow.parquet
def peak():  # not resource's: that of a child counts what its parent took
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

before = peak()
write_features(Path(sys.argv[1]), features, ())
print((peak() - before) / (50_000 * 1024 * 4 / 1024))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("name", ["f.npz", "f.parquet"])
def test_writing_takes_little_memory_beside_the_features(tmp_path, name):
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.6


@pytest.mark.parametrize(("path", "words"), [("", "--out is missing"), ("f.csv", "as .npz or .parquet"), ("f", ".npz")])
def test_paths_that_cannot_be(path, words):
    with pytest.raises(UsageError, match=words):
        check_features_path(path)


def test_parquet_without_pyarrow(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert check_features_path("f.npz").name == "f.npz"
    with pytest.raises(UsageError, match=r"pip install pyarrow"):
        check_features_path("f.parquet")
