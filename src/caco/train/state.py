"""Everything that changes while a run goes on, and nothing else: what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from caco.distributed.world import World
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
    knn_is_owed: bool = False
    """Whether the kNN check of the epoch that has just ended is still to be done."""

    def state_dict(self, world: World) -> dict[str, Any]:
        """Return all of it, the random states of torch included, as tensors and plain containers.

        The same in every process: what differs between them (sums, random states) is brought together.
        """
        return {
            "model": _bank_rows(self.model.state_dict(), "bank.weight", self.model.bank.all_rows),
            "optimizer": self.optimizer.state_dict(),
            "bank_optimizer": _velocity(self.bank_optimizer.state_dict(), self.model.bank.all_rows),
            "meters": self.meters.state_dict(world),
            "warm_start_step": self.warm_start_step,
            "step": self.step,
            "best_knn": self.best_knn,
            "knn_is_owed": self.knn_is_owed,
            "random": world.gather_objects(random_state(world.device)),
        }

    def is_finite(self) -> bool:
        """Return whether all weights and batch-norm statistics of this process are finite. Waits for the device."""
        norms = [module for module in self.model.modules() if isinstance(module, _NormBase)]
        statistics = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
        tensors = [t for t in (*self.model.parameters(), *statistics) if t.is_floating_point() and t.numel()]
        # By the least and the largest number: without a copy as large as the bank.
        ends = [end.detach() for tensor in tensors for end in torch.aminmax(tensor)]
        return bool(torch.isfinite(torch.stack(ends)).all())

    def load_state_dict(self, state: dict[str, Any], world: World) -> None:
        """Take over what `state_dict` returned, in all processes; the bank's rows are the main one's where each holds a part.

        Raises UsageError when it is of another model.
        """
        bank = self.model.bank
        try:
            self.model.load_state_dict(_bank_rows(state["model"], "bank.weight", bank.rows_from_main))
            self.optimizer.load_state_dict(state["optimizer"])
            own = [group["fused"] for group in self.bank_optimizer.param_groups]  # what suits this device
            self.bank_optimizer.load_state_dict(_velocity(state["bank_optimizer"], bank.rows_from_main))
            for group, fused in zip(self.bank_optimizer.param_groups, own, strict=True):
                group["fused"] = fused
        except (RuntimeError, ValueError, KeyError) as error:
            raise UsageError(f"the checkpoint does not fit this run: {str(error).splitlines()[0]}") from error
        self.meters.load_state_dict(state["meters"], world)
        self.warm_start_step, self.step = state["warm_start_step"], state["step"]
        self.best_knn, self.knn_is_owed = state["best_knn"], state.get("knn_is_owed", False)
        if len(state["random"]) == world.size:  # else: another number of processes, whose random states start anew
            set_random_state(state["random"][world.rank], world.device)


def without_bank(state: dict[str, Any]) -> dict[str, Any]:
    """Return what `TrainingState.state_dict` returned, without a row of the bank and its velocity."""

    def none_of(rows: Tensor) -> Tensor:
        return rows[:0].clone()  # a part of a tensor is pickled with the whole

    model = _bank_rows(state["model"], "bank.weight", none_of)
    return {**state, "model": model, "bank_optimizer": _velocity(state["bank_optimizer"], none_of)}


def _bank_rows(state: dict[str, Any], name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Return a state dict with the bank's rows made whole, or cut to this process's part."""
    return {**state, name: change(state[name])} if name in state else state


def _velocity(state: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Return the bank optimizer's state dict, its velocity made whole, or cut to this process's part."""
    return {**state, "state": {key: _bank_rows(one, "momentum_buffer", change) for key, one in state["state"].items()}}


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return torch's random state on the CPU and on a GPU in use (dropped paths and the like draw from it)."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Take over what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
