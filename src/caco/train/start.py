"""Where a new run starts: from a whole checkpoint (`--weights`) and at an epoch (`--start-epoch`)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from caco.backbone import SMALL_VIEW, first_kernel
from caco.config import Pretrain
from caco.distributed.world import World
from caco.errors import UsageError
from caco.evaluate.encoder import find_weights
from caco.foreign import named_preparation
from caco.optim import LARS
from caco.reference.checkpoint import Snapshot, read_snapshot
from caco.train.checkpoint import CheckpointFolder
from caco.train.state import TrainingState
from caco.views import Preparation
from caco.weights import BackboneCard, download_weights, load_into, read_weights


def start_file(weights: str) -> Path:
    """Return the file that --weights names: of a run folder its latest checkpoint, which says most, or its backbone."""
    path = Path(weights)
    checkpoints = CheckpointFolder(path / "checkpoints", keep=1).paths() if path.is_dir() else []
    return checkpoints[-1] if checkpoints else find_weights(path)


def load_start(backbone: nn.Module, weights: str) -> None:
    """Load into a new run's backbone what --weights names. Raises UsageError when it does not fit, or is not there."""
    origin = f"--weights {weights}"
    if weights.startswith("timm:"):
        tensors = download_weights(weights.removeprefix("timm:"))
    else:
        tensors = read_weights(start_file(weights))[0]
    theirs, ours = first_kernel(tensors), first_kernel(backbone.state_dict())
    if theirs and ours and theirs != ours and 3 in (theirs, ours):
        stem = "small" if theirs == 3 else "standard"
        raise UsageError(
            f"{origin} has a first convolution of {theirs} x {theirs}, the backbone one of {ours} x {ours} (views of at "
            f"most {SMALL_VIEW} px get a small one by default); use --encoder.stem {stem}"
        )
    load_into(backbone, tensors, origin)


def start_from(
    state: TrainingState, config: Pretrain, steps_per_epoch: int, warm_start_steps: int, world: World
) -> None:
    """Put a new run's state where its configuration says it starts.

    A file with an encoder only has been loaded before (the backbone). A checkpoint of ours or of the published code
    also gives projector, key encoder, bank and momenta, as far as their shapes fit; main says what was taken. A bank that
    was taken over is not warm-started. Raises UsageError for a file that cannot be read.
    """
    state.step = config.start_epoch * steps_per_epoch
    if world.is_main and config.weights:
        say_other_normalisation(config)
    if not config.weights or config.weights.startswith("timm:"):
        return
    snapshot = read_snapshot(start_file(config.weights))
    if snapshot is None:
        if world.is_main:
            print(f"--weights {config.weights}: took over backbone", file=sys.stderr)
        return
    taken = take_over(state, snapshot)
    if "bank" in taken:
        state.warm_start_step = warm_start_steps
    if world.is_main:
        left = f"; not the bank ({tuple(snapshot.bank.shape)} slots x width there)"
        if "bank" in taken:
            left = "; that bank takes the place of a warm start" if warm_start_steps else ""
        print(f"--weights {config.weights}: took over {', '.join(taken)}{left}", file=sys.stderr)


def say_other_normalisation(config: Pretrain) -> None:
    """Say so when --weights were trained on pictures normalised in another way than the run's, as far as it is known."""
    if config.weights.startswith("timm:"):
        known: Preparation | BackboneCard | None = named_preparation(config.weights.removeprefix("timm:"))
    else:
        known = read_weights(start_file(config.weights))[1]
    if known is None or (known.mean, known.std) == (config.views.mean, config.views.std):
        return
    mean, std = (" ".join(map(str, values)) for values in (known.mean, known.std))
    print(
        f"--weights {config.weights} were trained on pictures of another mean and std than this run's; it starts better with "
        f"theirs: --views.mean {mean} --views.std {std}",
        file=sys.stderr,
    )


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
        bank.copy_(model.bank.local_rows(snapshot.bank))
        state.bank_optimizer.state[bank]["momentum_buffer"] = model.bank.local_rows(snapshot.velocity).to(bank).clone()
        taken.append("bank")
    parameters = list(model.encoder.parameters())
    if isinstance(state.optimizer, LARS) and len(snapshot.momentum) == len(parameters):
        for number, parameter in enumerate(parameters):
            momentum = torch.empty_like(parameter)  # in the parameter's layout, as LARS keeps it
            state.optimizer.state[parameter]["momentum_buffer"] = momentum.copy_(snapshot.momentum[number])
        taken.append("momenta")
    return taken


def _fits(tensors: Mapping[str, Tensor], module: nn.Module) -> bool:
    """Return whether a state dict fits a module, except for the counters that old files lack."""
    wanted = {name: tensor.shape for name, tensor in module.state_dict().items() if tensor.ndim}
    return wanted == {name: tensor.shape for name, tensor in tensors.items() if tensor.ndim}
