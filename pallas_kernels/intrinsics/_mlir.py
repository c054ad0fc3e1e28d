"""What the files here share: values of MLIR in Python classes, and inline PTX.

PTX operands are `$0`, `$1`, ...: the results first, then the arguments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm


@dataclasses.dataclass(frozen=True, eq=False)
class Register:
    """A value that a thread holds; each subclass is for one MLIR type."""

    value: Any

    @staticmethod
    def mlir_type() -> Any:
        raise NotImplementedError


def integer_type(bits: int) -> Any:
    return ir.IntegerType.get_signless(bits)


def mlir_i32(value: Any) -> Any:
    """The MLIR value of a register, or of a number; 2**31.. are taken as the same 32 bits."""
    if isinstance(value, Register):
        return value.value
    return mgpu.utils.c(value - 2**32 if value >= 2**31 else value, integer_type(32))


def do_ptx(code: str, *args: Register | int, convergent: bool = False) -> None:
    """PTX without a result, which is neither moved nor dropped.

    convergent: the threads of the warp run it together.
    """
    mgpu.utils.inline_ptx(code, *map(mlir_i32, args), has_side_effects=True, convergent=convergent)


def ptx_value[R: Register](
    kind: type[R], code: str, *args: Register | int, effect: bool = False, convergent: bool = False
) -> R:
    """PTX with one result. effect: neither moved nor dropped."""
    return ptx_values(kind, 1, code, *args, effect=effect, convergent=convergent)[0]


def ptx_values[R: Register](
    kind: type[R],
    count: int,
    code: str,
    *args: Register | int,
    effect: bool = False,
    convergent: bool = False,
) -> list[R]:
    """PTX with `count` results of a kind."""
    values = mgpu.utils.inline_ptx(
        code,
        *map(mlir_i32, args),
        result_types=[kind.mlir_type()] * count,
        has_side_effects=effect,
        convergent=convergent,
    )
    return [kind(value) for value in values]


def change_in_place[R: Register](code: str, changed: Sequence[R], *args: Register) -> list[R]:
    """PTX that changes registers, all integers or all floats: $0.. are `changed`, before and after.

    They take numbers as results and as arguments: the first of `args` is $(2 len(changed)).
    """
    kind, count = type(changed[0]), len(changed)
    written = ["=" + _constraint(register) for register in changed]
    read = [str(i) for i in range(count)] + [_constraint(register) for register in args]
    result = llvm.inline_asm(
        llvm.StructType.get_literal([kind.mlir_type()] * count),
        [register.value for register in (*changed, *args)],
        code,
        ",".join(written + read),
        has_side_effects=True,
        convergent=True,
        asm_dialect=0,
    )
    return [kind(llvm.extractvalue(kind.mlir_type(), result, [i])) for i in range(count)]


def _constraint(register: Register) -> str:
    """What inline PTX calls a 32-bit register of this kind."""
    return "f" if isinstance(register.value.type, ir.F32Type) else "r"


def ptx_name(dtype: Any) -> str:
    """What PTX calls bfloat16 or float16."""
    return {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(dtype).name]


def vector(first: int, count: int) -> str:
    """Operands $first.. as PTX writes a vector of them; a single one as it is."""
    names = ", ".join(f"${i}" for i in range(first, first + count))
    return f"{{{names}}}" if count > 1 else names
