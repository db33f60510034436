"""Explicit SIMD for Numba kernels: vectors of 16 float32 or int32 lanes that stay in registers.

A scale search adds up several sums over the weights of a sub-block, in a fixed order. LLVM vectorizes neither a sum
that must keep its order nor a loop around it. Here 16 sub-blocks lie side by side, one per lane, and each lane runs
the very sequence of single-precision operations of the reference; the sums are variables of a vector type, so they
live in registers. LLVM maps 16 lanes to whatever the machine has (one AVX-512 register, two AVX2, four NEON). No
operation is fused or reordered, so the bytes are the same everywhere.

    F32x16, I32x16, MASK16        the types, as Numba sees them
    load, store, store_bytes      from and to float32 arrays, and the low bytes of integers to uint8 arrays
    load_strided                  from float32 arrays, one lane every `stride` elements
    fill, fill_int                from scalars
    + - * / < > == & | ^ << >>    lane by lane, on operands of the same type; comparisons give masks
    select(mask, a, b)            a where the mask is set, else b
    absolute, negative, square_root, to_float, to_int, bits, from_bits, any_lane, lane_bits, largest, smallest
"""

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model

LANES = 16


class Vector(types.Type):
    """The Numba type of a vector of LANES elements."""

    def __init__(self, name: str, element: Any) -> None:
        self.llvm = ir.VectorType(element, LANES)
        super().__init__(name=name)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.llvm)  # type: ignore[no-untyped-call]


_I32 = ir.IntType(32)
F32x16 = Vector("F32x16", ir.FloatType())
I32x16 = Vector("I32x16", _I32)
MASK16 = Vector("MASK16", ir.IntType(1))


def _operation(result: Any, *arguments: Any) -> Callable[[Callable[..., Any]], Any]:
    """An intrinsic with a fixed signature, from a function (builder, *values) that emits its instructions."""

    def decorate(emit: Callable[..., Any]) -> Any:
        def codegen(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            return emit(builder, *values)

        names = ", ".join(f"_{i}" for i in range(len(arguments)))
        scope = {"signature": result(*arguments), "codegen": codegen}
        exec(f"def typed(_context, {names}): return signature, codegen", scope)
        return intrinsic(scope["typed"])

    return decorate


def _splat(builder: Any, value: Any, vector: Vector) -> Any:
    undefined = ir.Constant(vector.llvm, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))


fill: Any = _operation(F32x16, types.float32)(lambda b, x: _splat(b, x, F32x16))
"""float32 -> all lanes."""
fill_int: Any = _operation(I32x16, types.int32)(lambda b, x: _splat(b, x, I32x16))
"""int32 -> all lanes."""
bits: Any = _operation(I32x16, F32x16)(lambda b, x: b.bitcast(x, I32x16.llvm))
"""The bits of the floats as integers."""
from_bits: Any = _operation(F32x16, I32x16)(lambda b, x: b.bitcast(x, F32x16.llvm))
"""The floats with these bits."""
to_int: Any = _operation(I32x16, F32x16)(lambda b, x: b.fptosi(x, I32x16.llvm))
"""float32 -> int32, towards zero; the value must fit."""
to_float: Any = _operation(F32x16, I32x16)(lambda b, x: b.sitofp(x, F32x16.llvm))
"""int32 -> the nearest float32."""


negative: Any = _operation(F32x16, F32x16)(lambda b, x: b.fneg(x))
"""The same magnitudes with the other sign, of zeros too."""


def _call(builder: Any, name: str, vector: Vector, *values: Any) -> Any:
    kind = ir.FunctionType(vector.llvm, [vector.llvm] * len(values))
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, values)


absolute: Any = _operation(F32x16, F32x16)(lambda b, x: _call(b, "llvm.fabs.v16f32", F32x16, x))
"""Magnitudes."""
square_root: Any = _operation(F32x16, F32x16)(lambda b, x: _call(b, "llvm.sqrt.v16f32", F32x16, x))
"""Correctly rounded square roots."""


def _reduce(builder: Any, name: str, lanes: Any) -> Any:
    function = builder.module.globals.get(name) or ir.Function(
        builder.module, ir.FunctionType(_I32, [I32x16.llvm]), name
    )
    return builder.call(function, [lanes])


largest: Any = _operation(types.int32, I32x16)(lambda b, x: _reduce(b, "llvm.vector.reduce.smax.v16i32", x))
"""The largest of the lanes."""
smallest: Any = _operation(types.int32, I32x16)(lambda b, x: _reduce(b, "llvm.vector.reduce.smin.v16i32", x))
"""The smallest of the lanes."""


@_operation(types.boolean, MASK16)
def any_lane(builder: Any, mask: Any) -> Any:
    """Whether the mask is set in any lane."""
    packed = builder.bitcast(mask, ir.IntType(LANES))
    return builder.icmp_unsigned("!=", packed, ir.Constant(ir.IntType(LANES), 0))


@_operation(types.uint16, MASK16)
def lane_bits(builder: Any, mask: Any) -> Any:
    """The mask as 16 bits, lane 0 the lowest."""
    return builder.bitcast(mask, ir.IntType(LANES))


_select_float: Any = _operation(F32x16, MASK16, F32x16, F32x16)(lambda b, m, x, y: b.select(m, x, y))
_select_int: Any = _operation(I32x16, MASK16, I32x16, I32x16)(lambda b, m, x, y: b.select(m, x, y))


