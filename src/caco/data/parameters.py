"""The random numbers of the views, drawn apart from the pixels.

Every number is a hash of (seed, epoch, view, sample index, draw number), so a view is the same whatever the number of
workers or processes, in whatever order the samples come, and after a resume. There is no generator to save.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import permutations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from caco.views import Augmentation

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = np.array(list(permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE))), dtype=np.int8)

# Columns of ViewParameters.table(); the four of ORDER are consecutive.
TOP, LEFT, HEIGHT, WIDTH, FLIP, ORDER = 0, 1, 2, 3, 4, 5
BRIGHTNESS_FACTOR, CONTRAST_FACTOR, SATURATION_FACTOR, HUE_SHIFT, GRAY, SIGMA, SOLARIZE = 9, 10, 11, 12, 13, 14, 15
COLUMNS = 16

NEVER_SHRUNK = 512 * 512
"""Pictures of at most this many pixels are used as they are stored: to decode them smaller saves no more than it costs."""

CROP_TRIES = 10
# Draw numbers: the first ones name the draws below, then four for each try of the crop.
(
    FLIP_DRAW,
    JITTER_DRAW,
    ORDER_DRAW,
    BRIGHTNESS_DRAW,
    CONTRAST_DRAW,
    SATURATION_DRAW,
    HUE_DRAW,
    GRAY_DRAW,
    BLUR_DRAW,
    SIGMA_DRAW,
    SOLARIZE_DRAW,
) = range(11)
FIRST_CROP_DRAW = 16

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF


Edges = NDArray[np.int32] | NDArray[np.float32]


@dataclass(frozen=True)
class ViewParameters:
    """What is done to each of N images to make one view of it; numpy arrays, one row a sample.

    Crop in pixels of the image, whole ones unless it is `shrunk`; a factor of 1, a hue shift of 0 (in turns) and a
    sigma of 0 (in pixels of the view) leave the pixels as they are: that is what samples without colour jitter or
    without blur have.
    """

    top: Edges
    left: Edges
    height: Edges
    width: Edges
    flip: NDArray[np.bool_]
    order: NDArray[np.int8]
    """[N, 4], a permutation of BRIGHTNESS, CONTRAST, SATURATION, HUE: the order in which they are applied."""
    brightness: NDArray[np.float32]
    contrast: NDArray[np.float32]
    saturation: NDArray[np.float32]
    hue: NDArray[np.float32]
    gray: NDArray[np.bool_]
    sigma: NDArray[np.float32]
    solarize: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.top)

    def rows(self, selection: slice | NDArray[np.integer] | list[int]) -> ViewParameters:
        """Return the chosen rows (a slice or an array of row numbers)."""
        return ViewParameters(**{field.name: getattr(self, field.name)[selection] for field in fields(self)})

    def put(self, row: int, other: ViewParameters) -> None:
        """Put the only row of others in the place of one."""
        for field in fields(self):
            getattr(self, field.name)[row] = getattr(other, field.name)[0]

    def shrunk(self, factors: NDArray[np.integer]) -> ViewParameters:
        """Return the same views of images that are smaller by `factors`, integers [N]: crops in fractions of a pixel.

        A pixel of such an image is `factor` pixels wide and high, counted from the top left corner; so a crop of it is
        the same stretch of the picture, divided by the factor. (Float32 holds eighths of a pixel up to 2 million.)
        """
        crop = (self.top, self.left, self.height, self.width)
        top, left, height, width = ((edge / factors).astype(np.float32) for edge in crop)
        return replace(self, top=top, left=left, height=height, width=width)

    def table(self) -> NDArray[np.float32]:
        """Return everything as one float32 [N, COLUMNS]: one copy to a device, one argument of a kernel."""
        table = np.empty((len(self), COLUMNS), dtype=np.float32)
        table[:, TOP], table[:, LEFT], table[:, HEIGHT], table[:, WIDTH] = self.top, self.left, self.height, self.width
        table[:, FLIP], table[:, ORDER : ORDER + 4] = self.flip, self.order
        table[:, BRIGHTNESS_FACTOR], table[:, CONTRAST_FACTOR] = self.brightness, self.contrast
        table[:, SATURATION_FACTOR], table[:, HUE_SHIFT] = self.saturation, self.hue
        table[:, GRAY], table[:, SIGMA], table[:, SOLARIZE] = self.gray, self.sigma, self.solarize
        return table


def draw_parameters(
    augmentation: Augmentation,
    heights: ArrayLike,
    widths: ArrayLike,
    *,
    seed: int,
    epoch: int,
    indices: ArrayLike,
    view: int,
) -> ViewParameters:
    """Draw one view's parameters for each sample: a pure function of (seed, epoch, view, sample index).

    heights, widths: integers [N] (or one for all), the images' sizes in pixels. indices: integers [N], the samples'
    numbers in their source. Crops are distributed as torchvision's RandomResizedCrop, the rest as its transforms of the
    same name.
    """
    indices = np.atleast_1d(np.asarray(indices)).astype(np.uint64)
    count = len(indices)
    heights = np.broadcast_to(np.asarray(heights, dtype=np.int64), (count,))
    widths = np.broadcast_to(np.asarray(widths, dtype=np.int64), (count,))
    streams = _streams(seed, epoch, view, indices)
    draws = _uniform(streams, np.arange(SOLARIZE_DRAW + 1))

    jitter = draws[JITTER_DRAW] < augmentation.jitter_probability
    blur = draws[BLUR_DRAW] < augmentation.blur_probability
    top, left, height, width = _draw_crops(augmentation, heights, widths, streams)
    return ViewParameters(
        top=top,
        left=left,
        height=height,
        width=width,
        flip=draws[FLIP_DRAW] < augmentation.flip_probability,
        order=ORDERS[(draws[ORDER_DRAW] * len(ORDERS)).astype(np.int64)],
        brightness=_factor(augmentation.brightness, draws[BRIGHTNESS_DRAW], jitter),
        contrast=_factor(augmentation.contrast, draws[CONTRAST_DRAW], jitter),
        saturation=_factor(augmentation.saturation, draws[SATURATION_DRAW], jitter),
        hue=np.where(jitter, _between(-augmentation.hue, augmentation.hue, draws[HUE_DRAW]), 0).astype(np.float32),
        gray=draws[GRAY_DRAW] < augmentation.gray_probability,
        sigma=np.where(blur, _between(*augmentation.blur_sigma, draws[SIGMA_DRAW]), 0).astype(np.float32),
        solarize=draws[SOLARIZE_DRAW] < augmentation.solarize_probability,
    )


def largest_shrink(
    augmentations: Sequence[Augmentation], height: int, width: int, *, seed: int, epoch: int, index: int
) -> int:
    """Return by how much an image may be decoded smaller for its views: 1, 2, 4 or 8.

    The largest factor at which each crop still has at least as many pixels as its view, in height and in width; 1 for
    an image of at most NEVER_SHRUNK pixels. Like the crops a pure function of (seed, epoch, index) and the image's size.
    """
    factor = 8 if height * width > NEVER_SHRUNK else 1
    while factor > 1 and any(min(height, width) < factor * augmentation.size for augmentation in augmentations):
        factor //= 2  # no crop is larger than the image: most small images are decided here
    indices, heights, widths = np.array([index], np.uint64), np.array([height]), np.array([width])
    for view, augmentation in enumerate(augmentations):
        if factor > 1:
            _, _, crop_height, crop_width = _draw_crops(
                augmentation, heights, widths, _streams(seed, epoch, view, indices)
            )
            while factor > 1 and min(crop_height[0], crop_width[0]) < factor * augmentation.size:
                factor //= 2
    return factor


def _draw_crops(
    augmentation: Augmentation, heights: NDArray[np.int64], widths: NDArray[np.int64], streams: NDArray[np.uint64]
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Draw top, left, height, width: up to ten tries of area and shape that fit, else the largest centred crop.

    The first try for all, the others at once for those that it does not fit: few calls, which is what small batches cost.
    """
    top, left, height, width = _central_crops(augmentation.ratio, heights, widths)
    waiting = np.arange(len(streams))
    low, high = math.log(augmentation.ratio[0]), math.log(augmentation.ratio[1])
    for tries in (range(1), range(1, CROP_TRIES)):
        numbers = np.arange(FIRST_CROP_DRAW + 4 * tries.start, FIRST_CROP_DRAW + 4 * tries.stop)
        draws = _uniform(streams[waiting], numbers).reshape(len(tries), 4, len(waiting))
        area, shape, down, right = draws.transpose(1, 0, 2)
        target = _between(*augmentation.area, area) * heights[waiting] * widths[waiting]
        ratio = np.exp(_between(low, high, shape))
        tried_width = np.rint(np.sqrt(target * ratio)).astype(np.int64)
        tried_height = np.rint(np.sqrt(target / ratio)).astype(np.int64)
        free_height, free_width = heights[waiting] - tried_height, widths[waiting] - tried_width
        fits = (tried_width > 0) & (tried_height > 0) & (free_width >= 0) & (free_height >= 0)
        placed = fits.any(axis=0)
        first, chosen = (fits.argmax(axis=0)[placed], np.flatnonzero(placed)), waiting[placed]
        height[chosen], width[chosen] = tried_height[first], tried_width[first]
        top[chosen] = np.floor(down[first] * (free_height[first] + 1))
        left[chosen] = np.floor(right[first] * (free_width[first] + 1))
        waiting = waiting[~placed]
        if not len(waiting):
            break
    return top, left, height, width


