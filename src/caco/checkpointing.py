"""Activation checkpointing: a backbone's blocks keep their input only, and compute the rest again in backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from caco.errors import UsageError


def checkpoint_blocks(backbone: nn.Module) -> None:
    """Make every repeated block of a backbone compute its activations again in backward.

    Same outputs, gradients and batch-norm statistics; about a third more time. Raises UsageError when the module has no
    repeated blocks (elements of an nn.Sequential that have several layers of their own).
    """
    blocks = list(repeated_blocks(backbone))
    if not blocks:
        raise UsageError(f"--engine.checkpointing: {type(backbone).__name__} has no repeated blocks to compute again")
    for block in blocks:
        block.forward = partial(_again_in_backward, block, vars(block).get("forward"))


def keep_all_activations(network: nn.Module) -> None:
    """Undo `checkpoint_blocks`."""
    for module in network.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, partial) and forward.func is _again_in_backward:
            del module.forward
            block, own = forward.args
            if own is not None:
                block.forward = own


def repeated_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the innermost elements of nn.Sequential that have several layers with parameters of their own."""
    for child in module.children():
        inner = list(repeated_blocks(child))
        if inner:
            yield from inner
        elif isinstance(module, nn.Sequential) and _layers(child) > 1:
            yield child


def _layers(module: nn.Module) -> int:
    return sum(not list(part.children()) and bool(list(part.parameters(recurse=False))) for part in module.modules())


def _again_in_backward(block: nn.Module, own: Any, *inputs: Any, **options: Any) -> Any:
    """Call the forward of its own that a block had, else that of the class that it has by now."""
    forward = own or partial(type(block).forward, block)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _same_statistics(block)

    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts, **options)


@contextmanager
def _same_statistics(block: nn.Module) -> Iterator[None]:
    """Undo what a second forward pass does to batch-norm statistics: they would count the batch twice."""
    buffers: list[Tensor] = list(block.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
