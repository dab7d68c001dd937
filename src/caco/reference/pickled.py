"""What old checkpoints hold besides tensors, and what it becomes when read: plain numbers and bags of attributes.

`torch.load(weights_only=True)` refuses numpy's scalars and argparse's namespaces, which the published code and its
relatives left in their files. None of numpy's own unpickling runs here: the names are answered by the stand-ins below.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

import numpy as np


class PickledDtype:
    """Stands in for `numpy.dtype` while a file is read: remembers the kind and width of a number, "f8" or "i4"."""

    def __init__(self, code: str = "", align: bool = False, copy: bool = False) -> None:
        self.code, self.order = str(code), "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Take the byte order from numpy's state (version, order, ...); the rest does not matter for a number."""
        self.order = ">" if state[1] == ">" else "<"


def pickled_scalar(dtype: PickledDtype, data: bytes | str = b"") -> bool | int | float:
    """Stands in for numpy's `scalar`: return the Python number. Raises ValueError for anything but a number."""
    if not re.fullmatch(r"b1|[iu][1248]|f[248]", dtype.code):
        raise ValueError(f"a numpy scalar of kind {dtype.code!r} is not a number")
    raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
    return np.frombuffer(raw, dtype.order + dtype.code, count=1)[0].item()  # type: ignore[no-any-return]


HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    (PickledDtype, "numpy.dtype"),
    (pickled_scalar, "numpy.core.multiarray.scalar"),  # numpy 1
    (pickled_scalar, "numpy._core.multiarray.scalar"),  # numpy 2
]
"""For `torch.serialization.safe_globals`: the only names besides torch's own that a file may call."""
