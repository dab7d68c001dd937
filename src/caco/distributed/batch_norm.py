"""Batch norm over the batches of all processes.

On GPUs torch's own `SyncBatchNorm` (one collective per layer and direction). It refuses CPU tensors, so here is the same
for gloo: one all-gather of (mean, variance) forward, one all-reduce of two sums backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from caco.distributed.world import World
from caco.errors import UsageError


class _SyncNormalise(torch.autograd.Function):
    """(x − mean) / std with mean and variance over all processes; every process has a batch of the same size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        world = dist.get_world_size()
        axes = [0, *range(2, x.ndim)]
        variance, mean = torch.var_mean(x, dim=axes, correction=0)
        gathered = x.new_empty(world, 2, len(mean))
        dist.all_gather(list(gathered), torch.stack([mean, variance]))
        means, variances = gathered[:, 0], gathered[:, 1]
        mean = means.mean(dim=0)
        variance = variances.mean(dim=0) + (means - mean).square().mean(dim=0)
        inverse = torch.rsqrt(variance + eps)
        normalised = (x - _channels(mean, x)) * _channels(inverse, x)
        ctx.save_for_backward(normalised, inverse)
        ctx.mark_non_differentiable(mean, variance)
        return normalised, mean, variance

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *unused: Tensor) -> tuple[Tensor, None]:
        normalised, inverse = ctx.saved_tensors
        axes = [0, *range(2, gradient.ndim)]
        count = gradient.numel() // gradient.shape[1] * dist.get_world_size()
        sums = torch.stack([gradient.sum(axes), (gradient * normalised).sum(axes)])
        dist.all_reduce(sums)
        sums /= count
        centred = gradient - _channels(sums[0], gradient) - normalised * _channels(sums[1], gradient)
        return centred * _channels(inverse, gradient), None


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """`nn.BatchNorm1d/2d/3d` whose training statistics are of all processes' batches together, on any device."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        working = torch.promote_types(x.dtype, torch.float32)
        normalised, mean, variance = _SyncNormalise.apply(x.to(working), self.eps)
        if self.running_mean is not None:
            self._update_statistics(mean, variance, x.numel() // x.shape[1] * dist.get_world_size())
        if self.affine:
            normalised = normalised * _channels(self.weight, x) + _channels(self.bias, x)
        result: Tensor = normalised.to(x.dtype)
        return result

    @torch.no_grad()
    def _update_statistics(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance * (count / max(count - 1, 1)), share)

    def _check_input_dim(self, x: Tensor) -> None:
        """Any shape [B, C, …] is accepted."""


def synchronise_batch_norm(module: nn.Module, world: World) -> nn.Module:
    """Return the module with every batch norm synchronised over all processes; unchanged for a single process."""
    if world.size == 1:
        return module
    if world.device.type == "cuda":
        from timm.layers.norm_act import convert_sync_batchnorm

        return convert_sync_batchnorm(module)  # type: ignore[no-any-return]
    for name, child in module.named_children():
        setattr(module, name, synchronise_batch_norm(child, world))
    return _synchronised(module) if isinstance(module, nn.modules.batchnorm._BatchNorm) else module


def _synchronised(norm: nn.modules.batchnorm._BatchNorm) -> nn.Module:
    """Make a batch norm a synchronised one in place: its parameters, buffers, and what a subclass adds, stay."""
    kind = type(norm)
    if kind.forward in (nn.BatchNorm1d.forward, nn.BatchNorm2d.forward):
        norm.__class__ = SyncBatchNorm
    elif hasattr(norm, "drop") and hasattr(norm, "act"):  # timm's BatchNormAct2d
        norm.__class__ = _SyncBatchNormAct
    else:
        raise UsageError(
            f"the backbone has a batch norm of a kind that cannot be synchronised over processes ({kind.__name__}): use one "
            "process, or a batch norm of torch or timm"
        )
    return norm


class _SyncBatchNormAct(SyncBatchNorm):
    """timm's layer of batch norm, drop and activation, with the first part synchronised."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))  # type: ignore[no-any-return,operator]


def _channels(values: Tensor, like: Tensor) -> Tensor:
    """Return [C] as [1, C, 1, …], to meet `like`: [B, C, …]."""
    return values.view(1, -1, *[1] * (like.ndim - 2))
