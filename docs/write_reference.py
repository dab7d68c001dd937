"""Write docs/commands.md: every option of every command, from the dataclasses that define them (`make docs`)."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caco.after_training import Embed, Export, Knn, Linear, Report
from caco.cli import OVERVIEW
from caco.config import Demo, Pretrain
from caco.distributed.heartbeat import EXIT_STATUS
from caco.errors import CacoError, Interrupted, UsageError
from caco.options import _argument, _field_help
from caco.recipes import find_recipe, listing

PAGE = Path(__file__).parent / "commands.md"

COMMANDS: dict[str, Any] = {
    "pretrain": find_recipe(Pretrain.recipe),
    "knn": Knn(),
    "linear": Linear(),
    "embed": Embed(),
    "export": Export(),
    "report": Report(),
    "demo": Demo(),
}
"""Each command's options, with the values they have when not given."""

OPENING = f"""\
# Commands

Written from the code by `make docs`; do not edit.

```
{OVERVIEW}
```

Dashes in a name are underscores in Python: `--batch-size 256` is `batch_size=256`, `--views.size 64` is
`views={{"size": 64}}`. `flag` is given without a value; `--no-…` takes it back. `none` as a default is an empty text.

| exit status | meaning |
| --- | --- |
| 0 | done |
| {CacoError.exit_status} | the work failed |
| {UsageError.exit_status} | wrong usage; nothing was done |
| {Interrupted.exit_status} | stopped by a signal and saved; `--resume` goes on |
| {EXIT_STATUS} | another process of the run was lost; `--resume` goes on from the last checkpoint |
| 130 | stopped by Ctrl-C without saving (all commands but `pretrain`; `pretrain` while it prepares, or by the second Ctrl-C) |
"""


def page() -> str:
    """Return the whole page."""
    sections = [OPENING, *(_section(name, values) for name, values in COMMANDS.items()), _recipes()]
    return "\n".join(sections)


def _section(name: str, values: Any) -> str:
    positional = [
        field.metadata["positional"] for field in dataclasses.fields(values) if "positional" in field.metadata
    ]
    words = [f"## caco {name}", "", inspect.getdoc(type(values)) or "", ""]
    words += [f"`{' '.join(['caco', name, *positional, '[options]'])}`", ""]
    if isinstance(values, Pretrain):
        words += [f"Defaults are those of the recipe `{values.recipe}`; another recipe has its own.", ""]
    for heading, group, prefix in _groups(values):
        words += [heading + "\n".join(_table(group, prefix)), ""]
    return "\n".join(words)


def _groups(values: Any) -> Iterator[tuple[str, Any, str]]:
    """Yield (heading, options, prefix): the command's own options first, then each group."""
    yield "", values, ""
    for field in dataclasses.fields(values):
        group = getattr(values, field.name)
        if dataclasses.is_dataclass(group):
            # The first sentence: what follows may speak of the published defaults, and those shown are a recipe's.
            about = (inspect.getdoc(type(group)) or "").split(". ")[0].removesuffix(".")
            yield f"### {field.name}\n\n{about}.\n\n", group, f"{field.name}."


def _table(values: Any, prefix: str) -> list[str]:
    hints, helps = typing.get_type_hints(type(values)), _field_help(type(values))  # type: ignore[arg-type]
    rows = ["| option | type | default | |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(values):
        value, hint = getattr(values, field.name), hints[field.name]
        if dataclasses.is_dataclass(hint):
            continue
        name = field.metadata.get("positional") or f"--{prefix}{field.name}".replace("_", "-")
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        cells = [f"`{name}`", f"`{_kind(hint)}`", f"`{shown or 'none'}`", helps[field.name]]
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return rows


def _kind(hint: Any) -> str:
    """Return the words for a type: `float`, `int|auto`, `float float`, `int …`, `flag`."""
    keywords = _argument(hint)
    if "metavar" not in keywords:
        return "flag"
    count, word = keywords.get("nargs", 1), keywords["metavar"]
    word = {"str": "text"}.get(word, word)
    return f"{word} …" if count == "+" else " ".join([word] * count)


def _recipes() -> str:
    return f"""\
## caco recipes

List the named recipes, or print one whole: `caco recipes NAME`. `caco pretrain --recipe NAME` starts from it.
NAME may also be the folder of a run, or its `config.json`: all that it computes, without `--data`, `--val` and `--out`,
which belong to that run alone, and without what belongs to its machine (`--device`, `--workers`, `--distributed`).

```
{listing()}
```
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
