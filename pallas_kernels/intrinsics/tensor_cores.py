"""Matrix products: mma.sync (one warp, from sm_80 on) and wgmma (a warpgroup, Hopper).

Which lane holds which element: PTX ISA, "Matrix fragments for mma.m16n8k32", "m16n8k16" and "for
wgmma".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qserve_jax.pallas_kernels.intrinsics._mlir import (
    change_in_place,
    do_ptx,
    ptx_name,
    ptx_value,
    ptx_values,
    vector,
)
from qserve_jax.pallas_kernels.intrinsics.registers import F32, I32

# A warp


def load_matrix(address: I32, offset: int = 0, *, transposed: bool = False) -> list[I32]:
    """ldmatrix: four matrices of 8 rows x 16 bytes; lane l names row l % 8 of matrix l // 8.

    Word j of lane l is bytes 4 (l % 4) .. + 3 of row l // 4 of matrix j: for int8 rows of tokens,
    words 0, 1 and 2, 3 are the B fragments of two mma_s8 over features 0..31 and 32..63.

    transposed: word j of lane l is column l // 4, rows 2 (l % 4) and the next, of 16-bit numbers.
    """
    trans = ".trans" if transposed else ""
    code = f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {vector(0, 4)}, [$4+{offset}];"
    return ptx_values(I32, 4, code, address, effect=True, convergent=True)


def mma_s8(acc: Sequence[I32], a: Sequence[I32], b: Sequence[I32]) -> list[I32]:
    """acc[4] + a[4] @ b[2], m16n8k32, int8 x int8 -> int32."""
    code = (
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        f"{vector(0, 4)}, {vector(4, 4)}, {vector(8, 2)}, {vector(10, 4)};"
    )
    return ptx_values(I32, 4, code, *a, *b, *acc, convergent=True)


def mma_halves(acc: Sequence[F32], a: Sequence[I32], b: Sequence[I32], dtype: Any) -> list[F32]:
    """acc[4] + a[4] @ b[2], m16n8k16, bf16 or f16 (`dtype`) with sums in float32.

    Of lane l, g = l // 4 and c = l % 4: a[i] is row g + 8 (i % 2), columns 2 c + 8 (i // 2) and the
    next; b[i] is rows 2 c + 8 i and the next, column g; acc[i] is row g + 8 (i // 2), column
    2 c + i % 2.
    """
    name = ptx_name(dtype)
    code = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32 "
        f"{vector(0, 4)}, {vector(4, 4)}, {vector(8, 2)}, {vector(10, 4)};"
    )
    return ptx_values(F32, 4, code, *a, *b, *acc, convergent=True)


def transpose_halves(value: I32) -> I32:
    """movmatrix: transposes 8 x 8 half words, of which lane l holds row l // 4, columns
    2 (l % 4) and the next."""
    code = "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;"
    return ptx_value(I32, code, value, convergent=True)


# A warpgroup. Asynchronous: fence, wgmma as often as wanted, commit, wait. B lies in shared memory,
# swizzled by 128 bytes: in rows of 128 bytes, whose 16-byte parts are XORed with the row's number,
# from addresses that are multiples of 1024 (PTX ISA, "Asynchronous warpgroup level matrix shared
# memory layout", "Matrix descriptor format").


def wgmma_fence[R: (I32, F32)](registers: Sequence[R]) -> list[R]:
    """Before a wgmma that reads registers which were written since the last one."""
    return change_in_place("wgmma.fence.sync.aligned;", registers)


def wgmma_descriptor(address: I32, *, columns_apart: int = 16) -> I32:
    """The low half of the descriptor of a tile in shared memory; 16 bytes further add 1.

    K-major (int8 or halves): rows are B's columns, and hold 128 bytes along K; 32 bytes further
    is the next wgmma along K. Transposed (halves only): rows are along K, and hold 64 columns; the
    next 64 columns are `columns_apart` bytes further, the next wgmma along K is 2048 further.
    Either way 8 rows further are 1024 bytes further.
    """
    return ((address & 0x3FFFF) >> 4) | columns_apart >> 4 << 16


_DESCRIPTOR_HIGH = 1 << 30 | 1024 >> 4  # 128-byte swizzle, stride between groups of 8 rows


def wgmma_s8(acc: Sequence[I32], a: Sequence[I32], descriptor: I32) -> list[I32]:
    """Starts acc += a @ b.T: int8 [64, 32] in registers, b int8 [tokens, 32] in shared memory.

    acc: int32 [64, tokens] in tokens / 2 registers, as mma_s8 per warp and 8 tokens. Neither `acc`
    nor `a` may be touched until `wgmma_wait`.
    """
    count = len(acc)
    d = 2 * count
    code = (
        f"{{ .reg .b64 b; .reg .pred add; setp.ne.b32 add, 1, 0; "
        f"mov.b64 b, {{${d + 4}, {_DESCRIPTOR_HIGH}}}; "
        f"wgmma.mma_async.sync.aligned.m64n{2 * count}k32.s32.s8.s8 "
        f"{vector(0, count)}, {vector(d, 4)}, b, add; }}"
    )
    return change_in_place(code, acc, *a, descriptor)


def wgmma_halves(
    acc: Sequence[F32] | int, a: Sequence[I32], descriptor: I32, *, transposed: bool = False
) -> list[F32]:
    """Starts acc += a @ b: float16 [64, 16] in registers, b float16 [16, columns] in shared memory.

    acc: float32 [64, columns] in columns / 2 registers, or the number of columns where the sums
    begin here. a, and acc for each 8 columns, as mma_halves per warp. transposed: b is.

    Neither `acc` nor `a` may be touched until `wgmma_wait`.
    """
    begins = isinstance(acc, int)
    count = acc // 2 if begins else len(acc)
    first = count if begins else 2 * count  # what is changed in place takes two numbers
    code = (
        f"{{ .reg .b64 b; .reg .pred add; setp.ne.b32 add, {int(not begins)}, 0; "
        f"mov.b64 b, {{${first + 4}, {_DESCRIPTOR_HIGH}}}; "
        f"wgmma.mma_async.sync.aligned.m64n{2 * count}k16.f32.f16.f16 "
        f"{vector(0, count)}, {vector(first, 4)}, b, add, 1, 1, {int(transposed)}; }}"
    )
    if begins:
        return ptx_values(F32, count, code, *a, descriptor, effect=True, convergent=True)
    return change_in_place(code, acc, *a, descriptor)


def wgmma_commit() -> None:
    do_ptx("wgmma.commit_group.sync.aligned;", convergent=True)


def wgmma_wait[R: (I32, F32)](acc: Sequence[R], a: Sequence[I32]) -> list[R]:
    """Until all wgmma of this warpgroup are done. `a`: operands, in registers kept so long."""
    return change_in_place("wgmma.wait_group.sync.aligned 0;", acc, *a)
