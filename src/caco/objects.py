"""Objects in the place of options: a module to train or judge, images in memory."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from caco.data.source import ImageSource
from caco.errors import command_line


@dataclass(frozen=True)
class Objects:
    """What a Python caller gave as objects; None: what the options name."""

    backbone: nn.Module | None = None
    data: ImageSource | None = None
    val: ImageSource | None = None

    def how_to_resume(self, out: str) -> str:
        """Return how a run in a folder goes on: as a command to paste, or in Python where it takes these objects again."""
        given = {"data=images": self.data, "val=labelled": self.val, "backbone=module": self.backbone}
        taken = [argument for argument, thing in given.items() if thing is not None]
        if not taken:
            return command_line("pretrain", "--out", out, "--resume")
        return f"caco.pretrain({', '.join([*taken, f'out={out!r}'])}, resume=True) in Python"


NO_OBJECTS = Objects()
"""From the command line there are none."""
