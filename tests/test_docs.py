"""The documentation is true of the commands as they are: the reference is up to date, every command line parses."""

import ast
import graphlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from caco.after_training import Embed, Export, Knn, Linear, Report
from caco.cli import COMMANDS
from caco.config import Demo, Pretrain
from caco.errors import UsageError
from caco.options import parse
from caco.recipes import find_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
KINDS = {kind.__name__.lower(): kind for kind in (Pretrain, Knn, Linear, Embed, Export, Report, Demo)}

CALL = re.compile(r"(?<![\w./-])(?:\S*/bin/)?caco +(?=[a-z-])(.*)")
PLACEHOLDER = re.compile(r"\$.*|\[?[A-Z][A-Z_|]*\]?|<.*>")
ENDS = ("|", "||", "&&", "&", ";", ">", "<", "2>&1", "2>", ">>")


def code_of(text: str) -> list[str]:
    """Return the lines of all code blocks (continued lines joined), and all code within sentences."""
    blocks = re.findall(r"^```(?!python)[^\n]*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`([^`]+)`", prose.replace("\\|", "|"))
    return lines + [" ".join(span.split()) for span in spans]


def command_lines(text: str) -> list[str]:
    """Return what follows `caco` in every command line: without remarks, which stand behind two blanks or a #."""
    calls = [CALL.search(line) for line in code_of(text)]
    return [re.split(r" {2,}| #", call[1])[0].strip() for call in calls if call]


def read(line: str) -> object:
    """Parse a command line without running it; raises UsageError. Placeholders (RUN, $N, …) stand for any value."""
    words = []
    for word in shlex.split(line):
        if word in ENDS:
            break
        if word not in ("…", "...", "[options]"):
            words.append("1" if PLACEHOLDER.fullmatch(word) else re.sub(r"(?<=\w)[.,;:)\]]+$", "", word))
    command, *rest = words
    if command in ("COMMAND", "--help", "--version"):
        return command
    if command not in COMMANDS:
        raise UsageError(f"there is no command {command!r}")
    if "--help" in rest:
        return command
    if command == "recipes":
        return [find_recipe(name) for name in rest if name != "1"]
    kind = KINDS[command]

    def start(given: dict) -> object:
        recipe = given.get("recipe", "1")
        is_run = recipe.startswith("runs/")
        return kind() if kind is not Pretrain or recipe == "1" or is_run else find_recipe(recipe)

    return parse(kind, rest, f"caco {command}", start)


def test_the_command_reference_is_up_to_date():
    """If not: make docs."""
    path = ROOT / "docs" / "write_reference.py"
    spec = importlib.util.spec_from_file_location("write_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page()
    assert set(module.COMMANDS) == set(COMMANDS) - {"recipes"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_line_parses(page):
    for line in command_lines(page.read_text(encoding="utf-8")):
        try:
            read(line)
        except UsageError as error:
            pytest.fail(f"{page.name}: caco {line}: {error}")


def test_command_lines_are_found():
    text = """\
Say `caco knn RUN --data
train` or `caco recipes [NAME]`, not caco.

```
$ caco pretrain --data photos/ \\
    --out runs/first  # a remark
srun .venv/bin/caco linear RUN|FILE --lr 0.1 > log   (another)
caco: an error message
```

```python
import caco
```
"""
    assert command_lines(text) == [
        "pretrain --data photos/ --out runs/first",
        "linear RUN|FILE --lr 0.1 > log",
        "knn RUN --data train",
        "recipes [NAME]",
    ]
    assert "pretrain --data photos/ --out runs/first" in command_lines((ROOT / "README.md").read_text("utf-8"))


@pytest.mark.parametrize(
    "line",
    [
        "pretrain --bach-size 8",
        "train --data x",
        "recipes cifr",
        "knn RUN --neighbours many",
        "linear RUN --views.size 8",
    ],
)
def test_wrong_command_lines_are_caught(line):
    with pytest.raises(UsageError):
        read(line)


def test_placeholders_are_any_value():
    config = read("pretrain --epochs N --views.area LEAST MOST --distributed.machine $SLURM_NODEID … --lr 0.1")
    assert (config.epochs, config.views.area, config.lr) == (1, (1.0, 1.0), 0.1)
    assert read("linear RUN|FILE --lr 0.1 > log").lr == 0.1


def imports_of(path: Path, modules: set[str]) -> set[str]:
    """Return the modules of the package that a file imports when it runs, inside functions, too."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {name for alias in node.names if (name := f"{node.module}.{alias.name}") in modules}
            found |= {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & modules


def test_imports_have_no_cycle():
    """docs/architecture.md: no module imports itself by any way round. (A package's own file runs before its modules.)"""
    source = ROOT / "src"
    files = {
        ".".join(path.relative_to(source).with_suffix("").parts): path
        for path in source.rglob("*.py")
        if path.name != "__init__.py"
    }
    graph = {name: imports_of(path, set(files)) for name, path in files.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("caco.bank") < order.index("caco.model") < order.index("caco.train.run")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_function_that_a_page_names_is_there(page):
    """`model.py: CaCo.forward`, `data/loader.py` and links to other pages."""
    text = page.read_text("utf-8")
    source = ROOT / "src" / "caco"
    for name, path, part in re.findall(r"`((?:caco/)?([a-z_]+(?:/[a-z_]+)*\.py)(?:: ([\w.]+))?)`", text):
        places = [source / path, ROOT / path, source / path.removeprefix("caco/"), *source.glob(f"*/{path}")]
        found = [place for place in places if place.exists()]
        assert found, f"{page.name}: {name}"
        defined = re.findall(r"^ *(?:def |class |self\.|)(\w+) ?[(:=]", found[0].read_text("utf-8"), flags=re.MULTILINE)
        assert set(part.split(".")) <= {*defined, ""}, f"{page.name}: {name}"
    for target in re.findall(r"\]\(([\w./-]+\.md)", text):
        assert (page.parent / target).exists(), f"{page.name}: {target}"
