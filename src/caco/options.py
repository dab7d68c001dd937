"""Dataclasses to command-line options and back; the standard library's argparse does the parsing.

A field is a flag, its type is the check, the string under it is the help. Nested dataclasses become groups
(`--views.size`). Errors are one line with the nearest valid choice.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import functools
import inspect
import numbers
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar, Union

from caco.errors import UsageError, did_you_mean

T = TypeVar("T")


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are exceptions."""

    def print_help(self, file: Any = None) -> None:
        with contextlib.suppress(BrokenPipeError):  # `| head -1` has seen enough; Python 3.11 sees to it by itself
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message.removeprefix('argument ')} (all options: {self.prog} --help)")


def parse(kind: type[T], arguments: Sequence[str], prog: str, start: Callable[[dict[str, Any]], T]) -> T:
    """Parse arguments into a `kind`: `start(given)` returns the values for all options that were not given.

    given maps option names ("lr", "views.size") to values; what `start` takes out of it counts as not given. Raises
    UsageError; exits after `--help`.
    """
    parser = _Parser(
        prog=prog,
        usage=" ".join(["%(prog)s", *_positionals(kind), "[options]"]),
        description=inspect.getdoc(kind),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=34, width=110),
    )
    _add_options(parser, kind, start({}), "")
    namespace, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        name = unknown[0].partition("=")[0]
        is_option = name.startswith("-")
        what = f"unknown option {name}.{did_you_mean(name, known)}" if is_option else _stray(name)
        raise UsageError(f"{what} (all options: {prog} --help)")
    given = vars(namespace)
    return override(start(given), given)


def _positionals(kind: type) -> list[str]:
    return [field.metadata["positional"] for field in dataclasses.fields(kind) if "positional" in field.metadata]


def _stray(word: str) -> str:
    """Return the question about a word that belongs to no option, and what was probably meant."""
    question = f"what is {word!r} for?"
    if word.lower() in ("true", "false"):
        return f"{question} A yes is the option alone, a no is --no- and its name"
    if os.path.exists(word):  # the shell has made many names of `photos/*.jpg`
        return f"{question} Quote a pattern ('photos/*.jpg'), or name the folder; each name follows its option"
    return question


def override(values: T, given: dict[str, Any]) -> T:
    """Return values with `given` ("views.size": 32) put in place."""
    changes: dict[str, Any] = {}
    for name, value in given.items():
        head, _, rest = name.partition(".")
        if rest:
            changes[head] = override(changes.get(head, getattr(values, head)), {rest: value})
        else:
            changes[head] = value
    return dataclasses.replace(values, **changes)  # type: ignore[type-var]


def checked(kind: type, given: dict[str, Any]) -> dict[str, Any]:
    """Return values by dotted names as the options of `kind` take them: paths as text, lists as tuples.

    For values that did not come through `parse`. Raises UsageError for one of another type.
    """
    return {name: _fitted(name, _hint(kind, name), value) for name, value in given.items()}


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Return every option of a dataclass by its dotted name."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        if dataclasses.is_dataclass(value):
            flat.update(flatten(value, f"{prefix}{field.name}."))
        else:
            flat[prefix + field.name] = value
    return flat


def words(values: Any, before: Any = None) -> Iterator[tuple[str, ...]]:
    """Yield each option of a dataclass as it is typed: its flag and its value, to be quoted for a shell.

    before: leave out what is the same there. Positional options and empty texts are left out.
    """
    same = {} if before is None else flatten(before)
    positional = {field.name for field in dataclasses.fields(values) if "positional" in field.metadata}
    for name, value in flatten(values).items():
        if name in positional or value in ("", ()) or (name in same and same[name] == value):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            yield (f"--{flag}" if value else f"--no-{flag}",)
        else:
            yield (f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,)))


def from_dictionary(kind: type[T], values: Any) -> T:
    """Return a `kind` from what `dataclasses.asdict` and JSON made of one.

    Raises UsageError for anything else: unknown names, values of another type.
    """
    where = f"in the configuration of {kind.__name__}"
    if not isinstance(values, dict):
        raise UsageError(f"{values!r:.60} is not a group of settings {where}")
    hints = typing.get_type_hints(kind)
    unknown = set(values) - set(hints)
    if unknown:
        raise UsageError(f"unknown setting {sorted(unknown)[0]!r} {where}")
    arguments = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            arguments[name] = from_dictionary(hints[name], value)
            continue
        try:
            arguments[name] = _fitted(name, hints[name], value)
        except UsageError as error:
            raise UsageError(f"wrong setting {where}: {error}") from error
    return kind(**arguments)


