"""The encoder's optimizers, and which parameters are decayed."""

from __future__ import annotations

from collections.abc import Iterable

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
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            plain = [parameter for parameter in parameters if parameter.ndim <= 1]
            scaled = [parameter for parameter in parameters if parameter.ndim > 1]
            gradients = [parameter.grad for parameter in plain if parameter.grad is not None]
            updates = _scaled_updates(scaled, group["weight_decay"], group["trust_coefficient"])
            self._move(plain + scaled, gradients + updates, group["momentum"], group["lr"])

    def _move(self, parameters: list[Tensor], updates: list[Tensor], momentum: float, lr: float) -> None:
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        if parameters:
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, updates)
            torch._foreach_add_(parameters, buffers, alpha=-lr)


def _scaled_updates(parameters: list[Tensor], weight_decay: float, trust_coefficient: float) -> list[Tensor]:
    """Return u·trust·‖p‖/‖u‖ for each parameter, u = g + weight_decay·p; u itself where a norm is 0.

    A few kernels for all tensors together instead of ten for each.
    """
    if not parameters:
        return []
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    updates = list(torch._foreach_add(gradients, parameters, alpha=weight_decay))
    parameter_norms, update_norms = (torch.stack(torch._foreach_norm(tensors)) for tensors in (parameters, updates))
    scales = trust_coefficient * parameter_norms / update_norms
    scales = torch.where((parameter_norms > 0) & (update_norms > 0), scales, 1.0)
    torch._foreach_mul_(updates, list(scales.unbind()))
    return updates


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
