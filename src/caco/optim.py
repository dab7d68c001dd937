"""The optimizers of the encoder and of the published linear classifier, and which parameters are decayed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class _LayerWise(Optimizer):
    """Momentum SGD whose update each tensor scales by a rate of its own: buffer ← momentum·buffer + u; p ← p − lr·buffer.

    No host synchronisation. Source: You et al. 2017, arXiv:1708.03888.
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
            gradients = [parameter.grad for parameter in parameters]
            updates = self._updates(parameters, gradients, group["weight_decay"], group["trust_coefficient"])
            self._move(parameters, updates, group["momentum"], group["lr"])

    def _updates(
        self, parameters: list[Tensor], gradients: list[Tensor], weight_decay: float, trust_coefficient: float
    ) -> list[Tensor]:
        """Return u for each parameter."""
        raise NotImplementedError

    def _move(self, parameters: list[Tensor], updates: list[Tensor], momentum: float, lr: float) -> None:
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        if parameters:
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, updates)
            torch._foreach_add_(parameters, buffers, alpha=-lr)


class LARS(_LayerWise):
    """Layer-wise adaptive rate scaling, as the published code trains its encoder.

    Tensors of at most one dimension (biases, norms): u = g, no weight decay. All others: u = g + weight_decay·p, scaled
    by trust_coefficient·‖p‖/‖u‖ where both norms are positive. Published values: `tests/golden/lars.npz`.
    """

    def _updates(
        self, parameters: list[Tensor], gradients: list[Tensor], weight_decay: float, trust_coefficient: float
    ) -> list[Tensor]:
        updates = list(gradients)
        scaled = [place for place, parameter in enumerate(parameters) if parameter.ndim > 1]
        weights, theirs = [parameters[place] for place in scaled], [gradients[place] for place in scaled]
        for place, update in zip(scaled, _scaled(weights, theirs, weight_decay, trust_coefficient), strict=True):
            updates[place] = update
        return updates


class LayerWiseSGD(_LayerWise):
    """SGD with momentum as the published code trains its linear classifier (LARC without clipping).

    u = (g + weight_decay·p) · trust_coefficient·‖p‖ / (‖g‖ + weight_decay·‖p‖ + 1e-8) where both norms are positive, else
    u = g; weights and biases alike. Published values: `tests/golden/linear_probe_lars.npz`.
    """

    def _updates(
        self, parameters: list[Tensor], gradients: list[Tensor], weight_decay: float, trust_coefficient: float
    ) -> list[Tensor]:
        updates = []
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter_norm, gradient_norm = parameter.norm(), gradient.norm()
            rate = trust_coefficient * parameter_norm / (gradient_norm + weight_decay * parameter_norm + 1e-8)
            # A bias starts at 0: without this exception its rate would be 0 for ever.
            scaled = (parameter_norm > 0) & (gradient_norm > 0)
            updates.append(torch.where(scaled, gradient.add(parameter, alpha=weight_decay) * rate, gradient))
        return updates


def _scaled(
    parameters: list[Tensor], gradients: list[Tensor], weight_decay: float, trust_coefficient: float
) -> list[Tensor]:
    """Return u·trust·‖p‖/‖u‖ for each parameter, u = g + weight_decay·p; u itself where a norm is 0.

    A few kernels for all tensors together instead of ten for each.
    """
    if not parameters:
        return []
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
