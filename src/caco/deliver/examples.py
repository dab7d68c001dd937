"""Some images with the random views that training makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from caco.config import Pretrain
from caco.data.augment import ViewParameters, draw_parameters, render_views
from caco.data.decode import BrokenImage, Pixels
from caco.data.source import ImageSource
from caco.deliver.insight import sample
from caco.views import Augmentation


@dataclass(frozen=True, eq=False)
class ExampleViews:
    """One image, uint8 [H, W, 3], and its random views in the first epoch."""

    key: str
    image: Pixels
    views: list[Pixels]
    boxes: list[tuple[int, int, int, int]]
    """Left, top, width, height of each view's crop, in pixels of the image."""
    changes: list[str]
    """What else was done for each view, in words."""


def example_views(source: ImageSource, config: Pretrain, count: int) -> list[ExampleViews]:
    """Return `count` images, a sample, with the views that the first epoch draws. Broken: left out."""
    examples = []
    for index in sample(len(source), count):
        try:
            image = source.load(int(index))
        except BrokenImage:
            continue
        height, width = image.shape[:2]
        example = ExampleViews(source.key(int(index)), image, [], [], [])
        for number, augmentation in enumerate(config.views.augmentations()):
            drawn = draw_parameters(
                augmentation, [height], [width], seed=config.seed, epoch=0, indices=[int(index)], view=number
            )
            view = render_views([image], drawn, augmentation, config.views.mean, config.views.std)[0]
            example.views.append(_as_pixels(view, config))
            example.boxes.append((int(drawn.left[0]), int(drawn.top[0]), int(drawn.width[0]), int(drawn.height[0])))
            example.changes.append(_in_words(drawn, augmentation, height * width))
        examples.append(example)
    return examples


def _as_pixels(view: Float[Tensor, "3 S S"], config: Pretrain) -> Pixels:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.views.mean, config.views.std))
    pixels = ((view * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(1, 2, 0).contiguous().numpy()


def _in_words(drawn: ViewParameters, augmentation: Augmentation, area: int) -> str:
    jittered = any(
        float(values[0]) != neutral
        for values, neutral in ((drawn.brightness, 1), (drawn.contrast, 1), (drawn.saturation, 1), (drawn.hue, 0))
    )
    words = [f"{100 * int(drawn.height[0]) * int(drawn.width[0]) / area:.0f} % of the image"]
    words += ["flipped"] if drawn.flip[0] else []
    words += ["colour jitter"] if jittered else []
    words += ["grey"] if drawn.gray[0] else []
    words += [f"blur of {float(drawn.sigma[0]):.1f} px"] if drawn.sigma[0] > 0 else []
    words += ["solarised"] if drawn.solarize[0] else []
    return f"{augmentation.size} px: " + ", ".join(words)
