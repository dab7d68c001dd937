"""Vectors of neighbouring channels, as numba compiles them: one register's worth of numbers of an array at a time.

A compiler makes vector code of a plain loop only where it can show that nothing it writes is read again; in Winograd's
transforms, which read and write dozens of rows at once, it can't, and is three times slower. Here a vector is a value:
`load` and `zeros` make one, `+`, `-` and `*` compute with it, `store` puts it back; what has `_all` in its name does so with
a tuple of them.
"""

from __future__ import annotations

import operator
from typing import Any, no_type_check

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_jitable, register_model

from caco.cpu_kernels.bfloat16 import are_pairs, computed, float32_of, integers, is_bfloat16, multiply_pairs, rounded
from caco.cpu_kernels.processor import BYTES

FLAGS = ("contract", "reassoc", "nsz")
"""Multiply-adds may be fused and sums reordered; numbers that are not finite may come."""


class Vector(types.Type):
    """BYTES of numbers of one type."""

    def __init__(self, dtype: types.Float) -> None:
        self.dtype = dtype
        super().__init__(name=f"Vector({dtype}, {BYTES})")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    """In LLVM, what a processor's register holds."""

    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, llvm_type(kind.dtype))


@register_jitable
def computed_bytes(array: Any) -> int:
    """Return the bytes of each of an array's numbers while they are computed."""
    return max(int(array.itemsize), 4)


@intrinsic
@no_type_check
def numbers_in(typing, array):
    """Return how many numbers each of an array's is: two if they are pairs."""
    count = 2 if are_pairs(array.dtype) else 1
    return types.intp(array), lambda context, builder, signature, given: context.get_constant(types.intp, count)


def llvm_type(dtype: types.Number) -> ir.VectorType:
    """Return what a vector of such numbers is in LLVM."""
    bits = computed(dtype).bitwidth
    return ir.VectorType({32: ir.FloatType(), 64: ir.DoubleType()}[bits], BYTES * 8 // bits)


def data_of(context: Any, builder: Any, array: Any, value: Any) -> Any:
    """Return the code for where an array's numbers are."""
    return context.make_array(array)(context, builder, value).data


def load_at(builder: Any, array: Any, data: Any, index: Any) -> Any:
    """Return the code for a vector of the numbers from an index on."""
    kind, align = llvm_type(array.dtype), array.dtype.bitwidth // 8
    if not is_bfloat16(array.dtype):
        return builder.load(builder.bitcast(builder.gep(data, [index]), kind.as_pointer()), align=align)
    numbers = builder.load(builder.bitcast(builder.gep(data, [index]), integers(16).as_pointer()), align=align)
    return float32_of(builder, numbers)


def store_at(builder: Any, array: Any, data: Any, index: Any, vector: Any, past_caches: bool = False) -> None:
    """Write the code that puts a vector there. past_caches: where an address is a multiple of BYTES, and into no cache."""
    vector = rounded(builder, vector) if is_bfloat16(array.dtype) else vector
    address = builder.bitcast(builder.gep(data, [index]), vector.type.as_pointer())
    size = BYTES * array.dtype.bitwidth // computed(array.dtype).bitwidth
    stored = builder.store(vector, address, align=size if past_caches else array.dtype.bitwidth // 8)
    if past_caches:
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))


def _repeat(builder: Any, number: Any, kind: ir.VectorType) -> Any:
    undefined, first = ir.Constant(kind, ir.Undefined), ir.Constant(ir.IntType(32), 0)
    everywhere = ir.Constant(ir.VectorType(ir.IntType(32), kind.count), None)
    return builder.shuffle_vector(builder.insert_element(undefined, number, first), undefined, everywhere)


@intrinsic
@no_type_check
def load(typing, array, index):
    """Return the vector that starts at an index of a contiguous array of one dimension; nothing checks its bounds."""

    def generate(context, builder, signature, arguments):
        return load_at(builder, array, data_of(context, builder, array, arguments[0]), arguments[1])

    return Vector(computed(array.dtype))(array, types.intp), generate


@no_type_check
def _storing(past_caches):
    """Return what puts a vector where `load` finds it."""

    @intrinsic
    def put(typing, array, index, vector):
        def generate(context, builder, signature, arguments):
            data = data_of(context, builder, array, arguments[0])
            store_at(builder, array, data, *arguments[1:], past_caches=past_caches)
            return context.get_dummy_value()

        return types.void(array, types.intp, vector), generate

    return put


store, store_past_caches = _storing(past_caches=False), _storing(past_caches=True)


