"""Views per second of one core: the two published views, at 32 px (of 32 px images), at 224 px (of 500 x 375 arrays).

    python benchmarks/augment.py [--quick] [--out FILE.json]

Contestants: our kernel (numba), our plain torch, torchvision's transforms on Pillow images, and its v2 transforms on
uint8 tensors. All start from decoded pixels in memory and end at normalised float32. Rates are of the processor time of
one thread, the median over rounds in which the contestants take turns, so that a busy machine disturbs all alike;
drawing the parameters is included. The first, compiling call is not counted (its time is reported).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms
from torchvision.transforms import v2

from caco.config import IMAGENET_MEAN, IMAGENET_STD, ViewRecipe, Views
from caco.data.augment import draw_parameters, render_views

torch.set_num_threads(1)
OURS, PEER = "caco numba", "torchvision Pillow"


def photos(count: int, height: int, width: int) -> list[NDArray[np.uint8]]:
    """Smooth colours with grain: what Pillow and the kernel do does not depend on the picture."""
    random = np.random.default_rng(0)
    images = []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), 3)
        grain = random.normal(0, 6, (height, width, 3))
        images.append(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8))
    return images


def caco(engine: str, images: list[NDArray[np.uint8]], recipes: tuple[ViewRecipe, ...]) -> Callable[[int], None]:
    same = len({image.shape for image in images}) == 1 and images[0].shape[0] <= 64
    batch = torch.from_numpy(np.stack(images)) if same else images
    heights, widths = np.array([image.shape[:2] for image in images]).T
    indices = np.arange(len(images))

    def run(epoch: int) -> None:
        for view, recipe in enumerate(recipes):
            parameters = draw_parameters(recipe, heights, widths, seed=0, epoch=epoch, indices=indices, view=view)
            render_views(batch, parameters, recipe, IMAGENET_MEAN, IMAGENET_STD, engine=engine)

    return run


def torchvision_on_pillow(images: list[NDArray[np.uint8]], recipes: tuple[ViewRecipe, ...]) -> Callable[[int], None]:
    def pipeline(recipe: ViewRecipe) -> transforms.Compose:
        colours = (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)

        def blur(image: Image.Image) -> Image.Image:
            return image.filter(ImageFilter.GaussianBlur(float(np.random.uniform(*recipe.blur_sigma))))

        return transforms.Compose(
            [
                transforms.RandomResizedCrop(recipe.size, scale=recipe.area),
                transforms.RandomApply([transforms.ColorJitter(*colours)], recipe.jitter_probability),
                transforms.RandomGrayscale(recipe.gray_probability),
                transforms.RandomApply([blur], recipe.blur_probability),
                transforms.RandomApply([lambda image: ImageOps.solarize(image, 128)], recipe.solarize_probability),
                transforms.RandomHorizontalFlip(recipe.flip_probability),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    pipelines = [pipeline(recipe) for recipe in recipes]
    pictures = [Image.fromarray(image) for image in images]

    def run(epoch: int) -> None:
        for view in pipelines:
            torch.stack([view(picture) for picture in pictures])

    return run


def torchvision_on_tensors(images: list[NDArray[np.uint8]], recipes: tuple[ViewRecipe, ...]) -> Callable[[int], None]:
    def pipeline(recipe: ViewRecipe) -> v2.Compose:
        colours = (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
        return v2.Compose(
            [
                v2.RandomResizedCrop(recipe.size, scale=recipe.area, antialias=True),
                v2.RandomApply([v2.ColorJitter(*colours)], recipe.jitter_probability),
                v2.RandomGrayscale(recipe.gray_probability),
                v2.RandomApply([v2.GaussianBlur(13, recipe.blur_sigma)], recipe.blur_probability),
                v2.RandomSolarize(128, recipe.solarize_probability),
                v2.RandomHorizontalFlip(recipe.flip_probability),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    pipelines = [pipeline(recipe) for recipe in recipes]
    tensors = [torch.from_numpy(image).permute(2, 0, 1).contiguous() for image in images]

    def run(epoch: int) -> None:
        for view in pipelines:
            torch.stack([view(tensor) for tensor in tensors])

    return run


def measure(size: int, shape: tuple[int, int], count: int, slow: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return views per second of each contestant, on `count` images (`slow` of them for those that take long)."""
    recipes = Views(size=size).recipes()
    images = photos(count, *shape)
    contestants: dict[str, tuple[int, Callable[[int], None]]] = {
        OURS: (count, caco("numba", images, recipes)),
        "caco torch": (slow, caco("torch", images[:slow], recipes)),
        PEER: (slow, torchvision_on_pillow(images[:slow], recipes)),
        "torchvision v2 tensors": (slow, torchvision_on_tensors(images[:slow], recipes)),
    }
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, (number, run) in contestants.items():
            start = time.thread_time()
            run(turn)
            if turn:  # the first is a warm-up
                rates[name].append(len(recipes) * number / (time.thread_time() - start))
    peer = float(np.median(rates[PEER]))
    return {
        name: {
            "views_per_second": float(np.median(values)),
            "least": min(values),
            "most": max(values),
            "times_pillow": float(np.median(values)) / peer,
        }
        for name, values in rates.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    parser.add_argument("--quick", action="store_true", help="few images and rounds: does it work? (some 15 s)")
    options = parser.parse_args()

    start = time.perf_counter()
    import caco.data.kernel  # noqa: F401  (compiles, or loads what was compiled before)

    result: dict[str, object] = {
        "kernel_ready_seconds": time.perf_counter() - start,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
    }
    rounds = 3 if options.quick else 15
    cases = {
        "32 px": (32, (32, 32), 256, 16 if options.quick else 64),
        "224 px from 500x375": (224, (375, 500), 8 if options.quick else 32, 2 if options.quick else 8),
    }
    for title, (size, shape, count, slow) in cases.items():
        result[title] = rates = measure(size, shape, count, slow, rounds)
        print(f"\n{title}: views/s of one core (least - most)")
        for name, row in rates.items():
            spread = f"({row['least']:,.0f} - {row['most']:,.0f})"
            print(f"  {name:24s}{row['views_per_second']:12,.0f}  {spread:22s}{row['times_pillow']:6.1f} x Pillow")
    if options.out:
        options.out.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
