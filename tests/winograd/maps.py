"""Maps to convolve, matrices in panels, and how far a result is from the true one."""

import numpy as np
import torch


def maps_of(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def relative(found: torch.Tensor, true: torch.Tensor) -> float:
    return float((found.detach().double() - true.detach()).norm() / true.detach().norm())


def in_panels(matrix: np.ndarray, room: int) -> np.ndarray:
    """Return a matrix as `products.py` has it, flat, each panel with room for so many rows; what is not filled is no number."""
    from caco.cpu_kernels import products  # numba may not be there

    width = products.panel_width(matrix.itemsize)
    panels = np.full((matrix.shape[1] // width, room, width), np.nan, matrix.dtype)
    panels[:, : len(matrix)] = matrix.reshape(len(matrix), -1, width).swapaxes(0, 1)
    return panels.reshape(-1)
