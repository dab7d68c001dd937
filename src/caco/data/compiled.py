"""The views on a GPU in one go, in place of some sixty kernels of plain torch one after the other.

Of small images by a kernel of our own (`view_kernel.py`), of others by a compiled graph for each augmentation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import FunctionType

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from caco.data.parameters import ViewParameters, draw_parameters
from caco.data.render import Stages, finish_views, make_views, to_device
from caco.own_kernels import suits_kernels, works
from caco.views import Augmentation


class DeviceViews:
    """Makes the views of one augmentation on a device, by the kernel or a compiled graph.

    By plain torch if asked to, where compiling fails, and while it goes on.
    """

    def __init__(
        self,
        augmentation: Augmentation,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        compiled: bool,
        backend: str = "inductor",
    ) -> None:
        """backend: torch.compile's."""
        self.augmentation, self.mean, self.std = augmentation, mean, std
        self.stages = Stages.of_augmentation(augmentation)  # the graph is the same for all its batches
        self._compiled: Callable[..., Tensor] | None = None
        self._has_worked = False
        if compiled:

            def compiled_views(function: Callable[..., Tensor], first: Tensor, *work: object) -> Tensor:
                constants = tuple(one for one in work if not isinstance(one, Tensor))
                return _graph(function, first.shape, constants, backend)(first, *work)

            self._compiled = compiled_views

    def __call__(self, images: UInt8[Tensor, "B H W 3"], parameters: ViewParameters) -> Float[Tensor, "B 3 S S"]:
        """Return one view of each image, float32 [B, 3, S, S], channels_last; nothing waits for the device.

        parameters: of this augmentation. The first call compiles, which takes some seconds (a graph: half a minute).
        """
        rows, statistics = to_device(images.device, parameters, self.mean, self.std)
        if self._compiled is not None and _has_kernel(images.device, *images.shape[1:3], self.augmentation):
            from caco.data.view_kernel import small_views

            return small_views(images, rows, statistics, self.augmentation.size)
        return self._as_graph(make_views, images, rows, statistics, self.augmentation.size, self.stages)

    def of_crops(
        self, crops: Float[Tensor, "B 3 S S"], rows: Float[Tensor, "B columns"], statistics: Float[Tensor, "2 3 1 1"]
    ) -> Float[Tensor, "B 3 S S"]:
        """Return the views of what is cropped, as `__call__` does of images; rows, statistics: as `to_device` gives them."""
        return self._as_graph(finish_views, crops, rows, statistics, self.stages)

    def _as_graph(self, function: Callable[..., Tensor], *work: object) -> Tensor:
        """Return function(*work), compiled where it may be."""
        if self._compiled is not None:
            try:
                views = self._compiled(function, *work)
                self._has_worked = True
                return views
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as problem:  # no compiler, no Triton, a GPU too old: as many kinds as there are reasons
                if not self._has_worked:
                    self._compiled = None
                    reason = f"{type(problem).__name__}: {problem}".splitlines()[0]
                    logging.getLogger(__name__).warning("the views are not compiled, which is slower: %s", reason)
                # Else: torch (up to 2.11) refuses every compiled call while another thread compiles, as the first step does.
        return function(*work)


SMALL = 64
"""Side of the largest image and view that the kernel makes, pixels."""
LARGEST_DIFFERENCE = 1e-3
"""Of a pixel in 0-1, by rounding in float32."""


@lru_cache
def _has_kernel(device: torch.device, height: int, width: int, augmentation: Augmentation) -> bool:
    """Return whether the kernel makes such views of such images here; where it should and does not, it is told.

    Waits for the device.
    """

    def problem() -> str:
        from caco.data.view_kernel import small_views

        images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (64, height, width, 3), np.uint8)).to(
            device
        )
        drawn = draw_parameters(augmentation, height, width, seed=0, epoch=0, indices=np.arange(64), view=0)
        work = images, *to_device(device, drawn, (0.0,) * 3, (1.0,) * 3), augmentation.size
        plain = make_views(*work, Stages.of_augmentation(augmentation))
        furthest = float((small_views(*work) - plain).abs().max())
        return "" if furthest < LARGEST_DIFFERENCE else f"they deviate by {furthest:.2g} from those of plain torch"

    is_small = max(height, width, augmentation.size) <= SMALL and suits_kernels(device)
    return is_small and works("views by the kernel of our own", problem)


@lru_cache(maxsize=64)
def _graph(
    function: FunctionType, shape: torch.Size, constants: tuple[object, ...], backend: str
) -> Callable[..., Tensor]:
    """Return a function compiled for images of one shape: a copy of its own, as torch keeps only so many graphs of one."""
    own = FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__)
    return torch.compile(own, backend=backend, dynamic=False, fullgraph=True)
