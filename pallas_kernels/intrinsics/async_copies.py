"""Copies from global to shared memory that a thread starts and does not wait for.

By the threads themselves (cp.async, from sm_80 on), which wait for groups of their own copies; and
by the copy engine (Hopper), which arrives on a barrier: of consecutive bytes, or of a tile (TMA).
Beside them registers that a thread sends to another block's shared memory, which arrive likewise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxlib.mlir.dialects import llvm

from qserve_jax.pallas_kernels.intrinsics._mlir import do_ptx, vector
from qserve_jax.pallas_kernels.intrinsics.memory import Address
from qserve_jax.pallas_kernels.intrinsics.registers import I32

# By the threads. Other threads see what has come after a barrier.


def copy_4_bytes(target: I32, source: Address) -> None:
    do_ptx("cp.async.ca.shared.global [$0], [$1], 4;", target, source)


def copy_16_bytes(
    target: I32, source: Address, *, offset: int = 0, source_offset: int = 0, filled: I32 | int = 16
) -> None:
    """offset, source_offset: bytes beyond the addresses. filled = 0 writes zeros, reads nothing."""
    code = f"cp.async.cg.shared.global [$0+{offset}], [$1+{source_offset}], 16, $2;"
    do_ptx(code, target, source, filled)


def commit_copies() -> None:
    """What this thread copies since the last commit is a group."""
    do_ptx("cp.async.commit_group;")


def wait_copies(pending: int) -> None:
    """Until at most the last `pending` groups of this thread are under way."""
    do_ptx(f"cp.async.wait_group {pending};")


def wait_all_copies() -> None:
    """Until all copies of this thread are done, in a group or not."""
    do_ptx("cp.async.wait_all;")


# By the copy engine


def copy_to_shared(target: I32, source: Address, count: I32 | int, barrier: I32) -> None:
    """Starts a copy of `count` bytes (a multiple of 16, as both addresses) that ends on `barrier`.

    The barrier must expect as many bytes, see `expect_bytes`.
    """
    code = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];"
    do_ptx(code, target, source, count, barrier)


def tensor_map(context: Any, ref: Any, box: tuple[int, int]) -> Address:
    """A descriptor for `copy_tile_to_shared` of a row-major array, swizzled by 128 bytes.

    context: of `launch(..., with_context=True)`. ref: an operand, int8 [rows, columns] with columns
    a multiple of 16; box: rows (at most 256) and 128 columns of one copy.
    """
    descriptor = context._get_tma_desc(ref, (), None, box, 128, None)
    return Address(llvm.ptrtoint(Address.mlir_type(), descriptor))


def copy_tile_to_shared(
    target: I32, descriptor: Address, row: I32, column: I32, barrier: I32, *, blocks: int = 1
) -> None:
    """Starts the copy of a box; what lies outside the array is filled with zeros, and counted.

    blocks: of the cluster, which all get it, at the same addresses of tile and barrier.
    """
    multicast = ".multicast::cluster" if blocks > 1 else ""
    mask = f", {(1 << blocks) - 1}" if blocks > 1 else ""
    code = (
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        f"{multicast} [$0], [$1, {{$2, $3}}], [$4]{mask};"
    )
    do_ptx(code, target, descriptor, column, row, barrier)


# To another block


def send_words(address: I32, values: Sequence[I32], barrier: I32, offset: int = 0) -> None:
    """Starts to store four words, aligned to all of them; 16 bytes on the barrier.

    address, barrier: of `address_in_block`, both of the same block.
    """
    code = (
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 "
        f"[$0+{offset}], {vector(1, 4)}, [$5];"
    )
    do_ptx(code, address, *values, barrier)
