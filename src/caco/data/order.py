"""Which images are in which step: a pure function of the seed and the step, so nothing of it is saved for a resume."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order in which an epoch visits its images: int64 [count], a permutation keyed by (seed, epoch)."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


@dataclass(frozen=True)
class StepOrder:
    """The images of each step, of which this process takes the rank-th of world_size equal parts."""

    count: int
    """Of all images."""
    batch_size: int
    """Over all processes; what is left at the end of an epoch is less than a batch, and left out."""
    seed: int
    rank: int = 0
    world_size: int = 1

    @property
    def steps_per_epoch(self) -> int:
        return self.count // self.batch_size

    @property
    def share(self) -> int:
        """Images of a batch that one process takes."""
        return self.batch_size // self.world_size

    def epochs_and_indices(self, epoch: int, steps: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield each step's epoch and this process's images, int64 [share]; steps are counted from the start of `epoch`."""
        order, ordered_epoch = np.empty(0, dtype=np.int64), None
        for step in steps:
            epochs_later, step_of_epoch = divmod(step, self.steps_per_epoch)
            if epoch + epochs_later != ordered_epoch:
                ordered_epoch = epoch + epochs_later
                order = epoch_order(self.count, self.seed, ordered_epoch)
            first = step_of_epoch * self.batch_size + self.rank * self.share
            yield ordered_epoch, order[first : first + self.share]
