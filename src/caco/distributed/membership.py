"""Which process of a run is which, and where they meet: told by torchrun or SLURM, or decided here from the options."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from caco.config import DistributedOptions
from caco.errors import UsageError


@dataclass(frozen=True)
class Membership:
    """Which process of a run this is, and where all meet: what it knows before it has joined them."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int
    supervised: bool = False
    """Whether all processes are on this machine, and whoever started them ends all when one ends."""


def find_membership(environment: Mapping[str, str]) -> Membership | None:
    """Return this process's membership if torchrun or SLURM's srun has started it as one of several, else None.

    A job's script, which srun has not started, has a number and its job's tasks in its environment, too, but no others
    beside it: only srun tells the tasks of a step. Nor has a shell that `srun --pty` has opened.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Membership(
            rank=int(environment["RANK"]),
            size=int(environment["WORLD_SIZE"]),
            local_rank=int(environment.get("LOCAL_RANK", 0)),
            address=environment.get("MASTER_ADDR", "127.0.0.1"),
            port=int(environment.get("MASTER_PORT", 29500)),
            supervised=environment.get("LOCAL_WORLD_SIZE") == environment["WORLD_SIZE"],
        )
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS") or 1)
    if tasks > 1 and "SLURM_PROCID" in environment and "SLURM_PTY_PORT" not in environment:
        # Two steps of a job at once meet at ports far apart: those in between belong to the jobs that follow.
        number = int(environment.get("SLURM_JOB_ID") or 0) + 7919 * int(environment.get("SLURM_STEP_ID") or 0)
        hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "127.0.0.1")
        return Membership(
            rank=int(environment["SLURM_PROCID"]),
            size=tasks,
            local_rank=int(environment.get("SLURM_LOCALID", 0)),
            address=environment.get("MASTER_ADDR") or first_host(hosts),
            port=int(environment.get("MASTER_PORT", 20000 + number % 20000)),
        )
    return None


def count_restarts(environment: Mapping[str, str]) -> int:
    """Return how often torchrun or SLURM has started this run before, as far as they tell this process."""
    return sum(int(environment.get(name) or 0) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


def job_name(environment: Mapping[str, str]) -> str:
    """Return what names the job of torchrun or SLURM that this process belongs to, the same after a restart; "" for none."""
    return environment.get("SLURM_JOB_ID") or environment.get("TORCHELASTIC_RUN_ID") or ""


def first_host(hosts: str) -> str:
    """Return the first of SLURM's host names: "gpu[03-05,9],login1" → "gpu03"."""
    head, bracket, rest = hosts.partition("[")
    if not bracket or "," in head:
        return hosts.split(",")[0]
    numbers, _, tail = rest.partition("]")
    return head + numbers.split(",")[0].split("-")[0] + tail.split(",")[0]


def count_processes(options: DistributedOptions, device: str) -> int:
    """Return how many processes this machine is to have: as asked for, or one for each GPU. Raises UsageError."""
    if options.processes != "auto":
        if options.processes < 1:
            raise UsageError(f"--distributed.processes {options.processes}: must be at least 1")
        gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
        if options.processes > gpus > 0:  # NCCL refuses two on one, in words that nobody understands
            raise UsageError(
                f"--distributed.processes {options.processes}: each needs a GPU of its own, and this machine has {gpus}; "
                "lower it, or add --device cpu"
            )
        return options.processes
    return max(torch.cuda.device_count(), 1) if device in ("auto", "cuda") else 1


def members_here(options: DistributedOptions, processes: int) -> list[Membership]:
    """Return the members of a run that are to be started on this machine. Raises UsageError."""
    address, port = _meeting_point(options)
    first, size = options.machine * processes, options.machines * processes
    supervised = options.machines == 1
    return [Membership(first + number, size, number, address, port, supervised) for number in range(processes)]


def _meeting_point(options: DistributedOptions) -> tuple[str, int]:
    if options.machines == 1 and not options.address:
        with socket.socket() as probe:  # any free port of this machine
            probe.bind(("127.0.0.1", 0))
            return "127.0.0.1", probe.getsockname()[1]
    if not 0 <= options.machine < options.machines:
        raise UsageError(f"--distributed.machine {options.machine}: must be from 0 to {options.machines - 1}")
    host, _, port = options.address.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"--distributed.address {options.address!r}: must be HOST:PORT of machine 0")
    return host, int(port)
