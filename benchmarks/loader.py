"""From JPEG files to batches of two 224 px views, as a run loads them: by all threads, and on a GPU by itself.

    python benchmarks/loader.py [--quick] [--rounds N] [--device cpu] [--out FILE.json]

Images/s by the clock, batches made ahead included, nothing else done meanwhile. Files of 500 x 375 and 500 x 374 pixels (of
one size they would be held decoded) are written to a temporary folder and read from the system's cache. The makers take
turns; the first batches are not counted. On a GPU the views are copied to it, or made there.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Generator
from pathlib import Path

import numpy as np
import torch
from data import jpegs, photos
from measure import arguments, describe, save, synchronise

from caco.config import Views
from caco.data.broken import BrokenImages
from caco.data.loader import TrainingViews
from caco.data.prefetch import Batch
from caco.data.source import open_source
from caco.device import choose_device
from caco.distributed.world import World
from caco.views import IMAGENET_MEAN, IMAGENET_STD

FIRST, COUNTED = 3, 6
"""Batches that are not counted, for some are made ahead; those that are."""


def write_jpegs(folder: Path, count: int) -> Path:
    """Write `count` JPEG files into a folder that is made for them; some are the same picture."""
    folder.mkdir()
    different = jpegs(photos(64, 375, 500) + photos(1, 374, 500))
    for number in range(count):
        (folder / f"{number:06d}.jpg").write_bytes(different[number % len(different)])
    return folder


def take(batches: Generator[Batch, None, None], count: int) -> None:
    for _ in range(count):
        next(batches)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    device = choose_device(options.device)
    batch = 8 if options.quick else 256 if device.type == "cuda" else 64
    threads = World(device).worker_count("auto")
    print(describe(device))
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(write_jpegs(Path(folder, "jpegs"), 8 * batch))
        loader = TrainingViews.create(
            source,
            Views().augmentations(),
            IMAGENET_MEAN,
            IMAGENET_STD,
            batch_size=batch,
            seed=0,
            workers=threads,
            device=device,
            broken=BrokenImages(len(source), 0.0),
        )
        makers = {f"{threads} threads": loader.maker}
        if (on_gpu := loader.gpu_maker()) is not None:
            makers["the GPU"] = on_gpu
        rates: dict[str, list[float]] = {name: [] for name in makers}
        for _ in range(options.rounds):
            for name, maker in makers.items():
                loader.use(maker)
                batches = loader.batches(0, 0, FIRST + COUNTED)
                take(batches, FIRST)
                start = time.perf_counter()
                take(batches, COUNTED)
                synchronise(device)
                rates[name].append(COUNTED * batch / (time.perf_counter() - start))
                batches.close()
    print(f"\nfrom JPEG files to two 224 px views, batch {batch}, images/s by the clock, median (least - most)")
    for name, rate in rates.items():
        print(f"  {name:20s}{np.median(rate):10,.0f}  ({min(rate):,.0f} - {max(rate):,.0f})")
    save(options, {"batch": batch, "threads": threads, "rates": rates})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
