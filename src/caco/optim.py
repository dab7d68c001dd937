"""The optimizers of the encoder and of the published linear classifier, and which parameters are decayed."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from caco.own_kernels import suits_kernels, works

if TYPE_CHECKING:
    from caco.lars_kernels import Table


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
            for parameter in parameters:
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            if parameters:
                buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
                self._move(parameters, gradients, buffers, group)

    def _move(
        self, parameters: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], group: dict[str, Any]
    ) -> None:
        updates = self._updates(parameters, gradients, group["weight_decay"], group["trust_coefficient"])
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, updates)
        torch._foreach_add_(parameters, buffers, alpha=-group["lr"])

    def _updates(
        self, parameters: list[Tensor], gradients: list[Tensor], weight_decay: float, trust_coefficient: float
    ) -> list[Tensor]:
        """Return u for each parameter."""
        raise NotImplementedError


class LARS(_LayerWise):
    """Layer-wise adaptive rate scaling, as the published code trains its encoder.

    Tensors of at most one dimension (biases, norms): u = g, no weight decay. All others: u = g + weight_decay·p, scaled
    by trust_coefficient·‖p‖/‖u‖ where both norms are positive. Published values: `tests/golden/lars.npz`.
    On a GPU two kernels do all of it (`lars_kernels.py`).
    """

    _table: Table | None = None

    def _move(
        self, parameters: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], group: dict[str, Any]
    ) -> None:
        if not self._by_kernels(parameters, gradients, buffers, group):
            super()._move(parameters, gradients, buffers, group)

    def _by_kernels(
        self, parameters: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], group: dict[str, Any]
    ) -> bool:
        """Move the parameters by the kernels, or return False: there are none, or not for tensors like these."""
        if not _has_kernels(parameters[0].device):
            return False
        if self._table is None:
            from caco.lars_kernels import Table  # which needs Triton

            self._table = Table()
        if not self._table.write(parameters, gradients, buffers):
            return False
        self._table.move(group["lr"], group["momentum"], group["weight_decay"], group["trust_coefficient"])
        return True

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


@lru_cache
def _has_kernels(device: torch.device) -> bool:
    """Return whether the kernels of LARS do on a GPU what plain torch does; where they do not, it is told. Waits for it."""

    def problem() -> str:
        from caco.lars_kernels import Table

        generator = torch.Generator().manual_seed(0)
        start = [torch.randn(shape, generator=generator).to(device) for shape in ((90, 50), (33,), (8, 3, 3, 3))]
        gradients = [torch.randn(tensor.shape, generator=generator).to(device) for tensor in start]
        group = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "trust_coefficient": 0.1}
        table, plain, results = Table(), LARS(start, lr=0.1), []
        for kernels in (True, False):
            parameters, buffers = ([tensor.clone() for tensor in start] for _ in range(2))
            if not kernels:
                _LayerWise._move(plain, parameters, gradients, buffers, group)
            elif table.write(parameters, gradients, buffers):
                table.move(**group)
            results.append(torch.cat([tensor.flatten() for tensor in parameters]))
        deviation = float((results[0] - results[1]).norm() / results[1].norm())
        return "" if deviation < 1e-5 else f"they deviate by {deviation:.2g} from plain torch"

    return suits_kernels(device) and works("the kernels of LARS", problem)


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
