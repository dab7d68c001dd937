"""Parquet files in the image layout of Hugging Face: a column of {bytes, path}, perhaps a column of labels.

Parquet gives no way to read one row: it is compressed in groups of thousands. So all image bytes are unpacked once, one
behind the other: into memory if that is little, else into a file in the cache folder that is mapped into memory and
found again by the next run.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from caco.data.decode import BrokenImage
from caco.data.encoded import EncodedSource, Labels, labels_by_name, labels_by_number
from caco.data.folder import relative_names
from caco.data.index import Index, read_index, stamp, write_index
from caco.errors import CacoError, UsageError, counted
from caco.files import one_at_a_time

if TYPE_CHECKING:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

IN_MEMORY = 1024**3
"""Sets with at most this many bytes of images are held in memory, larger ones unpacked into a file."""

_IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png", "webp")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls")


class ParquetSource(EncodedSource):
    """An `ImageSource` of unpacked Parquet files; keys are "row 17", or "file.parquet/row 17" for several files."""

    def __init__(
        self,
        name: str,
        content: memoryview | mmap.mmap,
        ends: NDArray[np.int64],
        files: Sequence[str],
        rows: NDArray[np.int64],
        labels: Labels,
        classes: tuple[str, ...],
        opened_from: tuple[Sequence[Path], str, Path],
    ) -> None:
        """content: all images' bytes; ends: int64 [N], where each image ends; rows: int64 [files], rows of each;
        opened_from: the arguments of `parquet_source`."""
        super().__init__(name, labels, classes)
        self._opened_from = opened_from
        self._content = content
        self._ends = ends
        self._files = files
        self._first_rows = np.concatenate([[0], np.cumsum(rows)])

    def __reduce__(self) -> tuple[Any, ...]:
        return parquet_source, self._opened_from  # another process opens the files itself: memory cannot be sent

    def __len__(self) -> int:
        return len(self._ends)

    def key(self, index: int) -> str:
        """Return "row 17", counted from 0, after the file's name if there are several."""
        file = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        row = f"row {index - self._first_rows[file]}"
        return row if len(self._files) == 1 else f"{self._files[file]}/{row}"

    def files(self) -> Iterable[str]:
        """Return the Parquet files' paths, links followed."""
        return map(os.path.realpath, self._opened_from[0])

    def read(self, index: int) -> bytes:
        """Return the row's bytes. Raises BrokenImage for a row without any."""
        first = int(self._ends[index - 1]) if index else 0
        data = bytes(self._content[first : int(self._ends[index])])
        if not data:
            raise BrokenImage(self.key(index), "empty: the row has no image bytes (a path alone is not followed)")
        return data


def parquet_source(paths: Sequence[Path], name: str, cache_folder: Path) -> ParquetSource:
    """Return the images of Parquet files, in the order of the files and of their rows.

    More than IN_MEMORY bytes of images are unpacked to `parquet-*.bytes` in `cache_folder`, as large as all images
    together, which is used again as long as the Parquet files keep their time of change and size.
    Raises UsageError without pyarrow, or for files that are damaged, without a column of images, or of several layouts;
    CacoError if the unpacked images cannot be written.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as problem:
        raise UsageError(f"{name}: Parquet files need pyarrow: pip install pyarrow") from problem
    files = [os.path.realpath(path) for path in paths]  # of links, what they lead to changes: its stamps count
    file = files[0]
    try:
        layout = None
        size = 0
        for file in files:
            with ParquetFile(file, memory_map=True) as opened:
                layout = _layout(opened.schema_arrow, file, layout)
                size += _uncompressed_size(opened.metadata, layout.path)
    except (ArrowException, OSError) as problem:
        raise UsageError(f"{file} cannot be read as Parquet: {problem}") from problem
    assert layout is not None
    content: memoryview | mmap.mmap
    if size <= IN_MEMORY:
        buffer = io.BytesIO()
        index = _unpack(files, layout, buffer)
        content = buffer.getbuffer()
    else:
        index, content = _unpack_once(files, layout, cache_folder)
    columns = index.columns
    if not len(columns["ends"]):
        raise UsageError(f"{name} holds no images: the Parquet files have no rows")
    # Links keep their names: in Hugging Face's cache, the files behind them lack any.
    named = [Path(os.path.abspath(path)) for path in paths]
    _, names = relative_names([os.fspath(path) for path in named])
    labels, opened_from = columns.get("label"), (named, name, cache_folder)
    return ParquetSource(name, content, columns["ends"], names, columns["rows"], labels, index.classes, opened_from)


@dataclass(frozen=True)
class _Layout:
    """Which columns hold what."""

    image: str
    """The column of images."""
    is_struct: bool
    """Whether the bytes are its field `bytes`, or the column itself."""
    label: str | None
    classes: tuple[str, ...]

    @property
    def path(self) -> str:
        """The path of the bytes in the file."""
        return f"{self.image}.bytes" if self.is_struct else self.image


def _layout(schema: arrow.Schema, file: str, first: _Layout | None) -> _Layout:
    """Return the layout of a file. Raises UsageError if it has no images, or differs from the first file's layout."""
    names = [name for name in schema.names if schema.get_field_index(name) >= 0]  # not two of one name: which is meant?
    features = _features(schema)
    declared = [name for name, kind in features.items() if kind["_type"] == "Image" and name in names]
    candidates = [name for name in (*declared, *_IMAGE_COLUMNS, *names) if name in names]
    image = next((name for name in candidates if _has_bytes(schema.field(name).type)), None)
    if image is None:
        raise UsageError(f"{file} has no column of images (bytes, or {{bytes, path}}), only {', '.join(schema.names)}")
    declared = [name for name, kind in features.items() if kind["_type"] == "ClassLabel" and name in names]
    label = next((name for name in (*declared, *_LABEL_COLUMNS) if name in names), None)
    is_struct = not _is_bytes(schema.field(image).type)
    layout = _Layout(image, is_struct, label, tuple(features.get(label or "", {}).get("names") or ()))
    if first is not None and layout != first:
        raise UsageError(f"{file} has other columns or classes than the files before it; give files of one set")
    return layout


