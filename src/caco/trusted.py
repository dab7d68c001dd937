"""Kernels of our own, in Triton, are used on a GPU only after they have been seen to do there what plain torch does."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch


def works(what: str, problem: Callable[[], str]) -> bool:
    """Return whether there is no problem with some kernels; where there is, it is told.

    problem: tries them, and returns what is wrong, "" if nothing; that it fails is a problem, too.
    """
    try:
        found = problem()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no Triton, a GPU too old or too small for them: as many kinds as reasons
        found = f"{type(error).__name__}: {error}".splitlines()[0]
    if found:
        logging.getLogger(__name__).warning("%s are not used, which is slower: %s", what, found)
    return not found
