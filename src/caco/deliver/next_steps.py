"""What can be done with a finished run, as commands to paste."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from caco.after_training import BASELINES
from caco.config import Pretrain
from caco.data.source import ImageSource, open_source
from caco.errors import CacoError, command_line


def next_steps(options: Pretrain, own_backbone: bool = False, images: ImageSource | None = None) -> str:
    """Return the commands that follow on a finished run, a line each: only such as work with its images.

    own_backbone: the run trained a module of the user's own. images: the user's own source, in place of --data. Both
    can be used from Python only.
    """
    run, data, val = options.out, options.data, options.val
    if own_backbone:
        return f"  caco.load_weights(module, {run!r})   in Python: the module is your own"
    if images is not None:
        return f"  caco.load_backbone({run!r})   in Python: the images are your own"
    embed = command_line("embed", run, "--data", data, "--out", "features.npz")
    if _is_labelled(options):
        judged = ["--data", data, *(["--val", val] if val else [])]
    elif val:
        judged = ["--data", val]
    else:
        hint = f"To judge it, name labelled images, a folder for each class: {command_line('knn', run)} --data FOLDER"
        return "\n".join([f"  {embed}", f"  {command_line('report', run)}", hint])
    compared = commands_to_compare(run, judged)
    lines = [*compared, command_line("linear", run, *judged), embed, command_line("report", run)]
    return "\n".join(f"  {line}" for line in lines)


def commands_to_compare(
    run: str, judged: Sequence[str], others: Sequence[str] = BASELINES, *, judge: str = "knn", itself: bool = True
) -> list[str]:
    """Return the commands that judge a run (unless not itself) and others beside it. judged: the images, as options."""
    own = [command_line(judge, run, *judged)] if itself else []
    return own + [command_line(judge, other, "--beside", run, *judged) for other in others]


def _is_labelled(options: Pretrain) -> bool:
    """Return whether --data has labels, by the listing that the run has kept."""
    with contextlib.suppress(CacoError):  # moved away meanwhile: the run is finished all the same
        return open_source(options.data, index_cache=Path(options.out) / "index.npz").labels is not None
    return False
