"""Start a command in as many processes as it should have, and bring its result or its error back."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from caco.config import DistributedOptions
from caco.distributed.heartbeat import EXIT_STATUS, HINT, Heartbeat, name_lost_process
from caco.distributed.world import Place, World, choose_device, find_place, join, leave
from caco.errors import CacoError, Interrupted, UsageError
from caco.files import print_any_name
from caco.memory import out_of_memory_is_told

T = TypeVar("T")

PATIENCE = 8.0
"""Seconds that processes have to end by themselves after one has failed."""

NAME = "caco process"
"""What the processes that are started here are called, before their number."""

UNGUARDED = 78
"""Exit status of a process that met a call of `launch` when it imported the caller's script."""

GUARD = (
    "every process imports your script, and would start the run again: put the call of caco under "
    '`if __name__ == "__main__":`'
)


def launch(
    function: Callable[..., T], options: DistributedOptions, device: str, *arguments: Any, saves: bool = False
) -> T | None:
    """Call function(world, *arguments) in every process of the run; return the main process's result (None elsewhere).

    Started by torchrun or SLURM, this process is one of the run's. Otherwise one process for each GPU (or as many as
    asked for) is started here; a single one runs in this process, without a process group. Errors of any process come
    back as the CacoError they were. A script that would call this in every process again is a UsageError.

    saves: the function saves when it gets SIGTERM, and can resume. Otherwise a signal to this process ends all at once,
    and has its usual effect here: Ctrl-C is a KeyboardInterrupt.
    """
    if _is_importing_the_script():
        sys.exit(UNGUARDED)  # the process that started this one tells it, once
    place = find_place(os.environ)
    if place is not None:
        return _run_in(place, options.timeout, function, device, arguments, saves)
    processes = _processes(options, device)
    if options.machines == 1 and processes == 1:
        with out_of_memory_is_told():
            return function(World(choose_device(device)), *arguments)
    address, port = _meeting_point(options)
    first = options.machine * processes
    size, supervised = options.machines * processes, options.machines == 1
    places = [Place(first + number, size, number, address, port, supervised) for number in range(processes)]
    return _spawn(places, options.timeout, function, device, arguments, saves)


def _is_importing_the_script() -> bool:
    """Return whether this process was started by `launch` and has not come to its work yet."""
    process = multiprocessing.current_process()
    return process.name.startswith(NAME) and getattr(process, "_inheriting", False)


def _processes(options: DistributedOptions, device: str) -> int:
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


def _run_in(
    place: Place, timeout: float, function: Callable[..., T], device: str, arguments: tuple[Any, ...], saves: bool
) -> T | None:
    Heartbeat.hint = HINT if saves else ""
    world = join(place, device, timeout)
    try:
        with out_of_memory_is_told():
            result = function(world, *arguments)
    except (dist.DistError, RuntimeError) as error:
        if not _is_lost_contact(error):
            leave(PATIENCE / 2)
            raise
        lost = name_lost_process()
        leave(PATIENCE / 2)
        raise CacoError(f"process {world.rank} of {world.size} stops: {lost}.{Heartbeat.hint}") from error
    except BaseException:
        leave(PATIENCE / 2)  # the others may be waiting in an exchange, and end only when this process does
        raise
    leave()
    return result if world.is_main else None


def _is_lost_contact(error: Exception) -> bool:
    words = ("connection closed by peer", "connection reset by peer", "broken pipe", "timed out", "connection refused")
    return isinstance(error, dist.DistNetworkError) or any(word in str(error).lower() for word in words)


def _child(pipe: Any, work: Any, place: Place, processes: int) -> None:
    """The main function of a started process: take work, send ("done", result) or (kind of error, message) to the parent."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    print_any_name()

    def tell(reason: str) -> None:
        pipe.send_bytes(pickle.dumps(("CacoError", reason)))

    Heartbeat.tell = staticmethod(tell)
    try:
        message: tuple[str, Any] = "done", _run_in(place, *pickle.loads(work.recv_bytes()))
        status = 0
    except CacoError as error:
        message, status = (type(error).__name__, str(error)), error.exit_status
    except BaseException:
        message, status = ("crash", traceback.format_exc()), 1
    pipe.send_bytes(pickle.dumps(message))  # by value: this process, and any memory it shares, is about to go
    sys.exit(status)


def _end_with_parent() -> None:
    """Wait until the parent is gone, then end: nobody else would end this process, and it holds a GPU."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(EXIT_STATUS)


