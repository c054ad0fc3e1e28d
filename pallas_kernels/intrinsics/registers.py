"""What a thread computes with: I32, F32, Predicate, and operations that give them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from qserve_jax.pallas_kernels.intrinsics._mlir import (
    Register,
    integer_type,
    mlir_i32,
    ptx_value,
)


def _operator(op: Callable, *, swap: bool = False) -> Callable:
    def apply(self: I32, other: Any) -> I32:
        left, right = (other, self) if swap else (self, other)
        return I32(op(mlir_i32(left), mlir_i32(right)))

    return apply


def _comparison(predicate: str) -> Callable:
    def compare(self: I32, other: Any) -> Predicate:
        kind = getattr(arith.CmpIPredicate, predicate)
        return Predicate(arith.cmpi(kind, mlir_i32(self), mlir_i32(other)))

    return compare


class I32(Register):
    """32 bits. //, % and >> take them as unsigned, < and > as signed; `is_` is equality."""

    @staticmethod
    def mlir_type() -> Any:
        return integer_type(32)

    __add__ = __radd__ = _operator(arith.addi)
    __mul__ = __rmul__ = _operator(arith.muli)
    __and__ = __rand__ = _operator(arith.andi)
    __or__ = __ror__ = _operator(arith.ori)
    __xor__ = __rxor__ = _operator(arith.xori)
    __sub__ = _operator(arith.subi)
    __rsub__ = _operator(arith.subi, swap=True)
    __floordiv__ = _operator(arith.divui)
    __mod__ = _operator(arith.remui)
    __lshift__ = _operator(arith.shli)
    __rshift__ = _operator(arith.shrui)
    __lt__ = _comparison("slt")
    __gt__ = _comparison("sgt")
    is_ = _comparison("eq")


class Predicate(Register):
    """One bit."""

    @staticmethod
    def mlir_type() -> Any:
        return integer_type(1)

    def __and__(self, other: Predicate) -> Predicate:
        return Predicate(arith.andi(self.value, other.value))

    def __invert__(self) -> Predicate:
        true = arith.constant(self.mlir_type(), 1)
        return Predicate(arith.xori(self.value, true))


class F32(Register):
    """A float32; every operation rounds to nearest and none is contracted to FMA."""

    @staticmethod
    def mlir_type() -> Any:
        return ir.F32Type.get()

    def __add__(self, other: F32) -> F32:
        return ptx_value(F32, "add.rn.f32 $0, $1, $2;", self, other)

    def __sub__(self, other: F32) -> F32:
        return ptx_value(F32, "sub.rn.f32 $0, $1, $2;", self, other)

    def __mul__(self, other: F32) -> F32:
        return ptx_value(F32, "mul.rn.f32 $0, $1, $2;", self, other)

    def __truediv__(self, other: F32) -> F32:
        return ptx_value(F32, "div.rn.f32 $0, $1, $2;", self, other)

    def __gt__(self, other: F32) -> Predicate:
        """False where either is NaN."""
        return Predicate(arith.cmpf(arith.CmpFPredicate.OGT, self.value, other.value))


def constant(value: int) -> I32:
    return I32(mlir_i32(value))


def constant_float(value: float) -> F32:
    return F32(mgpu.utils.c(value, F32.mlir_type()))


def select(condition: Predicate, yes: I32 | int, no: I32 | int) -> I32:
    return I32(arith.select(condition.value, mlir_i32(yes), mlir_i32(no)))


def minimum(a: I32 | int, b: I32 | int) -> I32:
    """The smaller, as signed integers."""
    return I32(arith.minsi(mlir_i32(a), mlir_i32(b)))


def maximum(a: I32 | int, b: I32 | int) -> I32:
    """The larger, as signed integers."""
    return I32(arith.maxsi(mlir_i32(a), mlir_i32(b)))


def float_minimum(a: F32, b: F32) -> F32:
    """The smaller; NaN where either is."""
    return ptx_value(F32, "min.NaN.f32 $0, $1, $2;", a, b)


def float_maximum(a: F32, b: F32) -> F32:
    """The larger; NaN where either is."""
    return ptx_value(F32, "max.NaN.f32 $0, $1, $2;", a, b)


def opaque(word: I32) -> I32:
    """The word, where what is computed from it is not to be kept from an earlier time."""
    return ptx_value(I32, "mov.b32 $0, $1;", word, effect=True)


# Floats and bits


def to_float(value: I32) -> F32:
    """Signed integer to float32, to nearest, as XLA converts."""
    return F32(arith.sitofp(F32.mlir_type(), value.value))


def float_bits(value: F32) -> I32:
    return I32(arith.bitcast(I32.mlir_type(), value.value))


def bits_float(value: I32) -> F32:
    return F32(arith.bitcast(F32.mlir_type(), value.value))


def select_float(condition: Predicate, yes: F32, no: F32) -> F32:
    return F32(arith.select(condition.value, yes.value, no.value))


def multiply_add(a: F32, b: F32, c: F32) -> F32:
    """a * b + c, rounded once."""
    return ptx_value(F32, "fma.rn.f32 $0, $1, $2, $3;", a, b, c)


def exp2(x: F32) -> F32:
    """2**x to within 2 ulp (0 below 2**-126)."""
    return ptx_value(F32, "ex2.approx.ftz.f32 $0, $1;", x)


def reciprocal(x: F32) -> F32:
    """1 / x to within 1 ulp (0 above 2**126)."""
    return ptx_value(F32, "rcp.approx.ftz.f32 $0, $1;", x)


def rsqrt(x: F32) -> F32:
    """1 / sqrt(x) to within 2 ulp."""
    return ptx_value(F32, "rsqrt.approx.ftz.f32 $0, $1;", x)
