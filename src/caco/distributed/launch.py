"""Start a command in as many processes as it should have, and bring its result or its error back.

    parent  launch → _start_processes ── Task ──→ pipe ──→ child  _child → _run_in → task.function(world, …)
            _wait_for_all → _result   ←── pipe ←── Outcome ──┘

An Outcome is one of these; behind it, the exit status of the command (and of the child, where it is another):
    done    the child has worked to the end                         0
    error   a CacoError: the parent raises it again                 the error's own: 1, 2 or 75
    crash   any other exception: a RuntimeError with its traceback  1
    killed  the child has ended without a word                      1; 130 when this process has got Ctrl-C
    lost    the child misses another one: an echo of that failure   1 (the child: 1, or 76 out of a collective)
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from caco.config import DistributedOptions
from caco.device import choose_device
from caco.distributed.heartbeat import EXIT_STATUS, HINT, LOST_AFTER, say
from caco.distributed.meeting import OthersFailed
from caco.distributed.membership import Membership, count_processes, count_restarts, find_membership, members_here
from caco.distributed.rendezvous import join, leave
from caco.distributed.signals import SignalsToChildren, without_ctrl_c
from caco.distributed.world import World, own_cores
from caco.errors import CacoError, Interrupted, LostProcess, UsageError
from caco.files import print_any_name
from caco.memory import out_of_memory_is_told

T = TypeVar("T")

PATIENCE = 8.0
"""Seconds that processes have to end by themselves after one has failed."""

NAME = "caco process"
"""What the processes that are started here are called, before their number."""

START_METHOD = "spawn"
"""How they are started: each imports everything anew, since a fork of this process would take its threads' locks along.
(The tests fork from a server without threads, to save the imports.)"""

UNGUARDED = 78
"""Exit status of a process that met a call of `launch` when it imported the caller's script."""

GUARD = (
    "every process imports your script, and would start the run again: put the call of caco under "
    '`if __name__ == "__main__":`'
)


@dataclass(frozen=True)
class Task:
    """What every process of a run is to do."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    """Behind the world, which the function takes first."""
    device: str
    timeout: float
    can_resume: bool

    @property
    def hint(self) -> str:
        """What to do when a process was lost."""
        return HINT if self.can_resume else ""


@dataclass(frozen=True)
class Outcome:
    """What has become of a process that was started here."""

    kind: Literal["done", "error", "crash", "killed", "lost"]
    value: Any = None
    """done: the result. error, lost: the CacoError. crash: the traceback, in words. killed: None."""

    @property
    def is_failure(self) -> bool:
        """Whether the others cannot go on. (Processes that were asked to stop all do, each by itself.)"""
        return self.kind != "done" and not isinstance(self.value, Interrupted)


def launch(
    function: Callable[..., T], options: DistributedOptions, device: str, *arguments: Any, can_resume: bool = False
) -> T | None:
    """Call function(world, *arguments) in every process of the run; return the main process's result (None elsewhere).

    Started by torchrun or SLURM, this process is one of the run's. Otherwise one process for each GPU (or as many as
    asked for) is started here; a single one runs in this process, without a process group. Errors of any process come
    back as the CacoError they were. A script that would call this in every process again is a UsageError.

    can_resume: the function saves when it gets SIGTERM, and a later call goes on. Otherwise a signal to this process ends
    all at once, and has its usual effect here: Ctrl-C is a KeyboardInterrupt.
    """
    if _is_importing_the_script():
        sys.exit(UNGUARDED)  # the process that started this one tells it, once
    task = Task(function, arguments, device, options.timeout, can_resume)
    membership = find_membership(os.environ)
    if membership is not None:
        result: T | None = _run_in(membership, task)
        return result
    processes = count_processes(options, device)
    if options.machines == 1 and processes == 1:
        with out_of_memory_is_told():
            return function(World(choose_device(device), attempt=count_restarts(os.environ)), *arguments)
    members = members_here(options, processes)
    started: T | None = _result(_start_processes(task, members), members, task.hint)
    return started


def _is_importing_the_script() -> bool:
    """Return whether this process was started by `launch` and has not come to its work yet."""
    process = multiprocessing.current_process()
    return process.name.startswith(NAME) and getattr(process, "_inheriting", False)


def _run_in(membership: Membership, task: Task, on_lost: Callable[[LostProcess], object] = say) -> Any:
    """Do the task in this process, as one of several; return the main process's result (None elsewhere)."""
    world, heartbeat = join(membership, task.device, task.timeout, on_lost, task.hint)
    # After an error the others may be waiting in an exchange, and end only when this process does.
    patience = PATIENCE / 2
    try:
        with out_of_memory_is_told():
            result = task.function(world, *task.arguments)
        patience = LOST_AFTER
    except BaseException as error:
        if world.meeting is not None:
            world.meeting.fail()
        if not isinstance(error, (dist.DistError, RuntimeError)):
            raise
        if heartbeat is None or not _is_lost_contact(error):
            raise
        raise heartbeat.lost_process() from error
    finally:
        leave(heartbeat, patience)
    return result if world.is_main else None


