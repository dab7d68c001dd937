"""One feature vector for each image, in a file that other tools read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from caco.errors import UsageError
from caco.evaluate.features import Features
from caco.files import check_output, replacing

ENDINGS = (".npz", ".parquet")
ROW_GROUP = 4096
"""Rows that Parquet encodes at a time, which takes as much memory as they have, and more."""


def check_features_path(path: str, overwrite: bool = False) -> Path:
    """Return the path if features can be written to it, in place of a file only if told so. Raises UsageError."""
    if not path:
        raise UsageError("--out is missing: name a file that ends in .npz or .parquet")
    if Path(path).suffix not in ENDINGS:
        raise UsageError(f"--out {path}: features are written as .npz or .parquet")
    if Path(path).suffix == ".parquet":
        _pyarrow()
    check_output("--out", Path(path), overwrite)
    return Path(path)


def write_features(path: Path, features: Features, classes: tuple[str, ...]) -> None:
    """Write keys, vectors [N, F] float32 and, if there are any, labels and class names; atomically.

    .npz: arrays "keys", "vectors", "labels", "classes". .parquet: columns key, vector, label, class.
    """
    vectors = features.vectors.numpy()
    if path.suffix == ".npz":
        arrays = {"keys": np.array(features.keys), "vectors": vectors}
        if features.labels is not None:
            arrays |= {"labels": features.labels.numpy(), "classes": np.array(classes)}
        with replacing(path) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        return
    pyarrow, parquet = _pyarrow()
    flat = pyarrow.array(vectors.ravel())
    columns = {
        "key": [_readable(key) for key in features.keys],
        "vector": pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
    }
    if features.labels is not None:
        numbers = features.labels.tolist()
        columns |= {"label": numbers, "class": [_readable(classes[number]) for number in numbers]}
    with replacing(path) as file:
        parquet.write_table(pyarrow.table(columns), file, row_group_size=ROW_GROUP)


def _readable(name: str) -> str:
    """Return a file's name as UTF-8; where it is not UTF-8, a mark stands for what cannot be shown."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _pyarrow() -> tuple:  # type: ignore[type-arg]
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError("Parquet files need pyarrow: pip install pyarrow") from None
    return pyarrow, pyarrow.parquet
