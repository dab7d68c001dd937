"""The views on a GPU by one compiled graph for each augmentation, in place of some sixty kernels one after the other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import FunctionType

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from caco.data.parameters import ViewParameters
from caco.data.render import Stages, make_views, to_device
from caco.views import Augmentation


class DeviceViews:
    """Makes the views of one augmentation on a device, by a compiled graph.

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

            def compiled_views(images: Tensor, rows: Tensor, statistics: Tensor, size: int, stages: Stages) -> Tensor:
                return _graph(images.shape, size, stages, backend)(images, rows, statistics, size, stages)

            self._compiled = compiled_views

    def __call__(self, images: UInt8[Tensor, "B H W 3"], parameters: ViewParameters) -> Float[Tensor, "B 3 S S"]:
        """Return one view of each image, float32 [B, 3, S, S], channels_last; nothing waits for the device.

        parameters: of this augmentation. The first call compiles, which takes some seconds.
        """
        rows, statistics = to_device(images.device, parameters, self.mean, self.std)
        work = images, rows, statistics, self.augmentation.size, self.stages
        if self._compiled is not None:
            try:
                views = self._compiled(*work)
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
        return make_views(*work)


@lru_cache(maxsize=64)
def _graph(shape: torch.Size, size: int, stages: Stages, backend: str) -> Callable[..., Tensor]:
    """Return `make_views` compiled for images of one shape: a function of its own, as torch keeps only so many graphs of one."""
    code, closure = make_views.__code__.replace(), make_views.__closure__
    own = FunctionType(code, make_views.__globals__, closure=closure)
    return torch.compile(own, backend=backend, dynamic=False, fullgraph=True)
