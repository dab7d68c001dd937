"""Kernels of our own, in Triton or numba, are used only after they have been seen to do here what plain torch does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

ROOMY = 220 * 1024
"""Bytes of memory next to each processor of a data centre's GPU, H100 and later."""


def suits_kernels(device: torch.device) -> bool:
    """Return whether a device is a GPU that the kernels were written for: with tensor cores that take bfloat16 and TF32."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def has_room(device: torch.device) -> bool:
    """Return whether a device is a GPU of a data centre, of which a kernel's blocks may be larger."""
    properties: Any = torch.cuda.get_device_properties(device) if suits_kernels(device) else None
    return bool(properties and properties.shared_memory_per_block_optin >= ROOMY)


def works(what: str, problem: Callable[[], str]) -> bool:
    """Return whether there is no problem with some kernels; where there is, it is told.

    problem: tries them, and returns what is wrong, "" if nothing; that it fails is a problem, too.
    """
    try:
        found = problem()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no compiler, a GPU too old or too small for them: as many kinds as reasons
        found = f"{type(error).__name__}: {error}".splitlines()[0]
    if found:
        logging.getLogger(__name__).warning("%s are not used, which is slower: %s", what, found)
    return not found
