"""The contestants of `data.py` that make views of decoded pictures: caco, torchvision and kornia. Not a benchmark itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms
from torchvision.transforms import v2

from caco.data.augment import Renderer, draw_parameters
from caco.data.compiled import DeviceViews
from caco.views import IMAGENET_MEAN, IMAGENET_STD, Augmentation

Augmentations = tuple[Augmentation, ...]
Pictures = Sequence[NDArray[np.uint8]]
Run = Callable[[int], object]
"""Makes one view by each augmentation of every picture; its argument is the epoch, which changes what is drawn."""


def caco_views(renderer: Renderer, images: Pictures, augmentations: Augmentations) -> Run:
    small = len({image.shape for image in images}) == 1 and images[0].shape[0] <= 64
    batch = torch.from_numpy(np.stack(images)) if small else list(images)
    heights, widths = np.array([image.shape[:2] for image in images]).T
    indices = np.arange(len(images))

    def run(epoch: int) -> None:
        for view, augmentation in enumerate(augmentations):
            parameters = draw_parameters(augmentation, heights, widths, seed=0, epoch=epoch, indices=indices, view=view)
            out = torch.empty(len(images), 3, augmentation.size, augmentation.size, memory_format=torch.channels_last)
            renderer(batch, parameters, IMAGENET_MEAN, IMAGENET_STD, out)

    return run


def caco_on_gpu(images: Pictures, augmentations: Augmentations) -> Run:
    batch = torch.from_numpy(np.stack(images)).cuda()
    height, width = images[0].shape[:2]
    renders = [DeviceViews(augmentation, IMAGENET_MEAN, IMAGENET_STD, compiled=True) for augmentation in augmentations]

    def run(epoch: int) -> None:
        for view, (augmentation, render) in enumerate(zip(augmentations, renders, strict=True)):
            indices = np.arange(len(images))
            render(batch, draw_parameters(augmentation, height, width, seed=0, epoch=epoch, indices=indices, view=view))

    return run


def pillow_view(augmentation: Augmentation) -> transforms.Compose:
    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(float(np.random.uniform(*augmentation.blur_sigma))))

    colours = (augmentation.brightness, augmentation.contrast, augmentation.saturation, augmentation.hue)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(augmentation.size, scale=augmentation.area),
            transforms.RandomApply([transforms.ColorJitter(*colours)], augmentation.jitter_probability),
            transforms.RandomGrayscale(augmentation.gray_probability),
            transforms.RandomApply([blur], augmentation.blur_probability),
            transforms.RandomApply([lambda image: ImageOps.solarize(image, 128)], augmentation.solarize_probability),
            transforms.RandomHorizontalFlip(augmentation.flip_probability),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def tensor_view(augmentation: Augmentation) -> v2.Compose:
    colours = (augmentation.brightness, augmentation.contrast, augmentation.saturation, augmentation.hue)
    return v2.Compose(
        [
            v2.RandomResizedCrop(augmentation.size, scale=augmentation.area, antialias=True),
            v2.RandomApply([v2.ColorJitter(*colours)], augmentation.jitter_probability),
            v2.RandomGrayscale(augmentation.gray_probability),
            v2.RandomApply([v2.GaussianBlur(13, augmentation.blur_sigma)], augmentation.blur_probability),
            v2.RandomSolarize(128, augmentation.solarize_probability),
            v2.RandomHorizontalFlip(augmentation.flip_probability),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def one_by_one(
    build: Callable[[Augmentation], Callable[..., torch.Tensor]], pictures: list[object], augmentations: Augmentations
) -> Run:
    pipelines = [build(augmentation) for augmentation in augmentations]

    def run(epoch: int) -> None:
        for view in pipelines:
            torch.stack([view(picture) for picture in pictures])

    return run


def kornia_views(images: Pictures, augmentations: Augmentations, device: str) -> Run:
    from kornia import augmentation as k

    def pipeline(augmentation: Augmentation) -> torch.nn.Module:
        colours = (augmentation.brightness, augmentation.contrast, augmentation.saturation, augmentation.hue)
        return k.AugmentationSequential(
            k.RandomResizedCrop((augmentation.size, augmentation.size), scale=augmentation.area),
            k.ColorJitter(*colours, p=augmentation.jitter_probability),
            k.RandomGrayscale(p=augmentation.gray_probability),
            k.RandomGaussianBlur((13, 13), augmentation.blur_sigma, p=augmentation.blur_probability),
            k.RandomSolarize(0.0, 0.0, p=augmentation.solarize_probability),
            k.RandomHorizontalFlip(p=augmentation.flip_probability),
            k.Normalize(torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)),
        )

    pipelines = [pipeline(augmentation) for augmentation in augmentations]
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().to(device)

    def run(epoch: int) -> None:
        for view in pipelines:
            view(batch.float() / 255)

    return run
