"""The `caco` command: parse, run, and turn every error into one line and an exit status.

Exit status: 0 done · 1 the work failed · 2 wrong usage, nothing was done · 75 stopped by a signal and saved · 76 another process
of the run was lost · 130 stopped by Ctrl-C without saving.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from caco.after_training import BASELINES, Embed, Evaluation, Export, Judging, Knn, Linear, Report
from caco.checks import check, check_judged, check_numbers
from caco.config import Demo, DistributedOptions, Pretrain
from caco.errors import CacoError, UsageError, did_you_mean
from caco.files import check_encoder_is_there, print_any_name, refused
from caco.options import parse
from caco.recipes import find_recipe, listing, whole
from caco.train.heap import begin_anew_with_few_gaps, keep_heap

OVERVIEW = """\
usage: caco COMMAND [options]

Pre-train an image encoder without labels (CaCo), judge it, and take it away.

  caco demo                                         a whole run on built-in pictures, in a few minutes
  caco pretrain --data photos/ --out runs/first     pre-train on any folder of images
  caco knn RUN --data train/ --val val/             judge it by nearest neighbours
  caco linear RUN --data train/ --val val/          judge it by a linear classifier
  caco embed RUN --data photos/ --out features.npz  one feature vector for each image (.npz or .parquet)
  caco export RUN --format timm --out FILE          the encoder for timm, torchvision or the published code
  caco report RUN                                   a page to look at
  caco recipes [NAME]                               named settings

Every command: --help. Version: caco --version."""


BRIEF_WAITS = {"GOMP_SPINCOUNT": "10000"}
"""Environment of a program whose threads (libgomp's) sleep soon when they wait."""


def wait_briefly() -> None:
    """Let torch's threads wait for each other without keeping a core busy for long; called before torch is loaded.

    A thread that spins keeps the one it waits for from its core: that of another program, by which a run can take many
    times as long, or one of ours that runs compiled code (docs/what-paid.md). What the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in BRIEF_WAITS.items():
            os.environ.setdefault(name, value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    wait_briefly()
    if arguments is None:
        begin_anew_with_few_gaps(given)
    return exit_status(lambda: _dispatch(given), "caco")


def exit_status(work: Callable[[], int | None], program: str) -> int:
    """Do the work and return its exit status (None: 0); an error becomes one line that begins with the program's name."""
    print_any_name()
    try:
        status = _told_of_memory(work) or 0
        sys.stdout.flush()  # here it can still be told that nothing was written
        return status
    except SystemExit as done:  # argparse, after --help
        return int(done.code or 0)
    except CacoError as error:
        print(f"{program}: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print(f"{program}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        print(f"{program}: not all was told: whoever read the output has left", file=sys.stderr)
        return CacoError.exit_status
    except OSError as error:  # a full disk, a folder that may not be written to, ...
        print(f"{program}: {refused(error)}", file=sys.stderr)
        return CacoError.exit_status
    finally:
        _give_up_unwritten()


def _told_of_memory(work: Callable[[], int | None]) -> int | None:
    """Do the work. Raises CacoError when memory runs out."""
    try:
        return work()
    except (RuntimeError, MemoryError):
        from caco.memory import out_of_memory_is_told  # here: torch comes with it

        with out_of_memory_is_told():
            raise


def _give_up_unwritten() -> None:
    """Throw away what is printed and cannot be written: when it ends, Python would try once more and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _show(text: str) -> None:
    """Print what a command has to show and does nothing besides: a reader that has left (`| head -1`) has seen enough."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _give_up_unwritten()


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _show(OVERVIEW)
        return 0 if arguments else UsageError.exit_status
    if arguments[0] == "--version":
        from caco import __version__

        _show(f"caco {__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        raise UsageError(f"there is no command {command!r}.{did_you_mean(command, COMMANDS)} (all: caco --help)")
    COMMANDS[command](rest)
    return 0


def _pretrain(arguments: list[str]) -> None:
    config = parse(Pretrain, arguments, "caco pretrain", pretrain_start)
    check(config)
    if not config.resume and not _has_others(config.distributed):  # a finished run needs its images no more
        _look_for_images(config.data, config.val)
    from caco import commands

    commands.pretrain(config)


def _has_others(options: DistributedOptions) -> bool:
    """Return whether processes are started elsewhere, too: they would wait for one that ends before it has met them."""
    return options.machines > 1 or bool({"RANK", "SLURM_STEP_NUM_TASKS"} & set(os.environ))


def _look_for_images(*names: str) -> None:
    """Raise UsageError for images that are not there. Here it is told before torch is imported, which takes seconds."""
    from caco.data.source import check_is_there

    for name in names:
        check_is_there(name)


def _look_for_encoder(run: str) -> None:
    """Raise UsageError for an encoder that is not there, as early."""
    if run not in BASELINES and not run.startswith("timm:"):
        check_encoder_is_there(Path(run), BASELINES)


def pretrain_start(given: dict[str, Any]) -> Pretrain:
    """Return the values of all options not given: those of the run to resume, or of the recipe.

    `given` is changed where it says the same in other words: a recipe that is a run becomes the one that run began with, and an
    "auto" that the run to resume has long decided is taken out.
    """
    recipe = find_recipe(given.get("recipe", Pretrain.recipe))
    if "recipe" in given:
        given["recipe"] = recipe.recipe
    if not (given.get("resume") and given.get("out")):
        return recipe
    from caco.train.run_folder import RESOLVED, read_config

    for name in RESOLVED:
        if given.get(name) == "auto":
            del given[name]
    return read_config(Path(given["out"]))


def _command(kind: type, module: str) -> Callable[[list[str]], None]:
    """Return a command: options of that kind, done by the function of the same name in a module that needs torch."""
    name = kind.__name__.lower()

    def run(arguments: list[str]) -> None:
        config = parse(kind, arguments, f"caco {name}", lambda given: kind())
        if isinstance(config, (Evaluation, Export)):
            config = check_judged(config)
        else:
            check_numbers(config)
        if isinstance(config, Export):
            _look_for_encoder(config.run)
        if isinstance(config, Evaluation):
            if not _has_others(config.distributed):
                _look_for_encoder(config.run)
                _look_for_images(config.data, config.val if isinstance(config, Judging) else "")
            if not os.path.exists("/dev/nvidiactl"):
                keep_heap()  # of this process, which does nothing else
        getattr(importlib.import_module(module), name)(config)

    return run


def _recipes(arguments: list[str]) -> None:
    if arguments and arguments[0] in ("-h", "--help"):
        _show("usage: caco recipes [NAME]\n\nList the named recipes, or print one whole.")
    elif len(arguments) > 1:
        raise UsageError(f"caco recipes takes one name, not {len(arguments)}")
    else:
        _show(whole(arguments[0]) if arguments else listing())


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": _command(Demo, "caco.demo"),
    "pretrain": _pretrain,
    "knn": _command(Knn, "caco.judge"),
    "linear": _command(Linear, "caco.judge"),
    "embed": _command(Embed, "caco.commands"),
    "export": _command(Export, "caco.commands"),
    "report": _command(Report, "caco.commands"),
    "recipes": _recipes,
}
