"""The device a command computes on."""

from __future__ import annotations

import warnings

import torch

from caco.errors import UsageError, did_you_mean


def choose_device(name: str) -> torch.device:
    """Return the device for "auto" or a torch device name. Raises UsageError.

    auto: NVIDIA's GPU if there is one, else the CPU. Apple's (mps) has to be asked for: nothing here was ever tried on one.
    """
    if name == "auto":
        if torch.cuda.is_available():
            exact_products(torch.device("cuda"))
            return torch.device("cuda")
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        kinds = ("auto", "cpu", "cuda", "cuda:1", "mps", "xpu")
        asked = name.lower().replace("gpu", "cuda").replace("nvidia", "cuda")
        near = did_you_mean(asked, kinds, most=1) or f" There are: {', '.join(kinds)}."
        raise UsageError(f"--device {name}: no such kind of device.{near}") from None
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        number = torch.cuda.device_count()
        here = ["cpu", *(f"cuda:{gpu}" for gpu in range(number)), *(["mps"] * torch.backends.mps.is_available())]
        raise UsageError(f"--device {name}: not on this machine, which has {', '.join(here)}; try auto") from error
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # what exchanges objects or pins memory takes the current one
    exact_products(device)
    return device


def exact_products(device: torch.device) -> None:
    """Make a GPU's products of float32 matrices exact to float32: the search for positives and kNN rely on it.

    So they are in torch, but not in NVIDIA's containers (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE), nor where a program has asked
    for TF32. Convolutions of an encoder in fp32 keep what torch has set.
    """
    if device.type == "cuda":
        # torch 2.9 has a newer way to say it, which must not be mixed with this one, and advises it.
        warnings.filterwarnings("ignore", "Please use the new API settings")
        torch.set_float32_matmul_precision("highest")
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # torch's compiler advises against it
