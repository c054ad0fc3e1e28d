"""Memory of the other devices of a mesh, in a kernel that all of them run (within `shard_map`).

XLA tells a kernel where its operands and outputs lie on every device, as far as one process has
them all and they see each other's memory (NVLink, or PCIe's peer access). It waits for nobody:
`launch(peers=True)` leaves its barrier out, and what is there, and when, kernels tell each other by
flags.
"""

from __future__ import annotations

from typing import Any

from qserve_jax.pallas_kernels.intrinsics._mlir import do_ptx, mlir_i32, ptx_value
from qserve_jax.pallas_kernels.intrinsics.memory import Address, global_address
from qserve_jax.pallas_kernels.intrinsics.registers import I32


def own_rank(context: Any) -> I32:
    """This device's index in the mesh. context: of `launch(with_context=True)`."""
    return I32(context.device_id())


def address_on(context: Any, ref: Any, rank: I32) -> Address:
    """Of the same operand or output of `launch` on the device of a rank, this one's too."""
    return global_address(context.to_remote(ref, mlir_i32(rank)))


def raise_flag(address: Address, value: I32) -> None:
    """Stores it, visible no sooner than all that this thread, and threads it has met in
    `sync_block`, have read and written before."""
    do_ptx("st.release.sys.global.b32 [$0], $1;", address, value)


def wait_for_flag(address: Address, value: I32) -> None:
    """Until the word is `value`; then what came before `raise_flag` is visible to this thread, and
    to threads it meets."""
    code = (
        "{ .reg .pred other; .reg .b32 found; again: ld.acquire.sys.global.b32 found, [$0]; "
        "setp.ne.b32 other, found, $1; @other bra again; }"
    )
    do_ptx(code, address, value)


def load_flag(address: Address) -> I32:
    """A word that only this thread's block writes, in this launch and those before."""
    return ptx_value(I32, "ld.relaxed.gpu.global.b32 $0, [$1];", address, effect=True)
