"""The precision a command computes in: float32, or bfloat16 where torch's autocast knows it to suffice."""

from __future__ import annotations

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Return the context in which a network computes in that precision; it may be entered many times."""
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether a device is a GPU that computes in bfloat16 (older ones only imitate it, slowly)."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the autocast dtype for "auto", "fp32" or "bf16"; auto: bf16 on GPUs that have it, else fp32."""
    if name == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    return PRECISIONS[name]