def select(mask: Any, a: Any, b: Any) -> Any:
    """a in the lanes where the mask is set, b in the others."""
    raise NotImplementedError("only inside kernels")


@overload(select)
def _select(mask, a, b):  # type: ignore[no-untyped-def] # Numba compares this signature with the lambda's
    if mask == MASK16 and a == F32x16 and b == F32x16:
        return lambda mask, a, b: _select_float(mask, a, b)
    if mask == MASK16 and a == I32x16 and b == I32x16:
        return lambda mask, a, b: _select_int(mask, a, b)
    return None


def _element_pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), F32x16.llvm.as_pointer())


@intrinsic
def _load(_typing_context: Any, array: Any, _index: Any) -> Any:

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.load(_element_pointer(context, builder, signature.args[0], values[0], values[1]), align=4)

    return F32x16(array, types.intp), codegen


@intrinsic
def _load_strided(_typing_context: Any, array: Any, _index: Any, _stride: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, values[0]).data
        lanes, at = ir.Constant(F32x16.llvm, ir.Undefined), values[1]
        for lane in range(LANES):
            lanes = builder.insert_element(lanes, builder.load(builder.gep(data, [at])), ir.Constant(_I32, lane))
            at = builder.add(at, values[2])
        return lanes

    return F32x16(array, types.intp, types.intp), codegen


@intrinsic
def _store(_typing_context: Any, array: Any, _index: Any, _value: Any) -> Any:

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = _element_pointer(context, builder, signature.args[0], values[0], values[1])
        builder.store(values[2], pointer, align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, F32x16), codegen


@intrinsic
def _store_bytes(_typing_context: Any, array: Any, _index: Any, _value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, values[0]).data
        kind = ir.VectorType(ir.IntType(8), LANES)
        pointer = builder.bitcast(builder.gep(data, [values[1]]), kind.as_pointer())
        builder.store(builder.trunc(values[2], kind), pointer, align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, I32x16), codegen


load: Any = _load
"""load(array, index): lanes from array[index : index + 16], float32, one-dimensional; no bounds check."""
load_strided: Any = _load_strided
"""load_strided(array, index, stride): lane k from array[index + k * stride], float32; no bounds check."""
store: Any = _store
"""store(array, index, lanes): lanes to array[index : index + 16]; no bounds check."""
store_bytes: Any = _store_bytes
"""store_bytes(array, index, lanes): the low bytes of integers to uint8 array[index : index + 16]; no bounds check."""


def _overload(operation: Any, table: dict[Any, Any]) -> None:
    """Give an operator of Python its meaning for pairs of the same vector type."""

    @overload(operation)
    def binary(a, b):  # type: ignore[no-untyped-def] # Numba compares this signature with the lambda's
        emit = table.get(a) if isinstance(a, Vector) and a == b else None
        return None if emit is None else (lambda a, b: emit(a, b))


def _both(result: Any, vector: Vector, emit: Callable[..., Any]) -> Any:
    return _operation(result, vector, vector)(emit)


_overload(
    operator.add,
    {
        F32x16: _both(F32x16, F32x16, lambda b, x, y: b.fadd(x, y)),
        I32x16: _both(I32x16, I32x16, lambda b, x, y: b.add(x, y)),
    },
)
_overload(
    operator.sub,
    {
        F32x16: _both(F32x16, F32x16, lambda b, x, y: b.fsub(x, y)),
        I32x16: _both(I32x16, I32x16, lambda b, x, y: b.sub(x, y)),
    },
)
_overload(operator.mul, {F32x16: _both(F32x16, F32x16, lambda b, x, y: b.fmul(x, y))})
_overload(operator.truediv, {F32x16: _both(F32x16, F32x16, lambda b, x, y: b.fdiv(x, y))})
_overload(
    operator.lt,
    {
        F32x16: _both(MASK16, F32x16, lambda b, x, y: b.fcmp_ordered("<", x, y)),
        I32x16: _both(MASK16, I32x16, lambda b, x, y: b.icmp_signed("<", x, y)),
    },
)
_overload(
    operator.gt,
    {
        F32x16: _both(MASK16, F32x16, lambda b, x, y: b.fcmp_ordered(">", x, y)),
        I32x16: _both(MASK16, I32x16, lambda b, x, y: b.icmp_signed(">", x, y)),
    },
)
_overload(
    operator.eq,
    {
        F32x16: _both(MASK16, F32x16, lambda b, x, y: b.fcmp_ordered("==", x, y)),
        I32x16: _both(MASK16, I32x16, lambda b, x, y: b.icmp_signed("==", x, y)),
    },
)
_overload(operator.lshift, {I32x16: _both(I32x16, I32x16, lambda b, x, y: b.shl(x, y))})
_overload(operator.rshift, {I32x16: _both(I32x16, I32x16, lambda b, x, y: b.ashr(x, y))})
_overload(operator.xor, {I32x16: _both(I32x16, I32x16, lambda b, x, y: b.xor(x, y))})
_overload(
    operator.and_,
    {v: _both(v, v, lambda b, x, y: b.and_(x, y)) for v in (I32x16, MASK16)},
)
_overload(
    operator.or_,
    {v: _both(v, v, lambda b, x, y: b.or_(x, y)) for v in (I32x16, MASK16)},
)
