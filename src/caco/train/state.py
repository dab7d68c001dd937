"""Everything that changes while a run goes on, and nothing else: what a checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from caco.errors import UsageError
from caco.model import CaCo
from caco.train.meters import Meters


@dataclass
class TrainingState:
    """Networks, bank, both optimizers, meters, and the position in the schedule."""

    model: CaCo
    optimizer: Optimizer
    """Of the encoder."""
    bank_optimizer: Optimizer
    """Of the bank; its momentum buffer is the published bank velocity."""
    meters: Meters
    warm_start_step: int = 0
    """Warm-start steps taken."""
    step: int = 0
    """Training steps taken; with the seed it says which images come next and how they look."""
    best_knn: float = -1.0
    """Best kNN accuracy so far; -1: none yet."""

    def state_dict(self) -> dict[str, Any]:
        """Return all of it, the random state of torch included, as tensors and plain containers."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "bank_optimizer": self.bank_optimizer.state_dict(),
            "meters": self.meters.state_dict(),
            "warm_start_step": self.warm_start_step,
            "step": self.step,
            "best_knn": self.best_knn,
            "random": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            state["random_cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned. Raises UsageError when it is of another model."""
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.bank_optimizer.load_state_dict(state["bank_optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UsageError(f"the checkpoint does not fit this run: {str(error).splitlines()[0]}") from error
        self.meters.load_state_dict(state["meters"])
        self.warm_start_step, self.step = state["warm_start_step"], state["step"]
        self.best_knn = state["best_knn"]
        torch.set_rng_state(state["random"])
        if torch.cuda.is_available() and "random_cuda" in state:
            torch.cuda.set_rng_state(state["random_cuda"])
