"""What the benchmarks share: the machine in words, contestants that take turns, fresh processes with their memory, tables.

Not a benchmark itself. A benchmark is `python benchmarks/NAME.py [--quick] [--out FILE.json] [--device cpu]`:

    options = arguments(__doc__).parse_args()
    seconds = take_turns({"ours": ours, "plain": plain}, rounds=9)          # calls in this process
    row = fresh(contestant, "lightly", steps)                               # one in a process of its own
    print(table(("contestant", "ms"), [...]))
    save(options, {...})
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from linux import FamilyMemory, busy_seconds, processor

from caco.cli import BRIEF_WAITS
from caco.train.heap import NO_SMALL_BLOCKS_APART

CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""Named in the description of the machine if it has them: they decide how fast bf16 is."""


def arguments(
    documentation: str, out: tuple[str, str] = ("FILE.json", "write all numbers to this file")
) -> argparse.ArgumentParser:
    """Return a parser with the options every benchmark has: --quick, --out (its value and help), --device."""
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds: does it work?")
    parser.add_argument("--out", type=Path, metavar=out[0], help=out[1])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    return parser


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return what a reader must know of the machine to judge a time, and how busy it is now."""
    information = processor()
    flags = set(information.get("flags", information.get("Features", "")).split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    described: dict[str, Any] = {
        "processor": information.get("model name") or platform.processor() or platform.machine(),
        "cores": cores,
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    if torch.device(device).type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def describe(device: torch.device | str = "cpu") -> str:
    """Return the machine as one line."""
    about = machine(device)
    where = f"{about['gpu']}; " if "gpu" in about else ""
    flags = ", ".join(about["flags"])
    return (
        f"{where}{about['cores']} cores ({flags or about['processor']}), torch {about['torch']}, "
        f"{about['threads']} threads, load {about['load_average']}"
    )


@dataclass(frozen=True)
class Seconds:
    """The times of one contestant, a call each."""

    all: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.all)

    @property
    def least(self) -> float:
        return min(self.all)

    @property
    def most(self) -> float:
        return max(self.all)

    def as_json(self) -> dict[str, Any]:
        return {"median": self.median, "least": self.least, "most": self.most, "all": list(self.all)}


def synchronise(device: torch.device | str) -> None:
    """Wait until a GPU has done what it was told; nothing to wait for elsewhere."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    contestants: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1, device: torch.device | str = "cpu"
) -> dict[str, Seconds]:
    """Time each contestant once a round, so that a busy machine disturbs all alike; every other round goes backwards.

    The first `warm_up` rounds are not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(warm_up + rounds):
        order = list(contestants) if turn % 2 == 0 else list(reversed(contestants))
        for name in order:
            synchronise(device)
            began = time.perf_counter()
            contestants[name]()
            synchronise(device)
            if turn >= warm_up:
                times[name].append(time.perf_counter() - began)
    return {name: Seconds(tuple(values)) for name, values in times.items()}


class Others:
    """How much the machine did besides: `with Others() as others: ...`, then `others.cores`.

    The cores that other programs kept busy meanwhile, on average; None where /proc does not tell. A time taken while
    others worked measures nothing: two threads that wait for each other suffer far more than in proportion.
    """

    cores: float | None = None

    def __enter__(self) -> Others:
        self._began = time.perf_counter(), self._own(), busy_seconds()
        return self

    def __exit__(self, *error: object) -> None:
        wall, own, busy = self._began
        now = busy_seconds()
        if busy is not None and now is not None:
            others = now - busy - (self._own() - own)
            self.cores = round(max(0.0, others / (time.perf_counter() - wall)), 2)

    @staticmethod
    def _own() -> float:
        return sum(os.times()[:4])  # with children that have ended


@dataclass(frozen=True)
class Fresh:
    """What came out of a process of its own, and the most memory it held; bytes, None where /proc does not tell."""

    result: Any
    others: float | None
    """Cores that other programs kept busy meanwhile (`Others`)."""
    main_bytes: int | None
    """Resident memory of the process itself."""
    family_bytes: int | None
    """The same with its children: of pages that several share, a child counts its part only."""


def fresh(function: Callable[..., Any], *values: Any, environment: Mapping[str, str] | None = None) -> Fresh:
    """Call a function of a module in a new Python (spawned, not forked); its result and values must be picklable.

    environment: variables to set in it. Raises RuntimeError with the traceback of what went wrong there.
    """
    others = Others()
    with others:
        good, result, memory = _spawn(function, values, environment or {})
    if not good:
        raise RuntimeError(f"{function.__name__}{values}:\n{result}")
    return Fresh(result, others.cores, memory.main, memory.family)


def as_a_run(keeps_heap: bool = True) -> dict[str, str]:
    """Return what `caco pretrain` adds to its environment on a CPU: not what has been set."""
    waits = {} if "OMP_WAIT_POLICY" in os.environ else BRIEF_WAITS
    added = {**waits, **(NO_SMALL_BLOCKS_APART if keeps_heap else {})}
    return {name: value for name, value in added.items() if name not in os.environ}


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table; the first column is words, the others numbers. None is left empty."""
    cells = [["" if value is None else str(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]

    def line(values: Sequence[str]) -> str:
        first, *others = (f"{value:{'<' if place == 0 else '>'}{widths[place]}}" for place, value in enumerate(values))
        return "| " + " | ".join([first, *others]) + " |"

    rule = (
        "|"
        + "|".join("-" * (width + 2) if place == 0 else "-" * (width + 1) + ":" for place, width in enumerate(widths))
        + "|"
    )
    return "\n".join([line(columns), rule, *map(line, cells)])


def gigabytes(count: int | None) -> str | None:
    """Return bytes in GB (10^9) with two decimals."""
    return None if count is None else f"{count / 1e9:.2f}"


def save(options: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Write the numbers, the machine and the options (of files the names only) to --out, if it was given."""
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        given = {name: value.name if isinstance(value, Path) else value for name, value in vars(options).items()}
        whole = {"machine": machine(options.device), "options": given, **result}
        options.out.write_text(json.dumps(whole, indent=2) + "\n")


def _spawn(
    function: Callable[..., Any], values: tuple[Any, ...], environment: Mapping[str, str]
) -> tuple[bool, Any, FamilyMemory]:
    """Return whether it went well, the result or else the traceback, and the memory; the process has ended."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, values, os.getpid()))
    with _variables(environment):
        process.start()
    sender.close()
    memory = FamilyMemory(process.pid or 0)
    with memory:
        try:
            good, result = receiver.recv()
        except EOFError:
            process.join()
            raise RuntimeError(
                f"{function.__name__}{values} ended without an answer (exit {process.exitcode})"
            ) from None
    process.join()
    return good, result, memory


def _answer(sender: Connection, function: Callable[..., Any], values: tuple[Any, ...], parent: int) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        answer: tuple[bool, Any] = True, function(*values)
    except BaseException:
        answer = False, traceback.format_exc()
    sender.send(answer)


def _end_with(parent: int) -> None:
    """End this process when its parent is no more: a benchmark that was killed keeps no core busy."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


@contextlib.contextmanager
def _variables(environment: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
