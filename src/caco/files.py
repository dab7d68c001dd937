"""Files that are whole or not there at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Write content to path so that a crash at any moment leaves the old file or the new one, never a part.

    A temporary file in the same folder is written, synced to disk and renamed; then the folder is synced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def replace_json(path: Path, content: Any) -> None:
    """Write indented JSON with `replace_file`."""
    replace_file(path, (json.dumps(content, indent=2) + "\n").encode())
