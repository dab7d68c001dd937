"""A run of pre-training, from its configuration to the finished backbone."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from caco.checkpointing import keep_all_activations
from caco.config import Pretrain
from caco.distributed.membership import job_name
from caco.distributed.world import World
from caco.errors import UsageError
from caco.objects import Objects
from caco.train.checkpoint import CheckpointFolder, remove_leftovers
from caco.train.engine import search_kernels
from caco.train.heap import keep_heap
from caco.train.interrupt import InterruptFlag
from caco.train.lock import RunLock
from caco.train.prepare import Prepared, check_bank_fits, check_division, prepare
from caco.train.run_folder import (
    as_decided,
    check_same_mathematics,
    decide_start,
    is_of_job,
    is_of_others,
    open_run_folder,
    read_config,
    write_config,
    write_environment,
)
from caco.train.trainer import Trainer
from caco.weights import load_torch, read_weights, save_backbone
from caco.winograd.network import use_direct, use_winograd


def run_pretraining(world: World, config: Pretrain, objects: Objects) -> Path:
    """Pre-train as configured, in this and all other processes of `world`; return the path of the finished backbone.

    Raises UsageError before any heavy work, Interrupted after a signal (the run is saved), CacoError when the run cannot
    go on (its last good state is kept).
    """
    check_division(config, world)
    check_bank_fits(config, world)
    if world.device.type == "cpu" and config.engine.keep_heap:
        keep_heap()
    search_kernels(world.device)
    with RunLock() as lock, tempfile.TemporaryDirectory() as staging:
        if world.is_main and not is_of_others(Path(config.out)):
            lock.take(Path(config.out))
        config = world.decide_in_main(lambda: decide_start(config, restarted=_is_restarted(config, world)))
        if config.resume and (path := world.decide_in_main(lambda: finished_backbone(config))):
            if world.is_main:
                print("the run is finished; nothing to do", file=sys.stderr)
            return path
        index = Path(staging) / "index.npz"
        prepared = prepare(world, config, objects, index)
        if world.is_main:  # an old run may be deleted here: all that can be wrong with the new one has been told
            open_folder(prepared.config, index, lock)
        return train(world, prepared)


def _is_restarted(config: Pretrain, world: World) -> bool:
    """Return whether torchrun or SLURM has started this command again, which began the run that is in its folder."""
    return world.attempt > 0 and is_of_job(Path(config.out), job_name(os.environ))


def finished_backbone(config: Pretrain) -> Path | None:
    """Return the backbone of the run to resume if that is finished; None while there is work left.

    It is written last. One that is damaged, or of a later step than the last checkpoint (one that was deleted, to go back),
    does not count. Raises UsageError when the run is asked to compute something else than it has.
    """
    folder = Path(config.out)
    path = folder / "export" / "backbone.safetensors"
    checkpoints = CheckpointFolder(folder / "checkpoints", keep=1).paths()
    try:
        card = read_weights(path)[1]
        if card is None or (checkpoints and load_torch(checkpoints[-1]).get("step") != card.step):
            return None
    except UsageError:  # not there yet, or damaged
        return None
    saved = read_config(folder)
    check_same_mathematics(saved, as_decided(config, saved))
    return path


def open_folder(config: Pretrain, index: Path, lock: RunLock) -> None:
    """Open the folder of a run whose configuration is resolved; a new one gets its configuration and listing."""
    folder = open_run_folder(config, lock)
    remove_leftovers(folder)
    if not config.resume:
        write_config(folder, config)
        if index.exists():
            shutil.move(index, folder / index.name)


def train(world: World, prepared: Prepared) -> Path:
    """Train to the end in the folder that is open; return the path of the finished backbone."""
    config, state, broken, folder = prepared.config, prepared.state, prepared.broken, Path(prepared.config.out)
    world.wait()  # until the folder is open
    if world.is_main:
        broken.list_in(folder / "skipped.txt")
    try:
        if config.engine.convolution == "winograd":
            use_winograd(state.model)
        with InterruptFlag() as interrupt:
            trainer = Trainer(prepared, folder, world, interrupt)
            if world.is_main:  # only now is a resumed run known to fit
                write_config(folder, config)
                write_environment(folder, str(world.device), world.size)
            trainer.train()
    finally:
        broken.write()
        use_direct(state.model)  # the module may be the caller's own
        keep_all_activations(state.model)
    path = folder / "export" / "backbone.safetensors"
    if world.is_main:
        save_backbone(path, state.model.backbone, replace(prepared.card, step=state.step))
    return path