def _spawn(
    places: list[Place],
    timeout: float,
    function: Callable[..., T],
    device: str,
    arguments: tuple[Any, ...],
    saves: bool,
) -> T | None:
    context = multiprocessing.get_context("spawn")
    work = pickle.dumps((timeout, function, device, arguments, saves))
    processes: list[Any] = []
    pipes, orders = [], []
    with _Signals(processes, saves) as signals:
        for place in places:
            receiving, sending = context.Pipe(duplex=False)
            taking, giving = context.Pipe(duplex=False)
            process = context.Process(
                target=_child, args=(sending, taking, place, len(places)), name=f"{NAME} {place.rank}"
            )
            with _without_ctrl_c():
                process.start()
                processes.append(process)
            sending.close()
            taking.close()
            pipes.append(receiving)
            orders.append(giving)
        for giving in orders:
            _give(giving, work)
        messages = _collect(processes, pipes)
    if any(process.exitcode == UNGUARDED for process in processes):
        raise UsageError(GUARD)
    if None in messages.values():
        signals.take_effect()
    result: T | None = _outcome(messages, places, HINT if saves else "")
    return result


def _give(pipe: Any, work: bytes) -> None:
    """Send a process its work. Not as arguments of its start: to give those to one that has ended takes for ever."""
    with pipe, suppress(OSError):  # it has ended, which `_collect` finds
        pipe.send_bytes(work)


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """While entered, Ctrl-C waits. A process started here never gets one: the terminal sends it to all, and only the
    parent decides what it means."""
    resource_tracker.ensure_running()  # the first process would start it, and it lets Ctrl-C through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _collect(processes: list[Any], pipes: list[Any]) -> dict[int, tuple[str, Any] | None]:
    """Wait for all processes; when one fails, end the others. Return each one's message (None: it was killed).

    In the order in which they ended; those ended from here are not in it.
    """
    messages: dict[int, tuple[str, Any] | None] = {}
    waiting: dict[Any, int] = {pipe: number for number, pipe in enumerate(pipes)}
    deadline = None
    while waiting:
        ready = wait(list(waiting), None if deadline is None else max(deadline - time.monotonic(), 0))
        if not ready:
            break
        for pipe in ready:
            number = waiting.pop(pipe)
            try:
                message = pickle.loads(pipes[number].recv_bytes())
            except (EOFError, OSError):
                message = None
            messages[number] = message
            if deadline is None and (message is None or message[0] not in ("done", "Interrupted")):
                deadline = time.monotonic() + PATIENCE
    for number in waiting.values():
        processes[number].kill()
    for process in processes:
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()
    return messages


def _outcome(messages: dict[int, tuple[str, Any] | None], places: list[Place], hint: str) -> Any:
    """Return the main process's result, or raise the cause of a failure: not what others said of losing a process."""
    kinds: dict[str, type[CacoError]] = {"UsageError": UsageError, "Interrupted": Interrupted, "CacoError": CacoError}
    said = [message for message in messages.values() if message is not None and message[0] != "done"]
    said.sort(key=lambda message: " stops: process " in message[1] or " stops: another process" in message[1])
    killed = [places[number].rank for number, message in messages.items() if message is None]
    if killed and (not said or " stops: " in said[0][1]):
        raise CacoError(f"process {killed[0]} of {places[0].size} was killed, so all others were stopped.{hint}")
    for kind, text in said:
        if kind == "crash":
            raise RuntimeError(f"a process failed:\n{text}")
        raise kinds.get(kind, CacoError)(text)
    message = messages[0]
    return message[1] if message else None


class _Signals:
    """While entered, SIGTERM and Ctrl-C to this process reach its children: as SIGTERM where they save, else as SIGKILL.

    A second Ctrl-C is always SIGKILL.
    """

    def __init__(self, processes: list[Any], saves: bool) -> None:
        """processes: those started so far; may grow."""
        self.processes, self.saves = processes, saves
        self._last: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def take_effect(self) -> None:
        """Do what the last signal, if there was one, does to a process that does not catch it."""
        if self._last == signal.SIGINT:
            raise KeyboardInterrupt
        if self._last is not None:
            signal.raise_signal(self._last)

    def _pass_on(self, number: int, frame: Any) -> None:
        kill = not self.saves or (self._last is not None and number == signal.SIGINT)
        self._last = number
        for process in self.processes:
            if process.is_alive():
                process.kill() if kill else process.terminate()