@no_type_check
def _putting(adds=False, past_caches=False):
    """Return what puts the vectors of a tuple one after the other, or adds them to what is there."""

    @intrinsic
    def put_all(typing, array, index, step, vectors):
        def generate(context, builder, signature, arguments):
            data, at = data_of(context, builder, array, arguments[0]), arguments[1]
            for number in range(vectors.count):
                vector = builder.extract_value(arguments[3], number)
                if adds:
                    vector = builder.fadd(load_at(builder, array, data, at), vector, flags=FLAGS)
                store_at(builder, array, data, at, vector, past_caches)
                at = builder.add(at, arguments[2])
            return context.get_dummy_value()

        return types.void(array, types.intp, types.intp, vectors), generate

    return put_all


store_all, add_all, store_all_past_caches = _putting(), _putting(adds=True), _putting(past_caches=True)


def _multiply_add(builder: Any, sums: Any, left: Any, right: Any) -> Any:
    return builder.fadd(sums, builder.fmul(left, right, flags=FLAGS), flags=FLAGS)


@intrinsic
@no_type_check
def add_products(typing, sums, left, left_at, left_row, right, right_at):
    """Return sums[r, v] + left[r] · right[v]: of one number of each row and of two neighbouring vectors.

    sums: a tuple, row by row. The rows' numbers are one every left_row. Of pairs of bfloat16 both products are added.
    """

    def generate(context, builder, signature, arguments):
        kind, lanes = llvm_type(left.dtype), llvm_type(left.dtype).count
        add_product = multiply_pairs if are_pairs(left.dtype) else _multiply_add
        of_left = builder.bitcast(data_of(context, builder, left, arguments[1]), kind.element.as_pointer())
        of_right = data_of(context, builder, right, arguments[4])
        rights = [
            load_at(builder, right, of_right, builder.add(arguments[5], ir.Constant(arguments[5].type, lanes * number)))
            for number in range(2)
        ]
        at, found = arguments[2], []
        for row in range(sums.count // 2):
            factor = _repeat(builder, builder.load(builder.gep(of_left, [at])), kind)
            at = builder.add(at, arguments[3])
            for number, vector in enumerate(rights):
                before = builder.extract_value(arguments[0], 2 * row + number)
                found.append(add_product(builder, before, factor, vector))
        return context.make_tuple(builder, sums, found)

    return sums(sums, left, types.intp, types.intp, right, types.intp), generate


@intrinsic
@no_type_check
def zeros(typing, array):
    """Return a vector of zeros of an array's type."""

    def generate(context, builder, signature, arguments):
        return ir.Constant(llvm_type(array.dtype), None)

    return Vector(computed(array.dtype))(array), generate


@no_type_check
def _of_two(name):
    """Return the operation of LLVM on two vectors."""

    @intrinsic
    def operation(typing, left, right):
        def generate(context, builder, signature, arguments):
            return getattr(builder, name)(*arguments, flags=FLAGS)

        return left(left, right), generate

    return operation


_plus, _minus, _times = _of_two("fadd"), _of_two("fsub"), _of_two("fmul")


@intrinsic
@no_type_check
def where_positive(typing, test, vector):
    """Return a vector with zeros where the test's numbers are not positive; one that is no number counts as positive."""

    def generate(context, builder, signature, arguments):
        kind = llvm_type(vector.dtype)
        zero = ir.Constant(kind, None)
        return builder.select(builder.fcmp_ordered("<=", arguments[0], zero), zero, arguments[1])

    return vector(test, vector), generate


@intrinsic
@no_type_check
def greatest(typing, left, right):
    """Return the greater of each two numbers; the left one if the right one is no number."""

    def generate(context, builder, signature, arguments):
        return builder.select(builder.fcmp_ordered(">", arguments[1], arguments[0]), arguments[1], arguments[0])

    return left(left, right), generate


@intrinsic
@no_type_check
def repeated(typing, array, number):
    """Return a vector of a number, of an array's type."""

    def generate(context, builder, signature, arguments):
        return _repeat(
            builder, context.cast(builder, arguments[1], number, computed(array.dtype)), llvm_type(array.dtype)
        )

    return Vector(computed(array.dtype))(array, number), generate


@intrinsic(prefer_literal=True)
@no_type_check
def zeros_all(typing, array, count):
    """Return `count` vectors of zeros as a tuple; the count is written as a number."""

    def generate(context, builder, signature, arguments):
        zero = ir.Constant(llvm_type(array.dtype), None)
        return context.make_tuple(builder, signature.return_type, [zero] * count.literal_value)

    return types.UniTuple(Vector(computed(array.dtype)), count.literal_value)(array, count), generate


@overload(operator.add)
@no_type_check
def _add(left, right):
    return (lambda left, right: _plus(left, right)) if isinstance(left, Vector) else None


@overload(operator.sub)
@no_type_check
def _subtract(left, right):
    return (lambda left, right: _minus(left, right)) if isinstance(left, Vector) else None


@overload(operator.mul)
@no_type_check
def _multiply(left, right):
    return (lambda left, right: _times(left, right)) if isinstance(left, Vector) else None
