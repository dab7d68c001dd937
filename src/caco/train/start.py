"""Where a new run starts: from a whole checkpoint (`--weights`) and at an epoch (`--start-epoch`)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from caco.config import Pretrain
from caco.distributed.world import World
from caco.optim import LARS
from caco.reference.checkpoint import Snapshot, read_snapshot
from caco.train.state import TrainingState


def start_from(
    state: TrainingState, config: Pretrain, steps_per_epoch: int, warm_start_steps: int, world: World
) -> None:
    """Put a new run's state where its configuration says it starts.

    A file with an encoder only has been loaded before (the backbone). A checkpoint of ours or of the published code
    also gives projector, key encoder, bank and momenta, as far as their shapes fit; main says what was taken. A bank that
    was taken over is not warm-started. Raises UsageError for a file that cannot be read.
    """
    state.step = config.start_epoch * steps_per_epoch
    if not config.weights or config.weights.startswith("timm:"):
        return
    snapshot = read_snapshot(Path(config.weights))
    if snapshot is None:
        return
    taken = take_over(state, snapshot)
    if "bank" in taken:
        state.warm_start_step = warm_start_steps
    if world.is_main:
        left = "" if "bank" in taken else f"; not the bank ({tuple(snapshot.bank.shape)} slots x width there)"
        print(f"--weights {config.weights}: took over {', '.join(taken)}{left}", file=sys.stderr)


@torch.no_grad()
def take_over(state: TrainingState, snapshot: Snapshot) -> list[str]:
    """Copy into the state what fits of a snapshot whose backbone fits; return what that was, in words.

    The bank lives in the projector's space: without the projector it is not taken. Without the snapshot's key encoder
    the state's follows its encoder. LARS takes over its momenta, the bank's optimizer the slots' velocity.
    """
    model = state.model
    taken = ["backbone"]
    if not _fits(snapshot.encoder, model.encoder):
        part = {name: tensor for name, tensor in snapshot.encoder.items() if name.startswith("backbone.")}
        model.encoder.load_state_dict(part, strict=False)
        model.copy_to_key_encoder()
        return taken
    model.encoder.load_state_dict(snapshot.encoder, strict=False)
    taken.append("projector")
    if _fits(snapshot.key_encoder, model.key_encoder):
        model.key_encoder.load_state_dict(snapshot.key_encoder, strict=False)
        taken.append("key encoder")
    else:
        model.copy_to_key_encoder()
    bank = model.bank.weight
    if (model.bank.size, bank.shape[1]) == tuple(snapshot.bank.shape):
        bank.copy_(model.bank.own(snapshot.bank))
        state.bank_optimizer.state[bank]["momentum_buffer"] = model.bank.own(snapshot.velocity).to(bank).clone()
        taken.append("bank")
    parameters = list(model.encoder.parameters())
    if isinstance(state.optimizer, LARS) and len(snapshot.momentum) == len(parameters):
        for number, parameter in enumerate(parameters):
            state.optimizer.state[parameter]["momentum_buffer"] = snapshot.momentum[number].to(parameter).clone()
        taken.append("momenta")
    return taken


def _fits(tensors: Mapping[str, Tensor], module: nn.Module) -> bool:
    """Return whether a state dict fits a module, except for the counters that old files lack."""
    wanted = {name: tensor.shape for name, tensor in module.state_dict().items() if tensor.ndim}
    return wanted == {name: tensor.shape for name, tensor in tensors.items() if tensor.ndim}
