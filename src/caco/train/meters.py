"""What a run measures, kept on the device: nothing here waits for it until a record is due."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from caco.distributed.world import World
from caco.evaluate.health import ChoiceWindow, Usage
from caco.model import StepOutput


@dataclass(frozen=True)
class Measured:
    """Means over the steps since the last record."""

    loss: float
    positive_probability: float
    hit_rate: float
    feature_spread: float
    slots_used: int
    """Distinct slots chosen as a positive since the last record."""
    first_bad_step: int | None
    """The first step whose loss was not finite, if there was one."""


class Meters:
    """Sums over steps, and how often each slot was chosen: since the last record, and in this epoch."""

    NEVER = 2**62

    def __init__(self, bank_size: int, device: torch.device) -> None:
        exact = torch.float32 if device.type == "mps" else torch.float64  # which an Apple GPU does not have
        self.sums = torch.zeros(4, dtype=exact, device=device)
        self.steps = 0
        self.recent_choices = ChoiceWindow(bank_size, device)
        self.epoch_choices = ChoiceWindow(bank_size, device)
        self.first_bad_step = torch.full((), self.NEVER, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, output: StepOutput, step: int) -> None:
        """Add one training step's output."""
        values = (output.loss, output.positive_probability, output.hit_rate, output.feature_spread)
        self.sums += torch.stack([value.detach().to(self.sums.dtype) for value in values])
        self.steps += 1
        self.recent_choices.add(output.positives)
        self.epoch_choices.add(output.positives)
        self.note_loss(output.loss, step)

    @torch.no_grad()
    def note_loss(self, loss: Tensor, step: int) -> None:
        """Remember the first step whose loss is not finite."""
        bad = torch.where(torch.isfinite(loss.detach()), self.NEVER, step)
        self.first_bad_step = torch.minimum(self.first_bad_step, bad)

    def take(self, world: World) -> Measured:
        """Return the means since the last call, over all processes, and start anew. Waits for the device."""
        sums = world.sum(self.sums).cpu() / (max(self.steps, 1) * world.size)
        used = int(self.recent_choices.usage(world.sum).used)
        loss, probability, hits, spread = sums.tolist()
        measured = Measured(loss, probability, hits, spread, used, self.bad_step(world))
        self.sums.zero_()
        self.steps = 0
        self.recent_choices.clear()
        return measured

    def bad_step(self, world: World) -> int | None:
        """Return the first step, in any process, whose loss was not finite. Waits for the device."""
        bad = int(-world.maximum(-self.first_bad_step))
        return None if bad == self.NEVER else bad

    def take_epoch_usage(self, world: World) -> Usage:
        """Return how the slots were used in this epoch, over all processes, and start anew."""
        usage = self.epoch_choices.usage(world.sum)
        self.epoch_choices.clear()
        return usage

    def state_dict(self, world: World) -> dict[str, Tensor | int]:
        """Return everything, over all processes, for a checkpoint."""
        return {
            "sums": world.sum(self.sums),
            "processes": world.size,
            "steps": self.steps,
            "recent_choices": world.sum(self.recent_choices.counts),
            "epoch_choices": world.sum(self.epoch_choices.counts),
            "first_bad_step": self.first_bad_step,
        }

    def load_state_dict(self, state: dict[str, Any], world: World) -> None:
        """Take over what `state_dict` returned; sums and counts go to the main process, so that their sum stays what it was."""
        self.steps = state["steps"]
        self.first_bad_step.copy_(state["first_bad_step"])
        if world.is_main:
            # Of as many processes as there are now; of the same number nothing is rounded. (Older checkpoints have means.)
            self.sums.copy_(state["sums"] * world.size / state.get("processes", 1))
            self.recent_choices.counts.copy_(state["recent_choices"])
            self.epoch_choices.counts.copy_(state["epoch_choices"])
