"""The flags of the published programs: read as theirs; those without effect are named."""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from caco.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class Flag:
    """One published flag."""

    name: str
    default: Any
    help: str
    other: tuple[str, ...] = ()
    """Further spellings."""
    kind: type = str
    """Its type where the default does not say it."""
    idle: str = ""
    """Why it has no effect, if it has none."""

    def add_to(self, parser: argparse.ArgumentParser, dash: str) -> None:
        """Add the flag to a parser, with `dash` between the words of its names."""
        names = [name if len(name) == 2 else _spelled(name, dash) for name in (f"--{self.name}", *self.other)]
        text = f"{self.help} [{_shown(self.default)}]" + (f" (no effect: {self.idle})" if self.idle else "")
        keywords: dict[str, Any] = {"dest": self.name, "help": text.replace("%", "%%")}
        if isinstance(self.default, bool):
            keywords |= {"action": "store_true"}
        elif isinstance(self.default, list):
            keywords |= {"type": type(self.default[0]), "nargs": "+", "metavar": "N"}
        else:
            kind = self.kind if self.default is None else type(self.default)
            keywords |= {"type": kind, "metavar": {str: "TEXT", int: "N", float: "X"}[kind]}
        parser.add_argument(*names, **keywords)


@dataclass(frozen=True)
class Flags:
    """What was read: all values, and which of them were given."""

    values: dict[str, Any]
    given: frozenset[str]

    def __getattr__(self, name: str) -> Any:
        return self.values[name]


def read_flags(program: str, about: str, flags: Sequence[Flag], arguments: Sequence[str], dash: str) -> Flags:
    """Return the values of all flags; dash: "-" or "_", as the program spells them (both are read).

    Says on stderr, in one line, which of those given have no effect. Raises UsageError; exits after `--help`.
    """
    parser = _Parser(
        prog=program,
        usage="%(prog)s [flags]",
        description=about,
        argument_default=argparse.SUPPRESS,
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=34, width=110),
    )
    for flag in flags:
        flag.add_to(parser, dash)
    namespace, unknown = parser.parse_known_args([_spelled(argument, dash) for argument in arguments])
    if unknown:
        name = unknown[0].partition("=")[0]
        near = did_you_mean(name, [option for action in parser._actions for option in action.option_strings])
        what = f"unknown flag {name}.{near}" if name.startswith("-") else f"what is {name!r} for?"
        raise UsageError(f"{what} (all flags: {program} --help)")
    given = vars(namespace)
    idle = [f"{_spelled('--' + flag.name, dash)} ({flag.idle})" for flag in flags if flag.idle and flag.name in given]
    if idle:
        print(f"{program}: without effect: {', '.join(idle)}", file=sys.stderr)
    return Flags({**{flag.name: flag.default for flag in flags}, **given}, frozenset(given))


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are exceptions."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message.removeprefix('argument ')} (all flags: {self.prog} --help)")


def check_file(flag: str, name: str) -> Path:
    """Return the path of a file or folder that a flag names. Raises UsageError, with the nearest, when it is not there."""
    path = Path(name)
    if not path.exists():
        near = did_you_mean(path.name, [other.name for other in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise UsageError(f"{flag}: there is no file {path}.{near}")
    return path


def _spelled(argument: str, dash: str) -> str:
    """Return `--some_flag=value` with `dash` between the words of its name; anything else as it is."""
    if not re.match(r"--[A-Za-z]", argument):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + re.sub("[-_]", dash, name[2:]) + equals + value


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else "none" if value in (None, "") else str(value)
