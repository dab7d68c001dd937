"""Views by a renderer of the test's choice; `render_views` chooses by itself."""

import torch
from torch import Tensor

from caco.data.augment import Images, Renderer, ViewParameters, render_with_numba, render_with_torch
from caco.views import Augmentation

RENDERERS = (render_with_torch, render_with_numba)


def render_by(
    renderer: Renderer,
    images: Images,
    parameters: ViewParameters,
    augmentation: Augmentation,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Tensor:
    """Return one view of each image, float32 [B, 3, S, S], on the CPU."""
    out = torch.empty(len(images), 3, augmentation.size, augmentation.size, memory_format=torch.channels_last)
    renderer(images, parameters, mean, std, out)
    return out
