"""Formulas of vectors: plain functions of numbers of which vector code is made (`compiled`), and the exponential."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, no_type_check

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from caco.cpu_kernels.vectors import FLAGS, data_of, llvm_type, load_at, store_at


@dataclass
class _Written:
    """A vector while code is being written: what a formula does with it is written down."""

    builder: Any
    value: Any

    def __add__(self, other: _Written) -> _Written:
        return _Written(self.builder, self.builder.fadd(self.value, other.value, flags=FLAGS))

    def __sub__(self, other: _Written) -> _Written:
        return _Written(self.builder, self.builder.fsub(self.value, other.value, flags=FLAGS))

    def __rmul__(self, number: float) -> _Written:
        factor = ir.Constant(self.value.type, [number] * self.value.type.count)
        return _Written(self.builder, self.builder.fmul(factor, self.value, flags=FLAGS))


Formula = Callable[[tuple[Any, ...]], tuple[Any, ...]]


@no_type_check
def compiled(formulas: Mapping[int, tuple[int, Formula]], add: bool = False):
    """Return what compiled code calls to compute a formula of vectors, of so many lines, and to store, or add, what comes out.

    formulas: for each kind, of how many vectors, and what. Of a line there is one vector every `step` numbers of the source,
    from the index `at` on, and one every `by` of the target, from `to` on; the next line is `along` numbers further in the
    source, `on` in the target.
    """

    @intrinsic
    def compute(typing, kind, lines, source, at, along, step, target, to, on, by):
        def generate(context, builder, signature, arguments):
            kind, lines, from_array, at, along, step, to_array, to, on, by = arguments
            from_data = data_of(context, builder, source, from_array)
            to_data = data_of(context, builder, target, to_array)
            for number, (count, formula) in formulas.items():
                with (
                    builder.if_then(builder.icmp_signed("==", kind, kind.type(number))),
                    cgutils.for_range(builder, lines) as loop,
                ):
                    index = builder.add(at, builder.mul(loop.index, along))
                    vectors = []
                    for _ in range(count):
                        vectors.append(_Written(builder, load_at(builder, source, from_data, index)))
                        index = builder.add(index, step)
                    index = builder.add(to, builder.mul(loop.index, on))
                    for vector in formula(tuple(vectors)):
                        if add:
                            vector = vector + _Written(builder, load_at(builder, target, to_data, index))
                        store_at(builder, target, to_data, index, vector.value)
                        index = builder.add(index, by)
            return context.get_dummy_value()

        of_line = (types.intp, types.intp, types.intp)
        return types.void(types.intp, types.intp, source, *of_line, target, *of_line), generate

    return compute


LEAST_EXPONENT, LN_2_HIGH, LN_2_LOW = -87.0, 0.693359375, -2.12194440e-4
POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
"""(exp(x) - 1 - x) / x² for |x| < ln 2 / 2, the first factor that of x⁵ (Cephes, `expf`)."""


@intrinsic
@no_type_check
def exponential(typing, vector):
    """Return exp of numbers of float32 below 88, to 1e-7 of it; 1e-38 at least. What is no number stays so."""

    def generate(context, builder, signature, arguments):
        kind = llvm_type(vector.dtype)
        whole = ir.VectorType(ir.IntType(32), kind.count)

        def all_(number, of=kind):
            return ir.Constant(of, [number] * kind.count)

        def plus(left, right):
            return builder.fadd(left, right, flags=FLAGS)

        def times(left, right):
            return builder.fmul(left, right, flags=FLAGS)

        least = all_(LEAST_EXPONENT)
        x = builder.select(builder.fcmp_ordered("<", arguments[0], least), least, arguments[0])
        name = f"llvm.rint.v{kind.count}f32"
        rint = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind]), name)
        power = builder.call(rint, [times(x, all_(1 / math.log(2)))])
        x = plus(plus(x, times(power, all_(-LN_2_HIGH))), times(power, all_(-LN_2_LOW)))
        result = all_(POLYNOMIAL[0])
        for factor in POLYNOMIAL[1:]:
            result = plus(times(result, x), all_(factor))
        result = plus(plus(times(times(result, x), x), x), all_(1.0))
        bits = builder.shl(builder.add(builder.fptosi(power, whole), all_(127, whole)), all_(23, whole))
        return times(result, builder.bitcast(bits, kind))

    return vector(vector), generate
