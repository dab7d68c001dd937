"""The parts of a set (train, val, test) that lie side by side: to take them all would train on the test images."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from caco.errors import UsageError

_PARTS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_FOLDER = re.compile(rf"({'|'.join(_PARTS)})[\W_]*(\d+|images?|set|data|split)?")
"""A folder that is a part as a whole: "train", "val2017", "test_images"; not "train station"."""


def part_of(folder: str) -> str:
    """Return which part of a set a folder is by its name: "train", "val", "test", or an empty text for none."""
    match = _FOLDER.fullmatch(folder.lower())
    return _PARTS[match[1]] if match else ""


def check_one_part(name: str, images: Sequence[str]) -> None:
    """Raise UsageError if a folder's images, sorted names relative to it, lie in different parts of a set.

    Pieces of one part (`train_1`, `train_2`) are taken together. Folders that all images are in are looked into:
    `photos/set/train` and `photos/set/val` are parts of `photos`, too.
    """
    above = os.path.commonpath([os.path.dirname(images[0]), os.path.dirname(images[-1])])
    start = len(above) + 1 if above else 0
    folders = sorted({image[start:].partition("/")[0] for image in images if "/" in image[start:]})
    parts = [folder for folder in folders if part_of(folder)]
    if len(set(map(part_of, parts))) > 1:
        example = "/".join([name.rstrip("/"), *([above] if above else []), _first(parts)])
        raise UsageError(f"{name} holds the parts {', '.join(parts)} of a set: say which, such as {example}")


def check_one_part_of_files(name: str, files: Sequence[str]) -> None:
    """Raise UsageError if Parquet or tar files, names relative to the folder, are by their names parts of a set.

    A word of the name tells: "train-00000-of-00004.parquet", "default/validation/0000.parquet".
    """
    parts: dict[frozenset[str], str] = {}
    for file in files:
        words = [word for word in re.findall(r"[a-z]+", file.lower()) if word in _PARTS]
        if words:
            parts.setdefault(frozenset(_PARTS[word] for word in words), words[-1])
    if len(parts) < 2:
        return
    word = _first(list(parts.values()))
    file = next(file for file in files if word in file.lower())
    place = f"*{word}*" if word in os.path.basename(file).lower() else f"{word}/**/*"
    pattern = f"{name.rstrip('/')}/**/{{}}.{file.rpartition('.')[2]}"
    raise UsageError(
        f"{name} holds the parts {', '.join(parts.values())} of a set: say which, such as '{pattern.format(place)}' (all "
        f"of them: '{pattern.format('*')}')"
    )


def _first(parts: Sequence[str]) -> str:
    """Return the part to train on, if there is one."""
    return next((part for part in parts if part.lower().startswith("train")), parts[0])
