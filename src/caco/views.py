"""What a view is, in numbers: drawn at random for training (`Augmentation`), or the same every time (`Preparation`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Interpolation = Literal["bilinear", "bicubic"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preparation:
    """How an image becomes the fixed view of an evaluation: resized, its centre taken, normalised."""

    size: int
    """Side of the centre view, in pixels."""
    resize: int
    """What the image's shorter side has before, in pixels."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: Interpolation = "bilinear"
    squash: bool = False
    """Both sides become `resize` pixels, whatever the image's shape."""


def usual_resize(size: int) -> int:
    """Return the usual shorter side for a centre crop: 256 for 224; small pictures (64 px) are not enlarged first."""
    return size if size <= 64 else round(size * 256 / 224)


@dataclass(frozen=True)
class Augmentation:
    """How one random view is made from one image (one column of the paper's augmentation table); by default by a crop."""

    size: int
    area: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_probability: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    jitter_probability: float = 0.0
    gray_probability: float = 0.0
    blur_probability: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_probability: float = 0.0

    @classmethod
    def crop_and_flip(cls, size: int) -> Augmentation:
        """Return torchvision's RandomResizedCrop(size) and RandomHorizontalFlip."""
        return cls(size, area=(0.08, 1.0), flip_probability=0.5)
