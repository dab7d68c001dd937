"""Parquet files in the image layout of Hugging Face: a column of {bytes, path}, perhaps a column of labels.

Parquet gives no way to read one row: it is compressed in groups of thousands. So all image bytes are unpacked once, one
behind the other: into memory if that is little, else into a file in the cache folder that is mapped into memory and
found again by the next run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Union

import numpy as np
from numpy.typing import NDArray

from caco.data.decode import BrokenImage
from caco.data.encoded import EncodedSource, Labels, labels_by_name, labels_by_number
from caco.data.index import Index, read_index, stamp, write_index
from caco.data.shards import distinct_names
from caco.errors import CacoError, UsageError

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
        content: Union[memoryview, mmap.mmap],
        ends: NDArray[np.int64],
        files: Sequence[str],
        rows: Sequence[int],
        labels: Labels,
        classes: tuple[str, ...],
    ) -> None:
        """content: all images' bytes; ends: int64 [N], where each image's bytes end; rows: number of rows of each file."""
        super().__init__(name, labels, classes)
        self._content = content
        self._ends = ends
        self._files = files
        self._first_rows = np.cumsum([0, *rows])

    def __len__(self) -> int:
        return len(self._ends)

    def key(self, index: int) -> str:
        """Return "row 17", counted from 0, after the file's name if there are several."""
        file = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        row = f"row {index - self._first_rows[file]}"
        return row if len(self._files) == 1 else f"{self._files[file]}/{row}"

    def read(self, index: int) -> bytes:
        """Return the row's bytes. Raises BrokenImage for a row without any."""
        first = int(self._ends[index - 1]) if index else 0
        data = bytes(self._content[first : int(self._ends[index])])
        if not data:
            raise BrokenImage(self.key(index), "empty: the row has no image bytes (a path alone is not followed)")
        return data