def _add_options(parser: Any, kind: type, defaults: Any, prefix: str) -> None:
    hints, helps = typing.get_type_hints(kind), _field_help(kind)
    for field in dataclasses.fields(kind):
        hint, default = hints[field.name], getattr(defaults, field.name)
        if dataclasses.is_dataclass(hint):
            group = parser.add_argument_group(field.name, inspect.getdoc(hint))
            _add_options(group, hint, default, f"{prefix}{field.name}.")  # type: ignore[arg-type]
            continue
        help_text = helps.get(field.name, "").replace("%", "%%")
        if "positional" in field.metadata:
            parser.add_argument(field.name, metavar=field.metadata["positional"], nargs="?", help=help_text)
            continue
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
        help_text += f" [{shown or 'none'}]"
        flag = f"--{prefix}{field.name}".replace("_", "-")
        parser.add_argument(flag, dest=prefix + field.name, help=help_text, **_argument(hint))


def _hint(kind: type, name: str) -> Any:
    """Return the type of an option by its dotted name."""
    head, _, rest = name.partition(".")
    hint = typing.get_type_hints(kind)[head]
    return _hint(hint, rest) if rest else hint


def _fitted(name: str, hint: Any, value: Any) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and Ellipsis in inner and isinstance(value, numbers.Number):
        value = (value,)
    if origin is tuple and isinstance(value, (tuple, list)):
        hints = [inner[0]] * len(value) if Ellipsis in inner else inner
        if len(hints) == len(value) > 0:
            return tuple(_fitted(name, part, item) for part, item in zip(hints, value, strict=True))
    elif origin is typing.Literal:
        if value in inner:
            return value
    elif origin in (Union, types.UnionType):
        number = next(part for part in inner if part in (int, float))
        words = [word for part in inner for word in typing.get_args(part)]
        return value if value in words else _fitted(name, number, value)
    elif hint is str and isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    elif hint is bool and isinstance(value, bool):
        return value
    elif hint in (int, float) and isinstance(value, numbers.Number) and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError, OverflowError):  # no whole number is like nan or infinity
            if hint(value) == value or value != value:
                return hint(value)
    wanted = {bool: "True or False", str: "text or a path"}.get(hint) or _argument(hint)["metavar"]
    count = f"{len(inner)} x " if origin is tuple and Ellipsis not in inner else ""
    near = did_you_mean(value, inner) if origin is typing.Literal and isinstance(value, str) else ""
    shown = repr(value) if isinstance(value, (str, int, float, tuple, list, type(None))) else type(value).__name__
    raise UsageError(f"{name}={shown}: must be {count}{wanted}.{near}")


def _argument(hint: Any) -> dict[str, Any]:
    """Return argparse's keywords for a type."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return {**_argument(inner[0]), "nargs": "+" if Ellipsis in inner else len(inner), "action": _StoreTuple}
    if origin is typing.Literal:
        return {"type": _choice(inner), "metavar": "|".join(inner)}
    if origin in (Union, types.UnionType):  # one type, or a word such as auto
        words = tuple(word for part in inner for word in typing.get_args(part))
        (number,) = [part for part in inner if part in (int, float)]
        return {"type": _number_or_word(number, words), "metavar": "|".join([number.__name__, *words])}
    return {"type": hint, "metavar": hint.__name__}


class _StoreTuple(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(values))


def _choice(choices: tuple[str, ...]) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not one of {', '.join(choices)}.{did_you_mean(text, choices)}"
            )
        return text

    return convert


def _number_or_word(number: type, words: tuple[str, ...]) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        if text in words:
            return text
        try:
            return number(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {', '.join(words)}") from None

    return convert


@functools.cache
def _field_help(kind: type) -> dict[str, str]:
    """Return the string that stands under each field of a dataclass and of its bases."""
    helps: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        module = sys.modules.get(owner.__module__)
        if not dataclasses.is_dataclass(owner) or module is None:
            continue
        body = _class_bodies(inspect.getsourcefile(module) or "")[owner.__name__]
        for field, below in zip(body, body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                helps[ast.unparse(field.target)] = str(below.value.value)
    return helps


@functools.cache
def _class_bodies(path: str) -> dict[str, list[ast.stmt]]:
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    return {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}
