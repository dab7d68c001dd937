"""From a source to batches of views on the device, ahead of the training step.

Which images are in a step (`order.py`), and how their views look (`makers.py`), is a pure function of (seed, epoch, step):
nothing of it has to be saved for a resume, and it is the same for any number of threads or processes. Who makes the views:

    maker         the images are                                  decoded               rendered by
    FromSource    where the source has them, of any size          in every step         threads of the CPU
    FromFiles     there, encoded                                   in every step         the GPU (`file_maker.py`)
    FromMemory    in main memory: a small set of one size         before the first      threads of the CPU
    FromDevice    on the GPU: such a set, where there is a GPU    before the first      the GPU, on a stream of its own
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeGuard

import numpy as np
import torch

from caco.data.broken import BrokenImages
from caco.data.encoded import EncodedSource
from caco.data.file_maker import FromFiles, suits_files
from caco.data.makers import FromDevice, FromMemory, FromSource, RandomViews, ViewMaker
from caco.data.nvjpeg import can_decode
from caco.data.order import StepOrder
from caco.data.prefetch import Batch, prefetch, side_stream
from caco.data.resident import decode_whole_set
from caco.data.source import ImageSource
from caco.errors import UsageError, counted
from caco.views import Augmentation


def check_batch_size(source: ImageSource, batch_size: int, world_size: int) -> None:
    """Raise UsageError when a batch is more than all images, or cannot be divided among the processes."""
    if batch_size % world_size:
        raise UsageError(f"--batch-size {batch_size} cannot be divided among {world_size} processes")
    if len(source) >= batch_size:
        return
    found = f"--data {source.name} has {counted(len(source), 'image')}"
    largest = len(source) // world_size * world_size
    if largest < 2:
        raise UsageError(f"{found}, too few to train on: a batch needs at least {max(world_size, 2)}")
    raise UsageError(f"{found}, fewer than one batch; use --batch-size {largest} or less")


class TrainingViews:
    """Batches of random views of a source's images."""

    def __init__(
        self,
        source: ImageSource,
        order: StepOrder,
        maker: ViewMaker,
        workers: int,
        device: torch.device,
        layout: torch.memory_format,
    ) -> None:
        """maker: of views on the device. layout: in which they are handed on."""
        self.source, self.order, self.maker, self.device, self.layout = source, order, maker, device, layout
        self._workers, self._stream = workers, side_stream(device)

    @classmethod
    def create(
        cls,
        source: ImageSource,
        augmentations: Sequence[Augmentation],
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        *,
        batch_size: int,
        seed: int,
        workers: int,
        device: torch.device,
        broken: BrokenImages,
        rank: int = 0,
        world_size: int = 1,
        local_size: int = 1,
        layout: torch.memory_format = torch.channels_last,
        hold: bool = True,
    ) -> TrainingViews:
        """Choose the maker, which may decode the whole set.

        batch_size: over all processes; this one makes the rank-th of world_size equal parts. local_size: processes that
        share this machine's main memory. layout: of the views. hold: decode a set that fits into memory before the first step;
        without, it is not looked at whether it fits, if a GPU can decode it in every step. Raises UsageError.
        """
        check_batch_size(source, batch_size, world_size)
        order = StepOrder(len(source), batch_size, seed, rank, world_size)
        views = RandomViews(tuple(augmentations), mean, std, seed)
        may_hold = hold or not _is_for_gpu(source, device)
        held = decode_whole_set(source, broken, workers, device, local_size) if may_hold else None
        maker: ViewMaker
        if held is None:
            maker = FromSource(source, views, broken, device)
        elif device.type == "cpu":
            maker = FromMemory(held, views)
        else:
            maker = FromDevice(held.to(device), views)
            # Here and not in the thread that makes batches, because torch compiles in one thread at a time.
            maker.make(np.arange(order.share), epoch=0)
        return cls(source, order, maker, workers, device, layout)

    @property
    def has_files_for_gpu(self) -> bool:
        """Whether a GPU trains on encoded images that are decoded in every step, so that it might do that itself."""
        return isinstance(self.maker, FromSource) and _is_for_gpu(self.source, self.device)

    def gpu_maker(self) -> FromFiles | None:
        """Return what makes the views by the GPU; None where it cannot, or where too many images are other than it decodes."""
        source, maker = self.source, self.maker
        if not (isinstance(maker, FromSource) and _is_for_gpu(source, self.device)):
            return None
        if not (suits_files(source) and can_decode(self.device)):
            return None
        return FromFiles(source, maker.views, maker.broken, self.device, compiled=True)

    def use(self, maker: ViewMaker) -> None:
        """Let another maker make the views from now on: first some here, as torch compiles in one thread at a time."""
        self.seconds(maker, batches=1)
        self.maker = maker

    def seconds(self, maker: ViewMaker, first_step: int = 0, batches: int = 2) -> float:
        """Return the seconds in which a maker makes the views of a batch, after one to begin with.

        first_step: of the first epoch; where two makers are compared, neither may have images that the other has read before.
        """
        steps = self.order.epochs_and_indices(0, range(first_step, first_step + batches + 1))
        with ThreadPoolExecutor(self._workers, thread_name_prefix="views") as pool:

            def make() -> float:
                epoch, indices = next(steps)
                maker(indices, epoch, pool)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                return time.perf_counter()

            began = make()
            return ([make() for _ in range(batches)][-1] - began) / batches

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def batches(self, epoch: int, first_step: int = 0, last_step: int | None = None) -> Generator[Batch, None, None]:
        """Yield the batches of steps first_step … last_step − 1, counted from the start of an epoch.

        None: to its end. Later steps belong to the epochs that follow. Two batches are prepared ahead in the background,
        those of the next epoch, too, so that none has to be waited for when it begins.
        """
        steps = range(first_step, self.steps_per_epoch if last_step is None else last_step)
        with ThreadPoolExecutor(self._workers, thread_name_prefix="views") as pool:
            batches = (
                self._batch(indices, epoch_of_step, pool)
                for epoch_of_step, indices in self.order.epochs_and_indices(epoch, steps)
            )
            yield from prefetch(batches, self.device, self._stream)

    def _batch(self, indices: np.ndarray, epoch: int, pool: ThreadPoolExecutor) -> Batch:
        views = self.maker(indices, epoch, pool)
        return Batch(indices, [view.contiguous(memory_format=self.layout) for view in views])


def _is_for_gpu(source: ImageSource, device: torch.device) -> TypeGuard[EncodedSource]:
    """Return whether these are encoded images for a GPU, which might decode them."""
    return isinstance(source, EncodedSource) and device.type == "cuda"
