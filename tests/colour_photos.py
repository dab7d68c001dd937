"""Small photos for tests, in class folders: noise, and one colour more in each class, so that it can be learned."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("blue", "green", "red")


def make_photos(folder: Path, per_class: int, classes: Sequence[str] = CLASSES, seed: int = 0) -> Path:
    """Write per_class JPEG files for each of at most three classes, of four sizes, and return the folder."""
    generator = np.random.default_rng(seed)
    for number in range(per_class * len(classes)):
        place = number % len(classes)
        path = folder / classes[place] / f"{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 60, (20 + number % 4, 22, 3), dtype=np.uint8)
        pixels[:, :, 2 - place] += 150
        Image.fromarray(pixels).save(path)
    return folder
