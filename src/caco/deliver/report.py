"""The page of a run: `report.html`, and `gallery.png` for a README. What is missing is left out and said."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from caco.data.source import open_source
from caco.deliver import galleries, sections
from caco.deliver.galleries import Missing
from caco.deliver.insight import EncodedImages, encode_images
from caco.deliver.judgements import read_comparisons
from caco.deliver.page import whole_page
from caco.deliver.pictures import gallery_picture
from caco.deliver.records import read_records, summarise
from caco.deliver.trained import load_trained
from caco.errors import CacoError, UsageError
from caco.files import replace_file
from caco.train.run_folder import read_config

T = TypeVar("T")

GALLERY_ROWS = 12
LARGEST_GALLERY = 300_000
"""Bytes that the gallery's PNG may have: it is meant for a README."""


def write_report(
    folder: Path,
    *,
    images: int,
    device: torch.device,
    workers: int,
    say: Callable[[str], object] = lambda text: None,
) -> Path:
    """Write report.html (and gallery.png, where there are pictures) into a run's folder; return the page's path.

    images: looked at for the galleries, at most. Raises UsageError when the folder holds no run. Everything else that
    is missing (data that has moved, no checkpoint yet, no labels, no kNN) leaves its part out; say: told that of pictures.
    """
    if images < 2:
        raise UsageError(f"--images {images}: must be at least 2")
    config = read_config(folder)
    records, speed = read_records(folder / "metrics.jsonl"), read_records(folder / "speed.jsonl")
    source = _attempt(lambda: open_source(config.data))
    trained = _attempt(lambda: load_trained(folder, config))
    encoded: EncodedImages | Missing
    if isinstance(source, Missing):
        encoded = source
    elif isinstance(trained, Missing):
        encoded = trained
    else:
        preparation = config.views.preparation()
        encode = partial(encode_images, source, trained, preparation, images=images, device=device, workers=workers)
        encoded = _attempt(encode)
    if isinstance(encoded, Missing):
        say(f"the page is without pictures, neighbours and slots: {encoded}")
    neighbours, slots = galleries.neighbours(encoded), galleries.slots(encoded, trained)
    name, summary, comparisons = folder.resolve().name, summarise(records, config), read_comparisons(folder)
    body = [
        sections.header(name, config, summary, source, encoded, comparisons),
        sections.results(str(folder), config, summary, source, comparisons),
        sections.curves(records, speed, config),
        galleries.views(source, config),
        neighbours.html,
        slots.html,
        galleries.feature_map(encoded),
        sections.configuration(config),
        sections.environment(folder),
        sections.broken_images(folder),
        sections.citation(),
    ]
    path = folder / "report.html"
    replace_file(path, whole_page(f"{name} · CaCo", body).encode(errors="backslashreplace"))  # names need not be UTF-8
    gallery = slots if slots.rows else neighbours
    if gallery.rows:
        replace_file(
            folder / "gallery.png", gallery_picture(gallery.title, gallery.rows[:GALLERY_ROWS], LARGEST_GALLERY)
        )
    return path


def _attempt(make: Callable[[], T]) -> T | Missing:
    """Return what `make` makes, or why there is none."""
    try:
        return make()
    except CacoError as error:
        return Missing(str(error))
