"""The pixels of random views in plain torch: the oracle of the fast kernel, and the path on GPUs.

The order of torchvision's published pipeline: crop and resize, colour jitter, grey, blur, solarise, flip, normalise; in
float32 without Pillow's rounding to 8 bits after every stage. Every stage works on the whole batch, with one row of
parameters a sample and no indexing by sample, so that nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from caco.data import parameters as p
from caco.data.parameters import ViewParameters
from caco.views import Augmentation

# ITU-R 601-2 luma, which Pillow uses to make grey images.
LUMA = (0.299, 0.587, 0.114)


class Stages(NamedTuple):
    """What views need apart from crop and normalisation."""

    jitter: bool
    gray: bool
    radius: int
    """The blur's, in pixels; 0 for none."""
    solarize: bool

    @classmethod
    def of_augmentation(cls, augmentation: Augmentation) -> Stages:
        """Return what any view by an augmentation may need."""
        changes = augmentation.brightness, augmentation.contrast, augmentation.saturation, augmentation.hue
        return cls(
            jitter=augmentation.jitter_probability > 0 and any(changes),
            gray=augmentation.gray_probability > 0,
            radius=math.ceil(3 * augmentation.blur_sigma[1]) if augmentation.blur_probability > 0 else 0,
            solarize=augmentation.solarize_probability > 0,
        )

    @classmethod
    def of_batch(cls, parameters: ViewParameters) -> Stages:
        """Return what any of these views needs; known without asking the device: the parameters came from the host."""
        factors = (parameters.brightness, parameters.contrast, parameters.saturation)
        jitter = bool(parameters.hue.any()) or any((factor != 1).any() for factor in factors)
        radius = math.ceil(3 * parameters.sigma.max())
        return cls(jitter, bool(parameters.gray.any()), radius, bool(parameters.solarize.any()))


def render_with_torch(
    images: UInt8[Tensor, "B H W 3"] | list[NDArray[np.uint8]],
    parameters: ViewParameters,
    mean: Sequence[float],
    std: Sequence[float],
    out: Float[Tensor, "B 3 S S"],
) -> None:
    """Fill `out` with one view of each image, on the images' device (the CPU for arrays)."""
    rows, statistics = to_device(out.device, parameters, mean, std)
    size, stages = out.shape[-1], Stages.of_batch(parameters)
    if isinstance(images, Tensor):
        out.copy_(make_views(images, rows, statistics, size, stages))
        return
    with torch.no_grad(), torch.autocast(out.device.type, enabled=False):
        out.copy_(_finish(_crop_arrays(images, rows, size), rows, statistics, stages))


def copy_to(device: torch.device, host: Tensor) -> Tensor:
    """Return a copy of a tensor on the CPU on a device, without waiting for it."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def to_device(
    device: torch.device, parameters: ViewParameters, mean: Sequence[float], std: Sequence[float]
) -> tuple[Float[Tensor, "B columns"], Float[Tensor, "2 3 1 1"]]:
    """Return the parameters' table, and mean and standard deviation, on a device: everything in one copy."""
    packed = copy_to(
        device, torch.from_numpy(np.concatenate([parameters.table().ravel(), mean, std]).astype(np.float32))
    )
    return packed[:-6].view(-1, p.COLUMNS), packed[-6:].view(2, 3, 1, 1)


def make_views(
    images: UInt8[Tensor, "B H W 3"],
    rows: Float[Tensor, "B columns"],
    statistics: Float[Tensor, "2 3 1 1"],
    size: int,
    stages: Stages,
) -> Float[Tensor, "B 3 S S"]:
    """Return one view of each image, channels_last. All is on the device, and of a shape known beforehand: one graph."""
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        return finish_views(_crop_tensor(images, rows, size), rows, statistics, stages)


