"""Numbers of bfloat16, the upper half of float32, in compiled code: what is written for LLVM to read, round and multiply them.

numpy has no such numbers. In an array of uint16 each is one of them; they are computed as float32. In an array of uint32 each
is a pair of them, two neighbouring terms of a product of matrices (`products.py`), the first in its lower half.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from caco.cpu_kernels.processor import BYTES, MULTIPLIES_PAIRS

LANES = BYTES // 4


def is_bfloat16(dtype: types.Number) -> bool:
    """Return whether an array's numbers are bfloat16."""
    return bool(dtype == types.uint16)


def are_pairs(dtype: types.Number) -> bool:
    """Return whether an array's numbers are pairs of bfloat16."""
    return bool(dtype == types.uint32)


def computed(dtype: types.Number) -> Any:
    """Return as what an array's numbers are computed, or held while they are."""
    return types.float32 if is_bfloat16(dtype) or are_pairs(dtype) else dtype


def integers(bits: int, count: int = LANES) -> ir.VectorType:
    """Return a vector's type of so many integers, of so many bits each."""
    return ir.VectorType(ir.IntType(bits), count)


def _all(number: int) -> ir.Constant:
    return ir.Constant(integers(32), [number] * LANES)


def float32_of(builder: Any, numbers: Any) -> Any:
    """Return the code that makes float32 of a vector of bfloat16, given as integers of 16 bits."""
    return builder.bitcast(builder.shl(builder.zext(numbers, integers(32)), _all(16)), _float32())


def rounded(builder: Any, vector: Any) -> Any:
    """Return the code that rounds float32 to the nearest bfloat16, of two to the even one: integers of 16 bits.

    Numbers below 1e-38 may become 0.
    """
    if MULTIPLIES_PAIRS:
        kind = ir.FunctionType(integers(16), [vector.type])
        return builder.asm(kind, "vcvtneps2bf16 $1, $0", "=v,v", [vector], False)
    bits = builder.bitcast(vector, integers(32))
    odd = builder.and_(builder.lshr(bits, _all(16)), _all(1))
    upper = builder.add(bits, builder.add(odd, _all(0x7FFF)))
    no_number = builder.fcmp_unordered("uno", vector, vector)
    upper = builder.select(no_number, _all(0x7FC00000), upper)  # carried over, its bits would be another number's
    return builder.trunc(builder.lshr(upper, _all(16)), integers(16))


def pairs(builder: Any, low: Any, high: Any) -> Any:
    """Return the code for pairs of two vectors' numbers, rounded."""
    lower = builder.zext(rounded(builder, low), integers(32))
    upper = builder.shl(builder.zext(rounded(builder, high), integers(32)), _all(16))
    return builder.bitcast(builder.or_(lower, upper), _float32())


def neighbours(builder: Any, first: Any, second: Any) -> Any:
    """Return the code for pairs of each two neighbouring numbers of two vectors, one after the other, rounded."""
    order = ir.Constant(integers(32, 2 * LANES), list(range(2 * LANES)))
    halves = builder.shuffle_vector(rounded(builder, first), rounded(builder, second), order)
    return builder.bitcast(halves, _float32())


def multiply_pairs(builder: Any, sums: Any, left: Any, right: Any) -> Any:
    """Return the code for sums, float32, and the products of each two pairs."""
    if MULTIPLIES_PAIRS:
        kind = ir.FunctionType(sums.type, [sums.type] * 3)
        return builder.asm(kind, "vdpbf16ps $3, $2, $0", "=v,0,v,v", [sums, left, right], False)
    left, right = builder.bitcast(left, integers(32)), builder.bitcast(right, integers(32))
    for half in (lambda bits: builder.shl(bits, _all(16)), lambda bits: builder.and_(bits, _all(0xFFFF0000))):
        factors = (builder.bitcast(half(bits), _float32()) for bits in (left, right))
        sums = builder.fadd(sums, builder.fmul(*factors, flags=("contract",)), flags=("contract",))
    return sums


def _float32() -> ir.VectorType:
    return ir.VectorType(ir.FloatType(), LANES)
