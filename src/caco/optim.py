"""Optimizers of the encoder and of the linear probe, and which parameters are decayed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling, as the published code trains its encoder.

    Tensors of at most one dimension (biases, norms): plain momentum SGD, no weight decay. All others:
    u = g + weight_decay·p, scaled by trust_coefficient·‖p‖/‖u‖ where both norms are positive, then momentum.
    No host synchronisation. Source: You et al. 2017; `lars.npz`.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        super().__init__(
            parameters,
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient},
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step. (No closure: the loss is computed once.)"""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group)

    def _step_one(self, parameter: Tensor, group: dict[str, Any]) -> None:
        update = parameter.grad
        assert update is not None
        if parameter.ndim > 1:
            update = update.add(parameter, alpha=group["weight_decay"])
            parameter_norm, update_norm = parameter.norm(), update.norm()
            scale = group["trust_coefficient"] * parameter_norm / update_norm
            update = update * torch.where((parameter_norm > 0) & (update_norm > 0), scale, 1.0)
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
        parameter.add_(buffer, alpha=-group["lr"])


def encoder_optimizer(name: str, encoder: nn.Module, lr: float, momentum: float, weight_decay: float) -> Optimizer:
    """Return the named optimizer ("lars", "sgd", "adamw") over an encoder's trainable parameters.

    Biases and normalisation parameters (at most one dimension) are never decayed.
    """
    trainable = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    if name == "lars":
        return LARS(trainable, lr=lr, momentum=momentum, weight_decay=weight_decay)
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    raise ValueError(f"no optimizer is called {name!r}; choose lars, sgd or adamw")


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
