"""The processes of a run. One process needs no process group: every collective is then the identity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and talks."""
        return self.rank == 0

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows [B, …] of all processes, in rank order: [size·B, …]."""
        return rows

    def sum(self, values: Tensor) -> Tensor:
        """Return the elementwise sum over all processes."""
        return values

    def maximum(self, values: Tensor) -> Tensor:
        """Return the elementwise maximum over all processes."""
        return values


def choose_device(name: str) -> torch.device:
    """Return the device for "auto" (a GPU if there is one) or a torch device name. Raises UsageError."""
    from caco.errors import UsageError

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: not here ({str(error).splitlines()[0][:100]}); try auto or cpu") from error
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the autocast dtype for "auto", "fp32" or "bf16"; auto: bf16 on GPUs that have it, else fp32."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
