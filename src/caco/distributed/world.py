"""The processes of a run, and what they exchange. One process needs no process group: every exchange is the identity."""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from caco.distributed.heartbeat import LOST_AFTER, Heartbeat, say
from caco.distributed.network import interface_towards, own_address_towards
from caco.errors import LostProcess, UsageError, did_you_mean

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    device: torch.device
    rank: int = 0
    size: int = 1
    attempt: int = 0
    """How often torchrun or SLURM had started this run before."""
    local_rank: int = 0
    """This process among those of its machine."""
    local_size: int = 1
    """Processes of this run on this machine: they share its main memory."""
    sharing_cores: int = 1
    """Processes of this run that may use the same cores as this one."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and talks."""
        return self.rank == 0

    def worker_count(self, workers: int | str) -> int:
        """Return the number of threads for "auto" (one per core, divided among the processes that share them) or a number."""
        return max(len(own_cores()) // self.sharing_cores if workers == "auto" else int(workers), 1)

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows [B, …] of all processes, in rank order: [size·B, …]. B must be the same everywhere."""
        if self.size == 1:
            return rows
        gathered = rows.new_empty(self.size * len(rows), *rows.shape[1:])
        dist.all_gather(list(gathered.chunk(self.size)), rows.contiguous())
        return gathered

    def sum(self, values: Tensor) -> Tensor:
        """Return the elementwise sum over all processes."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def maximum(self, values: Tensor) -> Tensor:
        """Return the elementwise maximum over all processes."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Return, for each flag, whether it is set in any process. Waits for all of them."""
        if self.size == 1:
            return flags
        return tuple(self.maximum(torch.tensor(flags, dtype=torch.int32, device=self.device)).bool().tolist())

    def part(self, items: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Return this process's contiguous part of the items: all parts together are each item once, in order."""
        return np.array_split(np.asarray(items), self.size)[self.rank]

    def gather_objects(self, item: Any) -> list[Any]:
        """Return what every process gave, in rank order. For small things: lists of names, numbers."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def gather_parts(self, rows: Tensor) -> Tensor:
        """Return the rows [n, …] of all processes, in rank order, where n may differ between them."""
        if self.size == 1:
            return rows
        counts = self.gather_objects(len(rows))
        if not any(counts):
            return rows
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = self.gather(padded.to(self.device)).to(rows.device).split(max(counts))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def share(self, make: Callable[[], T]) -> T:
        """Return what `make` returns in the main process; only there it is called."""
        if self.size == 1:
            return make()
        item = [make() if self.is_main else None]
        dist.broadcast_object_list(item, device=self.device)
        return item[0]  # type: ignore[return-value]

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()

    def _reduced(self, values: Tensor, operation: Any) -> Tensor:
        if self.size == 1:
            return values
        result = values.clone()
        dist.all_reduce(result, operation)
        return result


@dataclass(frozen=True)
class Place:
    """Where a process stands before it joins: from torchrun's, SLURM's or our own launcher's variables."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int
    supervised: bool = False
    """Whether all processes are on this machine, and whoever started them ends all when one ends."""


def find_place(environment: Mapping[str, str]) -> Place | None:
    """Return this process's place if torchrun or SLURM (or our launcher) has started it as one of several, else None."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Place(
            rank=int(environment["RANK"]),
            size=int(environment["WORLD_SIZE"]),
            local_rank=int(environment.get("LOCAL_RANK", 0)),
            address=environment.get("MASTER_ADDR", "127.0.0.1"),
            port=int(environment.get("MASTER_PORT", 29500)),
            supervised=environment.get("LOCAL_WORLD_SIZE") == environment["WORLD_SIZE"],
        )
    if int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environment:
        job = int(environment.get("SLURM_JOB_ID", 0))
        return Place(
            rank=int(environment["SLURM_PROCID"]),
            size=int(environment["SLURM_NTASKS"]),
            local_rank=int(environment.get("SLURM_LOCALID", 0)),
            address=environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_JOB_NODELIST", "127.0.0.1")),
            port=int(environment.get("MASTER_PORT", 20000 + job % 20000)),
        )
    return None


def first_host(hosts: str) -> str:
    """Return the first of SLURM's host names: "gpu[03-05,9],login1" → "gpu03"."""
    head, bracket, rest = hosts.partition("[")
    if not bracket or "," in head:
        return hosts.split(",")[0]
    numbers, _, tail = rest.partition("]")
    return head + numbers.split(",")[0].split("-")[0] + tail.split(",")[0]


def join(
    place: Place,
    device_name: str,
    timeout: float,
    on_lost: Callable[[LostProcess], object] = say,
    hint: str = "",
) -> tuple[World, Heartbeat | None]:
    """Join the other processes: NCCL on GPUs, gloo on CPUs. Return them all, and the heartbeat (None without others).

    on_lost, hint: as `Heartbeat` takes them. Raises UsageError when the others cannot be reached in time.
    """
    if device_name in ("auto", "cuda") and torch.cuda.is_available():
        device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        exact_products(device)
    else:
        device = choose_device("cpu" if device_name == "auto" else device_name)
    attempt = sum(int(os.environ.get(name, 0)) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    if place.size == 1:
        return World(device, attempt=attempt), None
    interface = interface_towards(place.address, place.port)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store, place, earlier = _meet_through_agent(place, timeout)
            attempt = max(attempt, earlier)
        else:
            store = _store(place, timeout, is_master=place.rank == 0)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=place.rank,
            world_size=place.size,
            timeout=timedelta(seconds=timeout),
            device_id=device if device.type == "cuda" else None,
        )
        heartbeat = Heartbeat(place, timeout, on_lost, hint)
        heartbeat.start()
    except (dist.DistError, RuntimeError, ValueError, OSError) as error:
        raise UsageError(
            f"process {place.rank} of {place.size} did not meet the others at {place.address}:{place.port} "
            f"({str(error).splitlines()[0][:120]})"
        ) from error
    world = World(device, place.rank, place.size)
    # A machine that has come anew counts from 0, the others do not.
    attempts, machines, cores = zip(*world.gather_objects((attempt, socket.gethostname(), own_cores())), strict=True)
    here = [other for other in range(world.size) if machines[other] == machines[world.rank]]
    world = replace(
        world,
        attempt=max(attempts),
        local_rank=here.index(world.rank),
        local_size=len(here),
        sharing_cores=sum(cores[other] == cores[world.rank] for other in here),
    )
    return world, heartbeat


def own_cores() -> tuple[int, ...]:
    """Return the numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def leave(heartbeat: Heartbeat | None, patience: float = LOST_AFTER) -> None:
    """Leave the process group, if there is one. patience: longest wait for the others to leave, too, in seconds."""
    if heartbeat is not None:
        heartbeat.stop(patience)
    if dist.is_initialized():
        dist.destroy_process_group()


def _store(place: Place, timeout: float, is_master: bool) -> TCPStore:
    return TCPStore(place.address, place.port, place.size, is_master=is_master, timeout=timedelta(seconds=timeout))


def _meet_through_agent(place: Place, timeout: float) -> tuple[TCPStore, Place, int]:
    """Return process 0's own store, its place, and how often this run's group has met before.

    torchrun's agent serves one store for all attempts, and its count of restarts differs between machines when one of
    them has come anew. So process 0 opens a fresh store at each attempt and makes it known through the agent's; what
    an earlier process 0 has made known answers no more.
    """
    agent = TCPStore(place.address, place.port, is_master=False, timeout=timedelta(seconds=timeout))
    if place.rank == 0:
        own = own_address_towards(place.address, place.port)
        store = TCPStore(own, 0, place.size, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))
        earlier = agent.add("caco attempts", 1) - 1
        agent.set("caco meeting point", f"{own} {store.port}")
        return store, replace(place, address=own, port=store.port), earlier
    deadline = time.monotonic() + timeout
    while True:
        address, port = agent.get("caco meeting point").decode().split()
        try:
            socket.create_connection((address, int(port)), timeout=5).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
            continue
        there = replace(place, address=address, port=int(port))
        return _store(there, timeout, is_master=False), there, 0  # process 0 knows


def choose_device(name: str) -> torch.device:
    """Return the device for "auto" (a GPU if there is one) or a torch device name. Raises UsageError."""
    if name == "auto":
        if torch.cuda.is_available():
            exact_products(torch.device("cuda"))
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        kinds = ("auto", "cpu", "cuda", "cuda:1", "mps", "xpu")
        asked = name.lower().replace("gpu", "cuda").replace("nvidia", "cuda")
        near = did_you_mean(asked, kinds, most=1) or f" There are: {', '.join(kinds)}."
        raise UsageError(f"--device {name}: no such kind of device.{near}") from None
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        number = torch.cuda.device_count()
        here = ["cpu", *(f"cuda:{gpu}" for gpu in range(number)), *(["mps"] * torch.backends.mps.is_available())]
        raise UsageError(f"--device {name}: not on this machine, which has {', '.join(here)}; try auto") from error
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # what exchanges objects or pins memory takes the current one
    exact_products(device)
    return device


def exact_products(device: torch.device) -> None:
    """Make a GPU's products of float32 matrices exact to float32: the search for positives and kNN rely on it.

    So they are in torch, but not in NVIDIA's containers (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE), nor where a program has asked
    for TF32. Convolutions of an encoder in fp32 keep what torch has set.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest")
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # torch's compiler advises against it


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether a device is a GPU that computes in bfloat16 (older ones only imitate it, slowly)."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the autocast dtype for "auto", "fp32" or "bf16"; auto: bf16 on GPUs that have it, else fp32."""
    if name == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def precision_name(dtype: torch.dtype) -> Literal["fp32", "bf16"]:
    """Return the option's word for what `choose_precision` chose."""
    return "bf16" if dtype == torch.bfloat16 else "fp32"
