"""Checkpoints: everything a run needs to go on exactly, in files that are whole or not there.

checkpoints/
  step-00000600.pt   one of the latest few; the highest number is where a resume starts
  best.pt            the run at its best kNN accuracy
Each is a torch file of tensors and plain containers (`weights_only=True` reads it) with a format version.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from caco.data.folder import relative_names
from caco.data.source import ImageSource
from caco.errors import CacoError, UsageError
from caco.files import PLACES, TEMPORARY, replacing
from caco.weights import load_torch

FORMAT = "caco-checkpoint-1"


class Latest(NamedTuple):
    """A checkpoint to go on from."""

    path: Path
    content: dict[str, Any]
    problems: tuple[str, ...]
    """Why newer ones cannot be read; () when there are none."""


class CheckpointFolder:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = max(keep, 1)

    def save(self, state: dict[str, Any], step: int, best: bool = False) -> Path:
        """Write a checkpoint atomically, then remove all but the latest few. step: counts the warm start's steps too.

        best: `best.pt` is this one, too, as a second name of the same file: it takes no room of its own. Raises CacoError
        when it cannot be written; what was there before is still there.
        """
        path = self.path(step)
        with replacing(path, second_name=self.folder / "best.pt" if best else None) as file:
            torch.save({"format": FORMAT, **state}, file)
        paths = self.paths()
        newest = paths.index(path) + 1
        # What is numbered higher could not be read, or the run would have been resumed from there.
        for other in [*paths[: max(newest - self.keep, 0)], *paths[newest:]]:
            other.unlink(missing_ok=True)
        return path

    def path(self, step: int) -> Path:
        """Return where the checkpoint of a step is, or will be."""
        return self.folder / f"step-{step:08d}.pt"

    def paths(self) -> list[Path]:
        """Return the numbered checkpoints, oldest first."""
        numbered = [path for path in self.folder.glob("step-*.pt") if re.fullmatch(r"step-\d{8,}", path.stem)]
        return sorted(numbered, key=lambda path: int(path.stem.removeprefix("step-")))

    def latest(self) -> Latest:
        """Return the newest checkpoint that can be read, the best one if no other can. Raises CacoError when none can."""
        problems: list[str] = []
        for path in [*reversed(self.paths()), *self.folder.glob("best.pt")]:
            try:
                return Latest(path, read_checkpoint(path), tuple(problems))
            except UsageError as error:
                problems.append(str(error))
        reason = "; ".join(problems) or f"{self.folder} is empty"
        backbone = self.folder.parent / "export" / "backbone.safetensors"
        kept = f" (which deletes its finished backbone, too: {backbone})" if backbone.exists() else ""
        raise CacoError(f"no checkpoint to resume from: {reason}. Use --overwrite to start anew{kept}.")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint of ours. Raises UsageError for a damaged or foreign file, or one that would run code."""
    content = load_torch(path)
    if content.get("format") != FORMAT:
        raise UsageError(
            f"{path} is not a checkpoint of this version of caco ({FORMAT}): it says {content.get('format')!r}"
        )
    return content


def identity(source: ImageSource) -> dict[str, Any]:
    """Return what a checkpoint says of its run's images: how many, and a digest of their names in their order.

    With their folders below the one that is named, which may move itself.
    """
    names = [source.key(index) for index in range(len(source))]
    if all(map(os.path.isabs, names)):  # a list of them
        names = relative_names(names)[1]
    digest = hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()
    return {"images": len(source), "keys": digest}


def check_same_images(checkpoint: Mapping[str, Any], now: Mapping[str, Any], data: str) -> None:
    """Raise UsageError where a run would go on with other images than it began with. now: as `identity` says it."""
    if checkpoint["images"] != now["images"]:
        difference = f"with {checkpoint['images']:,} images, {data} now has {now['images']:,}"
    elif checkpoint.get("keys", now["keys"]) != now["keys"]:  # older checkpoints do not say
        difference = f"with images of other names, or in another order, than {data} has now"
    else:
        return
    raise UsageError(f"--resume: the run began {difference}; resume needs the same images")


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that killed processes left behind; a living one may be writing a report there."""
    for path in (path for place in PLACES for path in (folder / place).glob(TEMPORARY)):
        number = path.name.split(".")[-2]
        if number.isdecimal() and not _is_alive(int(number)):
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    """Return whether a process of that number runs on this machine."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True