def _features(schema: arrow.Schema) -> dict[str, dict[str, Any]]:
    """Return what Hugging Face says of each column: {"_type": "Image"}, {"_type": "ClassLabel", "names": [...]}, ..."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: kind for name, kind in features.items() if isinstance(kind, dict) and "_type" in kind}
    except (KeyError, ValueError, TypeError, AttributeError):  # not from Hugging Face, or of an unknown form
        return {}


def _has_bytes(kind: arrow.DataType) -> bool:
    """Return whether a column of this type is one of bytes, or of {bytes, ...}."""
    from pyarrow import types

    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return _is_bytes(kind.field("bytes").type)
    return _is_bytes(kind)


def _is_bytes(kind: arrow.DataType) -> bool:
    return str(kind) in ("binary", "large_binary", "binary_view")


def _uncompressed_size(metadata: parquet.FileMetaData, column: str) -> int:
    """Return the bytes of a column in a file when unpacked."""
    groups = (metadata.row_group(group) for group in range(metadata.num_row_groups))
    columns = (group.column(number) for group in groups for number in range(group.num_columns))
    return sum(part.total_uncompressed_size for part in columns if part.path_in_schema == column)


def _unpack(files: Sequence[str], layout: _Layout, out: io.BytesIO | io.BufferedWriter) -> Index:
    """Write the bytes of all images to `out`; return where each ends, each file's number of rows, and the labels."""
    sizes: list[int] = []
    labels: list[Any] = []
    rows: list[int] = []
    stamps = {}
    for file in files:
        stamps[file] = stamp(file)
        before = len(sizes)
        for images, batch_labels in _batches(file, layout):
            out.writelines(images)
            sizes.extend(map(len, images))
            labels.extend(batch_labels)
        rows.append(len(sizes) - before)
    columns = {"ends": np.cumsum(sizes, dtype=np.int64), "rows": np.array(rows, np.int64)}
    numbers, classes = _labels(labels, layout.classes)
    if numbers is not None:
        columns["label"] = numbers
    return Index([], stamps, columns, classes)


def _batches(file: str, layout: _Layout) -> Iterator[tuple[list[bytes], list[Any]]]:
    """Yield images (b"" if there are no bytes) and labels, some hundred rows at a time."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    wanted = [layout.path, *([layout.label] if layout.label else [])]
    try:
        with ParquetFile(file, memory_map=True) as opened:
            for batch in opened.iter_batches(256, columns=wanted):
                images = batch.column(layout.image)
                if layout.is_struct:
                    images = images.field("bytes")
                labels = batch.column(layout.label).to_pylist() if layout.label else []
                yield [data or b"" for data in images.to_pylist()], labels
    except (ArrowException, OSError) as problem:
        raise UsageError(f"{file} cannot be read as Parquet: {problem}") from problem


def _labels(values: list[Any], names: tuple[str, ...]) -> tuple[Labels, tuple[str, ...]]:
    """Return labels and classes from a column of numbers or names; none if they are of another kind or have gaps."""
    if values and all(isinstance(value, str) for value in values):
        return labels_by_name(values)
    if values and all(isinstance(value, int) for value in values):
        if max(values) > np.iinfo(np.int64).max:  # hashes of something, in 64 bits without a sign
            return labels_by_name([str(value) for value in values])
        return labels_by_number(np.array(values, np.int64), names)
    return None, ()


def _unpack_once(files: Sequence[str], layout: _Layout, cache_folder: Path) -> tuple[Index, mmap.mmap]:
    """Return what an earlier run unpacked of these files, or unpack them now.

    One process at a time does it: the others of a run, or other runs, wait and find it done.
    """
    identity = "\n".join(["parquet", layout.path, *files])
    stem = f"parquet-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    content, index_file = cache_folder / f"{stem}.bytes", cache_folder / f"{stem}.npz"
    try:
        cache_folder.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(cache_folder / f"{stem}.lock") as alone:
            index = read_index(index_file, identity)
            if index is None or not content.exists() or content.stat().st_size != index.columns["ends"][-1]:
                if alone:
                    for left in cache_folder.glob(f".{content.name}.*.tmp"):  # by a process that was killed
                        left.unlink()
                said = f"the images of {counted(len(files), 'Parquet file')} are unpacked to {content}, once"
                print(said, file=sys.stderr, flush=True)
                index = _unpack_to(content, files, layout)
                write_index(index_file, identity, index)
            with open(content, "rb") as file:
                return index, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as problem:
        raise CacoError(
            f"the images of {files[0]} cannot be unpacked to {cache_folder}: {problem.strerror}; "
            "set CACO_DATA to a folder with more room"
        ) from problem


def _unpack_to(content: Path, files: Sequence[str], layout: _Layout) -> Index:
    """Write the bytes of all images into a file, as a whole or not at all. Raises OSError."""
    temporary = content.with_name(f".{content.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as out:
            index = _unpack(files, layout, out)
        os.replace(temporary, content)
    finally:
        temporary.unlink(missing_ok=True)
    return index
