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


# A warpgroup. Asynchronous: fence, wgmma_s8 as often as wanted, commit, wait.


def wgmma_fence(registers: Sequence[I32]) -> list[I32]:
    """Before a wgmma that reads registers which were written since the last one."""
    return change_in_place("wgmma.fence.sync.aligned;", registers)


def wgmma_descriptor(address: I32) -> I32:
    """The low half of the descriptor of a K-major int8 tile [tokens, 128] in shared memory.

    Swizzled by 128 bytes, so aligned to 1024; 8 tokens further are 1024 bytes further. 32 features
    further add 2.
    """
    return ((address & 0x3FFFF) >> 4) | 0x10000


_DESCRIPTOR_HIGH = 1 << 30 | 1024 >> 4  # 128-byte swizzle, stride between groups of 8 tokens


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


def wgmma_commit() -> None:
    do_ptx("wgmma.commit_group.sync.aligned;", convergent=True)


def wgmma_wait(acc: Sequence[I32], a: Sequence[I32]) -> list[I32]:
    """Until all wgmma of this warpgroup are done. `a`: operands, in registers kept so long."""
    return change_in_place("wgmma.wait_group.sync.aligned 0;", acc, *a)