def finish_views(
    crops: Float[Tensor, "B 3 S S"],
    rows: Float[Tensor, "B columns"],
    statistics: Float[Tensor, "2 3 1 1"],
    stages: Stages,
) -> Float[Tensor, "B 3 S S"]:
    """Do to crops, pixels in 0-1, what comes after cropping; return channels_last. One graph, as `make_views`."""
    with torch.no_grad(), torch.autocast(crops.device.type, enabled=False):
        return _finish(crops, rows, statistics, stages).contiguous(memory_format=torch.channels_last)


def _finish(
    view: Float[Tensor, "B 3 S S"],
    rows: Float[Tensor, "B columns"],
    statistics: Float[Tensor, "2 3 1 1"],
    stages: Stages,
) -> Float[Tensor, "B 3 S S"]:
    """Do to the crops what comes after cropping; stages: those that any of them needs."""

    def column(number: int) -> Float[Tensor, "B 1 1 1"]:
        return rows[:, number, None, None, None]

    if stages.jitter:
        view = jitter(view, rows)
    if stages.gray:
        view = torch.where(column(p.GRAY) > 0, luma(view), view)
    if stages.radius:
        view = blur(view, rows[:, p.SIGMA], stages.radius)
    if stages.solarize:
        view = torch.where(column(p.SOLARIZE) > 0, solarize(view), view)
    normalised: Tensor = (view - statistics[0]) / statistics[1]
    return normalised


def _crop_tensor(
    images: UInt8[Tensor, "B H W 3"], rows: Float[Tensor, "B columns"], size: int
) -> Float[Tensor, "B 3 S S"]:
    """Crop, resize and flip, as two batched products with weights that are zero outside the crop."""
    batch, height, width, _ = images.shape
    down = resize_weights(rows[:, p.TOP], rows[:, p.HEIGHT], height, size)
    right = resize_weights(rows[:, p.LEFT], rows[:, p.WIDTH], width, size, rows[:, p.FLIP] > 0)
    lines = torch.bmm(down, images.flatten(2).float().div_(255)).view(batch, size, width, 3)
    return lines.permute(0, 3, 1, 2) @ right.mT[:, None]


def _crop_arrays(
    images: list[NDArray[np.uint8]], rows: Float[Tensor, "B columns"], size: int
) -> Float[Tensor, "B 3 S S"]:
    """The same for arrays of any sizes, one after the other; only the crop of an image is read."""
    views = []
    for image, row in zip(images, rows, strict=True):
        top, left, height, width = row[[p.TOP, p.LEFT, p.HEIGHT, p.WIDTH]].tolist()
        first_row, first_column = int(top), int(left)
        crop = torch.tensor(image[first_row : math.ceil(top + height), first_column : math.ceil(left + width)])[None]
        whole = row[None].clone()
        whole[:, p.TOP] -= first_row
        whole[:, p.LEFT] -= first_column
        views.append(_crop_tensor(crop, whole, size))
    return torch.cat(views)


def resize_weights(
    start: Float[Tensor, " B"], length: Float[Tensor, " B"], extent: int, size: int, flip: Tensor | None = None
) -> Float[Tensor, "B size extent"]:
    """Return the weights of antialiased bilinear resizing of the stretch [start, start + length) to size pixels.

    Like Pillow: a triangle as wide as two source pixels or two target pixels, whichever is more, cut at the crop's
    borders and normalised. A pixel of which the stretch covers a part counts as a whole one.
    """
    pixel = torch.arange(size, dtype=torch.float32, device=start.device).expand(len(start), size)
    if flip is not None:
        pixel = torch.where(flip[:, None], size - 1 - pixel, pixel)
    scale = length[:, None] / size
    centre = (pixel + 0.5) * scale
    source = torch.arange(extent, dtype=torch.float32, device=start.device) + 0.5 - start[:, None]
    inside = (source > -0.5) & (source < length[:, None] + 0.5)
    distance = (source[:, None, :] - centre[:, :, None]).abs() / scale.clamp(min=1)[:, :, None]
    weights = (1 - distance).clamp(min=0) * inside[:, None, :]
    return weights.div_(weights.sum(dim=2, keepdim=True))


