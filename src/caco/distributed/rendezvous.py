"""How the processes of a run meet, and how they part."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from caco.device import choose_device, exact_products
from caco.distributed.heartbeat import Heartbeat, say
from caco.distributed.meeting import Meeting
from caco.distributed.membership import Membership, count_restarts
from caco.distributed.network import interface_towards, own_address_towards
from caco.distributed.world import World, own_cores
from caco.errors import LostProcess, UsageError


def join(
    membership: Membership,
    device_name: str,
    timeout: float,
    on_lost: Callable[[LostProcess], object] = say,
    hint: str = "",
) -> tuple[World, Heartbeat | None]:
    """Join the other processes: NCCL on GPUs, gloo on CPUs. Return them all, and the heartbeat (None without others).

    on_lost, hint: as `Heartbeat` takes them. Raises UsageError when the others cannot be reached in time.
    """
    device = _own_device(membership, device_name)
    attempt = count_restarts(os.environ)
    if membership.size == 1:
        return World(device, attempt=attempt), None
    interface = interface_towards(membership.address, membership.port)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store, membership, earlier = _meet_through_agent(membership, timeout)
            attempt = max(attempt, earlier)
        else:
            store = _store(membership, timeout, is_master=membership.rank == 0)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=membership.rank,
            world_size=membership.size,
            timeout=timedelta(seconds=timeout),
            device_id=device if device.type == "cuda" else None,
        )
        heartbeat = Heartbeat(membership, timeout, on_lost, hint)
        heartbeat.start()
    except (dist.DistError, RuntimeError, ValueError, OSError) as error:
        raise UsageError(
            f"process {membership.rank} of {membership.size} did not meet the others at {membership.address}:{membership.port} "
            f"({str(error).splitlines()[0][:120]})"
        ) from error
    world = World(device, membership.rank, membership.size, meeting=Meeting(store, membership.size))
    return _know_the_others(world, attempt), heartbeat


def _own_device(membership: Membership, name: str) -> torch.device:
    """Return the device that a process computes on: on GPUs each its own, as long as there are enough."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        device = torch.device("cuda", membership.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        exact_products(device)
        return device
    return choose_device("cpu" if name == "auto" else name)


def _know_the_others(world: World, attempt: int) -> World:
    """Return the world with what only the others can tell: the attempt of the run, and who shares this machine."""
    # A machine that has come anew counts from 0, the others do not.
    attempts, machines, cores = zip(*world.gather_objects((attempt, socket.gethostname(), own_cores())), strict=True)
    here = [other for other in range(world.size) if machines[other] == machines[world.rank]]
    return replace(
        world,
        attempt=max(attempts),
        local_rank=here.index(world.rank),
        local_size=len(here),
        sharing_cores=sum(cores[other] == cores[world.rank] for other in here),
    )


def leave(heartbeat: Heartbeat | None, patience: float) -> None:
    """Leave the process group, if there is one. patience: longest wait for the others to leave, too, in seconds."""
    if heartbeat is not None:
        heartbeat.stop(patience)
    if dist.is_initialized():
        dist.destroy_process_group()


def _store(membership: Membership, timeout: float, is_master: bool) -> TCPStore:
    return TCPStore(
        membership.address, membership.port, membership.size, is_master=is_master, timeout=timedelta(seconds=timeout)
    )


def _meet_through_agent(membership: Membership, timeout: float) -> tuple[TCPStore, Membership, int]:
    """Return process 0's own store, its membership, and how often this run's group has met before.

    torchrun's agent serves one store for all attempts, and its count of restarts differs between machines when one of
    them has come anew. So process 0 opens a fresh store at each attempt and makes it known through the agent's; what
    an earlier process 0 has made known answers no more.
    """
    agent = TCPStore(membership.address, membership.port, is_master=False, timeout=timedelta(seconds=timeout))
    if membership.rank == 0:
        own = own_address_towards(membership.address, membership.port)
        store = TCPStore(
            own, 0, membership.size, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout)
        )
        earlier = agent.add("caco attempts", 1) - 1
        agent.set("caco meeting point", f"{own} {store.port}")
        return store, replace(membership, address=own, port=store.port), earlier
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
        there = replace(membership, address=address, port=int(port))
        return _store(there, timeout, is_master=False), there, 0  # process 0 knows
