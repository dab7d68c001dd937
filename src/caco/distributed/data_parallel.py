"""Gradients averaged over the processes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from caco.backbone import evaluation_mode
from caco.distributed.world import World


def data_parallel(network: nn.Module, world: World, ignored: Sequence[Tensor] = ()) -> nn.Module:
    """Return the network itself for a single process, else wrapped: backward averages all gradients.

    ignored: parameters that take no part (they get no gradient, or each process has rows of its own). All others must get
    one in every step, so that nothing is searched for.
    """
    if world.size == 1:
        return network
    ids = {id(parameter) for parameter in ignored}
    names = [name for name, parameter in network.named_parameters() if id(parameter) in ids]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, names)
    # Buffers are batch-norm statistics, which are synchronised where they are made. Newer torch renamed the option.
    newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    option: dict[str, Any] = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
    return DistributedDataParallel(network, gradient_as_bucket_view=True, **option)


def unused_parameters(backbone: nn.Module, size: int, world: World) -> list[nn.Parameter]:
    """Return the parameters that have no part in a backbone's features of [B, 3, size, size]: heads and the like.

    Nothing is looked for in a single process, which does not need to know.
    """
    if world.size == 1:
        return []
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    with evaluation_mode(backbone), torch.enable_grad():
        features = backbone(torch.zeros(2, 3, size, size, device=world.device))
        gradients = torch.autograd.grad(features.sum(), trained, allow_unused=True) if trained else []
    return [parameter for parameter, gradient in zip(trained, gradients, strict=True) if gradient is None]
