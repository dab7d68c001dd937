"""Objects in the place of options: a module to train or judge, images in memory."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from caco.data.source import ImageSource


@dataclass(frozen=True)
class Objects:
    """What a Python caller gave as objects; None: what the options name."""

    backbone: nn.Module | None = None
    data: ImageSource | None = None
    val: ImageSource | None = None


NO_OBJECTS = Objects()
"""From the command line there are none."""