def _central_crops(
    ratio: tuple[float, float], heights: NDArray[np.int64], widths: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    shape = widths / heights
    height = np.where(shape < ratio[0], np.rint(widths / ratio[0]), heights).astype(np.int32)
    width = np.where(shape > ratio[1], np.rint(heights * ratio[1]), widths).astype(np.int32)
    return ((heights - height) // 2).astype(np.int32), ((widths - width) // 2).astype(np.int32), height, width


def _between(low: float, high: float, draw: NDArray[np.float64]) -> NDArray[np.float64]:
    return low + (high - low) * draw


def _factor(strength: float, draw: NDArray[np.float64], jitter: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Uniform in 1 ± strength (not below 0), where the colour jitter is on."""
    return np.where(jitter, _between(max(0.0, 1 - strength), 1 + strength, draw), 1).astype(np.float32)


def _streams(seed: int, epoch: int, view: int, indices: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return one 64-bit state for each sample, from which all its draws follow."""
    return _mix(_state(seed, epoch, view) + indices * np.uint64(_GOLDEN))


@lru_cache
def _state(seed: int, epoch: int, view: int) -> np.uint64:
    state = np.zeros(1, np.uint64)  # an array, for numpy warns about overflow of scalars
    for number in (seed, epoch, view):
        state = _mix(state + np.uint64(number * _GOLDEN + _GOLDEN & _MASK))
    result: np.uint64 = state[0]
    return result


def _uniform(streams: NDArray[np.uint64], numbers: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return the draws of these numbers, float64 [draws, samples] in [0, 1): SplitMix64's outputs from each state."""
    steps = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    draws: NDArray[np.float64] = (_mix(streams[None, :] + steps[:, None]) >> np.uint64(11)).astype(np.float64)
    draws *= 2.0**-53
    return draws


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea and Flood, 2014); arithmetic modulo 2^64."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return state