def luma(view: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B 1 S S"]:
    """Return the grey image."""
    red, green, blue = view[:, 0:1], view[:, 1:2], view[:, 2:3]
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def jitter(view: Float[Tensor, "B 3 S S"], rows: Float[Tensor, "B columns"]) -> Float[Tensor, "B 3 S S"]:
    """Change brightness, contrast, saturation and hue, in each sample's own order.

    The first three are one operation, a blend with black, the mean grey or the grey image; pixels are in 0-1.
    """
    for stage in range(4):
        operation = rows[:, p.ORDER + stage, None, None, None]
        is_contrast, is_saturation = operation == p.CONTRAST, operation == p.SATURATION
        factor = torch.where(
            is_contrast,
            rows[:, p.CONTRAST_FACTOR, None, None, None],
            torch.where(
                is_saturation,
                rows[:, p.SATURATION_FACTOR, None, None, None],
                rows[:, p.BRIGHTNESS_FACTOR, None, None, None],
            ),
        )
        gray = luma(view)
        partner = torch.where(is_contrast, gray.mean(dim=(2, 3), keepdim=True), gray * is_saturation)
        blended = (factor * view + (1 - factor) * partner).clamp(0, 1)
        turned = shift_hue(view, rows[:, p.HUE_SHIFT, None, None])
        view = torch.where(operation == p.HUE, turned, blended)
    return view


def shift_hue(view: Float[Tensor, "B 3 S S"], turns: Float[Tensor, "B 1 1"]) -> Float[Tensor, "B 3 S S"]:
    """Turn the hue of HSV, keeping saturation and value.

    Value and chroma (largest and largest minus smallest channel) stay, so only the place on the hexagon of hues moves.
    It is kept in units of the chroma: no division, and grey pixels need no case of their own.
    """
    red, green, blue = view.unbind(dim=1)
    value = view.amax(dim=1)
    chroma = value - view.amin(dim=1)
    sixth = torch.where(
        value == red, green - blue, torch.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    )
    sixth = sixth + 6 * turns * chroma
    sixth = torch.where(sixth < 0, sixth + 6 * chroma, sixth)
    sixth = torch.where(sixth >= 6 * chroma, sixth - 6 * chroma, sixth)
    base, zero = value - chroma, torch.zeros_like(chroma)

    def channel(distance: Tensor) -> Tensor:
        return base + distance.clamp(min=zero, max=chroma)

    return torch.stack(
        [
            channel((sixth - 3 * chroma).abs() - chroma),
            channel(2 * chroma - (sixth - 2 * chroma).abs()),
            channel(2 * chroma - (sixth - 4 * chroma).abs()),
        ],
        dim=1,
    )


def blur(view: Float[Tensor, "B 3 S S"], sigma: Float[Tensor, " B"], radius: int) -> Float[Tensor, "B 3 S S"]:
    """Blur with a Gaussian of each sample's sigma, cut at ceil(3 sigma); edge pixels are repeated outwards.

    As two products with a band matrix a sample, which is one batched call each. radius: the largest of the batch.
    """
    size = view.shape[-1]
    offset = torch.arange(-radius, radius + 1, device=view.device)
    near = offset.abs() <= torch.ceil(3 * sigma)[:, None]
    wide = sigma.clamp(min=1e-6)[:, None]
    weights = torch.exp(-0.5 * (offset / wide) ** 2) * near
    weights = weights / weights.sum(dim=1, keepdim=True)
    pixel = torch.arange(size, device=view.device)
    source = (pixel[None, :] + offset[:, None]).clamp(0, size - 1)
    taken = (source[:, :, None] == pixel).to(view.dtype)
    matrix = (weights @ taken.flatten(1)).view(-1, 1, size, size)
    return matrix @ view @ matrix.mT


def solarize(view: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B 3 S S"]:
    """Invert what Pillow would round to 128 or more; at 127.5 inverting changes nothing, so it is a minimum."""
    return torch.minimum(view, 1 - view)
