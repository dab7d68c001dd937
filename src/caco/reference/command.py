"""The `caco` command that does what a published command asked for."""

from __future__ import annotations

import shlex

from caco.after_training import Linear
from caco.config import DistributedOptions, Pretrain
from caco.errors import UsageError
from caco.options import words
from caco.recipes import find_recipe
from caco.reference.flags import Flags

PUBLISHED_RECIPES = (
    *("imagenet-200-b1024", "imagenet-200-b4096", "imagenet-800-b4096"),
    "imagenet-800-multicrop-b2048",
)


def pretrain_command(config: Pretrain) -> str:
    """Return `caco pretrain` with every option in which the configuration differs from its recipe."""
    return " ".join(["caco pretrain --recipe", config.recipe, *_options(config, find_recipe(config.recipe))])


def linear_command(config: Linear) -> str:
    """Return `caco linear` with every option that is not the default."""
    return " ".join(["caco linear", shlex.quote(config.run), *_options(config, Linear(run=config.run))])


def nearest_recipe(config: Pretrain) -> str:
    """Return the name of the published recipe that differs in the fewest options."""
    return min(PUBLISHED_RECIPES, key=lambda name: len(_options(config, find_recipe(name))))


def resources(flags: Flags, gpus: int, cores: int) -> tuple[str, int | None, int]:
    """Return the device, the processes on this machine (None: one for each GPU) and the threads of each process.

    The published --workers is the number of threads on all machines. gpus, cores: of this machine.
    """
    gpu = flags.gpu if gpus else None
    processes = flags.nproc or (1 if gpu is not None else None)
    threads = min(flags.workers // max(flags.world_size, 1), cores) // (processes or max(gpus, 1))
    return "auto" if gpu is None else f"cuda:{gpu}", processes, max(1, threads)


def machines(world_size: int, rank: int, url: str, processes: int | None) -> DistributedOptions:
    """Return where this process stands: machines in all, this machine, and `tcp://HOST:PORT` of machine 0.

    -1 (linear.py's defaults) means one machine; with `env://` torchrun's or SLURM's variables say it all. processes: on
    this machine; None: one for each GPU. Raises UsageError for an address that cannot be used.
    """
    options = DistributedOptions(processes="auto" if processes is None else processes)
    if world_size <= 1 or url == "env://":
        return options
    scheme, separator, address = url.partition("://")
    host, _, port = address.rpartition(":")
    if scheme != "tcp" or not separator or not host or not port.isdigit() or "[" in host:
        raise UsageError(f"the dist url {url!r} must be tcp://HOST:PORT of the machine with rank 0")
    return DistributedOptions(processes=options.processes, machines=world_size, machine=max(rank, 0), address=address)


def _options(config: Pretrain | Linear, start: Pretrain | Linear) -> list[str]:
    """Return what differs, quoted; the recipe is said by its name."""
    return [shlex.join(option) for option in words(config, start) if option[0] != "--recipe"]
