"""Gradients averaged over the processes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from caco.distributed.world import World


def data_parallel(network: nn.Module, world: World, ignored: Sequence[str] = ()) -> nn.Module:
    """Return the network itself for a single process, else wrapped: backward averages all gradients.

    ignored: names of parameters that take no part (they have no gradient here, or each process has rows of its own). All others
    must get one in every step, so that nothing is searched for.
    """
    if world.size == 1:
        return network
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, list(ignored))
    # Buffers are batch-norm statistics, which are synchronised where they are made. Newer torch renamed the option.
    newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    option: dict[str, Any] = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
    return DistributedDataParallel(network, gradient_as_bucket_view=True, **option)
