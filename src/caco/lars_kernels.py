"""LARS on an NVIDIA GPU by two kernels for all tensors together, in Triton: one for the norms, one that moves.

`optim.py` has the same in plain torch, which is the oracle of the tests and what other devices compute.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096
"""Numbers that a program takes."""


class Table:
    """Where the tensors of an optimizer are, on the device; it is written anew when one has moved."""

    def __init__(self) -> None:
        self.key: tuple[int, ...] = ()

    def write(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], buffers: Sequence[Tensor]) -> bool:
        """Take note of where these are, float32 all. Return False if the kernels cannot read them: not laid out alike."""
        places = [tensor.data_ptr() for tensors in (parameters, gradients, buffers) for tensor in tensors]
        key = (*places, *(parameter.numel() for parameter in parameters))
        if key == self.key:
            return True
        if any(place % 16 for place in places) or not all(
            map(_alike, (*parameters, *parameters), (*gradients, *buffers))
        ):
            return False
        counts = np.array([parameter.numel() for parameter in parameters])
        chunks = -(-counts // CHUNK)
        first = np.cumsum(chunks) - chunks
        is_matrix = [parameter.ndim > 1 for parameter in parameters]
        rows = np.stack([*np.reshape(places, (3, -1)), counts, first, chunks, is_matrix], axis=1).astype(np.int64)
        of_chunks = np.repeat(np.arange(len(counts)), chunks).astype(np.int64)
        device = parameters[0].device
        both = torch.from_numpy(np.concatenate([rows.ravel(), of_chunks]))
        both = both.pin_memory() if device.type == "cuda" else both
        self.rows, self.tensor_of_chunk = both.to(device, non_blocking=True).split([rows.size, len(of_chunks)])
        self.sums = torch.empty(len(of_chunks), 2, device=device)
        self.most = triton.next_power_of_2(int(chunks.max()))
        self.key = key
        return True

    def move(self, lr: float, momentum: float, weight_decay: float, trust_coefficient: float) -> None:
        """Take one step of all tensors: `LARS` in `optim.py`."""
        grid = (len(self.tensor_of_chunk),)
        _norms[grid](self.rows, self.tensor_of_chunk, self.sums, weight_decay, CHUNK=CHUNK, num_warps=8)
        rates = lr, momentum, weight_decay, trust_coefficient
        _move[grid](self.rows, self.tensor_of_chunk, self.sums, *rates, CHUNK=CHUNK, MOST=self.most, num_warps=8)


def _alike(one: Tensor, other: Tensor) -> bool:
    """Return whether both have their numbers in the same order in memory, without gaps."""
    strides = [(a, b) for a, b, size in zip(one.stride(), other.stride(), one.shape, strict=True) if size > 1]
    dense = sum(stride * (size - 1) for stride, size in zip(one.stride(), one.shape, strict=True)) + 1 == one.numel()
    return one.dtype == other.dtype == torch.float32 and dense and all(a == b for a, b in strides)


@triton.jit
def _norms(rows, tensor_of_chunk, sums, weight_decay, CHUNK: tl.constexpr):
    """A chunk of a tensor: the sums of squares of the parameter and of its gradient with decay."""
    chunk = tl.program_id(0)
    row = rows + tl.load(tensor_of_chunk + chunk) * 7
    if tl.load(row + 6) != 0:
        count, first = tl.load(row + 3), tl.load(row + 4)
        place = (chunk - first) * CHUNK + tl.arange(0, CHUNK)
        parameter = _numbers(tl.load(row), place, count)
        update = _numbers(tl.load(row + 1), place, count) + weight_decay * parameter
        tl.store(sums + 2 * chunk, tl.sum(parameter * parameter))
        tl.store(sums + 2 * chunk + 1, tl.sum(update * update))


@triton.jit
def _move(
    rows,
    tensor_of_chunk,
    sums,
    lr,
    momentum,
    weight_decay,
    trust_coefficient,
    CHUNK: tl.constexpr,
    MOST: tl.constexpr,
):
    """A chunk of a tensor: the buffer takes in the update, the parameter moves."""
    chunk = tl.program_id(0)
    row = rows + tl.load(tensor_of_chunk + chunk) * 7
    count, first = tl.load(row + 3), tl.load(row + 4)
    place = (chunk - first) * CHUNK + tl.arange(0, CHUNK)
    parameter = _numbers(tl.load(row), place, count)
    update = _numbers(tl.load(row + 1), place, count)
    if tl.load(row + 6) != 0:
        part = tl.arange(0, MOST)
        of_tensor = part < tl.load(row + 5)
        pointer = sums + 2 * (first + part)
        weight_norm = tl.sqrt(tl.sum(tl.load(pointer, mask=of_tensor, other=0.0)))
        update_norm = tl.sqrt(tl.sum(tl.load(pointer + 1, mask=of_tensor, other=0.0)))
        update += weight_decay * parameter
        scaled = (weight_norm > 0) & (update_norm > 0)
        update *= tl.where(scaled, trust_coefficient * weight_norm / tl.where(scaled, update_norm, 1.0), 1.0)
    buffer = _numbers(tl.load(row + 2), place, count) * momentum + update
    tl.store(_pointer(tl.load(row + 2)) + place, buffer, mask=place < count)
    tl.store(_pointer(tl.load(row)) + place, parameter - lr * buffer, mask=place < count)


@triton.jit
def _pointer(address):
    return tl.multiple_of(address, 16).to(tl.pointer_type(tl.float32))


@triton.jit
def _numbers(address, place, count):
    return tl.load(_pointer(address) + place, mask=place < count, other=0.0)
