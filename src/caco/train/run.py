"""A run of pre-training, from its configuration to the finished backbone."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from caco.config import Pretrain
from caco.distributed.world import World
from caco.objects import Objects
from caco.train.checkpoint import remove_leftovers
from caco.train.engine import search_kernels
from caco.train.heap import keep_heap
from caco.train.interrupt import InterruptFlag
from caco.train.lock import RunLock
from caco.train.prepare import Prepared, check_bank_fits, check_division, prepare
from caco.train.run_folder import decide_start, open_run_folder, write_config, write_environment
from caco.train.trainer import Trainer
from caco.weights import save_backbone


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
        if world.is_main:
            lock.take(Path(config.out))
        config = world.decide_in_main(lambda: decide_start(config, restarted=world.attempt > 0))
        index = Path(staging) / "index.npz"
        prepared = prepare(world, config, objects, index)
        if world.is_main:  # an old run may be deleted here: all that can be wrong with the new one has been told
            open_folder(prepared.config, index, lock)
        return train(world, prepared)


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
        with InterruptFlag() as interrupt:
            trainer = Trainer(prepared, folder, world, interrupt)
            if world.is_main:  # only now is a resumed run known to fit
                write_config(folder, config)
                write_environment(folder, str(world.device), world.size)
            trainer.train()
    finally:
        broken.write()
    path = folder / "export" / "backbone.safetensors"
    if world.is_main:
        save_backbone(path, state.model.backbone, replace(prepared.card, step=state.step))
    return path