def _is_lost_contact(error: Exception) -> bool:
    """Return whether an exchange has failed since its other end is gone: of that torch often says no more than the text."""
    words = ("connection closed by peer", "connection reset by peer", "broken pipe", "timed out", "connection refused")
    return isinstance(error, (dist.DistNetworkError, OthersFailed)) or any(word in str(error).lower() for word in words)


def _child(outcome_writer: Any, task_reader: Any, membership: Membership, processes: int) -> None:
    """The main function of a started process: take the task, do it, and send the parent its outcome."""
    torch.set_num_threads(threads_each(processes))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    print_any_name()

    def send(outcome: Outcome) -> None:
        # By value: this process, and any memory it shares, is about to go.
        outcome_writer.send_bytes(pickle.dumps(outcome))

    try:
        task: Task = pickle.loads(task_reader.recv_bytes())
        outcome = Outcome("done", _run_in(membership, task, on_lost=lambda lost: send(Outcome("lost", lost))))
        status = 0
    except LostProcess as lost:
        outcome, status = Outcome("lost", lost), lost.exit_status
    except CacoError as error:
        outcome, status = Outcome("error", _as_our_own(error)), error.exit_status
    except BaseException:
        outcome, status = Outcome("crash", traceback.format_exc()), 1
    send(outcome)
    sys.exit(status)


def threads_each(processes: int) -> int:
    """Return how many threads torch has in each of so many processes: of the cores they may use, and as many as asked for."""
    return max(min(torch.get_num_threads(), len(own_cores()) // processes), 1)


def _as_our_own(error: CacoError) -> CacoError:
    """Return an error as one of those that the parent knows: a caller's own class, or its arguments, may not travel."""
    kind = type(error) if type(error) in (UsageError, Interrupted) else CacoError
    return kind(str(error))


def _end_with_parent() -> None:
    """Wait until the parent is gone, then end: nobody else would end this process, and it holds a GPU."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(EXIT_STATUS)


def _start_processes(task: Task, members: list[Membership]) -> dict[int, Outcome]:
    """Start a process for each member, give it the task, and return the outcomes of all: see `_wait_for_all`."""
    context: Any = multiprocessing.get_context(START_METHOD)
    pickled = pickle.dumps(task)
    processes: list[Any] = []
    outcome_pipes, task_pipes = [], []
    with SignalsToChildren(processes, task.can_resume) as signals:
        for member in members:
            outcome_reader, outcome_writer = context.Pipe(duplex=False)
            task_reader, task_writer = context.Pipe(duplex=False)
            process = context.Process(
                target=_child,
                args=(outcome_writer, task_reader, member, len(members)),
                name=f"{NAME} {member.rank}",
            )
            with without_ctrl_c():
                process.start()
                processes.append(process)
            outcome_writer.close()
            task_reader.close()
            outcome_pipes.append(outcome_reader)
            task_pipes.append(task_writer)
        for pipe in task_pipes:
            _send_task(pipe, pickled)
        outcomes = _wait_for_all(processes, outcome_pipes)
    if any(process.exitcode == UNGUARDED for process in processes):
        raise UsageError(GUARD)
    if any(outcome.kind == "killed" for outcome in outcomes.values()):
        signals.take_effect()
    return outcomes


def _send_task(pipe: Any, task: bytes) -> None:
    """Send a process its task. Not as arguments of its start: to give those to one that has ended takes for ever."""
    with pipe, suppress(OSError):  # it has ended, which `_wait_for_all` finds
        pipe.send_bytes(task)


def _wait_for_all(processes: list[Any], pipes: list[Any]) -> dict[int, Outcome]:
    """Wait for all processes; when one fails, end the others. Return the outcome of each by its number.

    In the order in which they ended; those ended from here are not in it.
    """
    outcomes: dict[int, Outcome] = {}
    waiting: dict[Any, int] = {pipe: number for number, pipe in enumerate(pipes)}
    deadline = None
    while waiting:
        ready = wait(list(waiting), None if deadline is None else max(deadline - time.monotonic(), 0))
        if not ready:
            break
        for pipe in ready:
            number = waiting.pop(pipe)
            try:
                outcomes[number] = pickle.loads(pipes[number].recv_bytes())
            except (EOFError, OSError):
                outcomes[number] = Outcome("killed")
            if deadline is None and outcomes[number].is_failure:
                deadline = time.monotonic() + PATIENCE
    for number in waiting.values():
        processes[number].kill()
    for process in processes:
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()
    return outcomes


def _result(outcomes: dict[int, Outcome], members: list[Membership], hint: str) -> Any:
    """Return the main process's result, or raise the cause of a failure: a lost process is only named without another."""
    for outcome in outcomes.values():
        if outcome.kind == "error":
            raise outcome.value
        if outcome.kind == "crash":
            raise RuntimeError(f"a process failed:\n{outcome.value}")
    for number, outcome in outcomes.items():
        if outcome.kind == "killed":
            rank, size = members[number].rank, members[number].size
            raise CacoError(f"process {rank} of {size} was killed, so all others were stopped.{hint}")
    for outcome in outcomes.values():
        if outcome.kind == "lost":
            raise outcome.value
    return outcomes[0].value
