"""mbarriers (Hopper): 8 bytes of shared memory each, on which threads and copies arrive.

A barrier goes through phases: one is complete when all its arrivals have come, and all the bytes
that it was told to expect.
"""

from __future__ import annotations

from qserve_jax.pallas_kernels.intrinsics._mlir import do_ptx
from qserve_jax.pallas_kernels.intrinsics.registers import I32


def init_barrier(barrier: I32, arrivals: int) -> None:
    do_ptx(f"mbarrier.init.shared::cta.b64 [$0], {arrivals};", barrier)


def publish_barriers() -> None:
    """Makes this thread's initialised barriers visible to asynchronous copies and the cluster."""
    do_ptx("fence.mbarrier_init.release.cluster;")
    do_ptx("fence.proxy.async.shared::cta;")


def fence_reads() -> None:
    """Before a thread lets the copy engine overwrite shared memory that it has loaded from."""
    do_ptx("fence.proxy.async.shared::cta;")


def fence_writes() -> None:
    """Before a thread lets wgmma, of any thread, read shared memory that it has stored to."""
    do_ptx("fence.proxy.async.shared::cta;")


def arrive(barrier: I32) -> None:
    do_ptx("mbarrier.arrive.shared::cta.b64 _, [$0];", barrier)


def arrive_in_block(barrier: I32, rank: I32) -> None:
    """Arrives on the barrier at the same address of the block of this rank in the cluster."""
    code = (
        "{ .reg .b32 there; mapa.shared::cluster.u32 there, $0, $1; "
        "mbarrier.arrive.shared::cluster.b64 _, [there]; }"
    )
    do_ptx(code, barrier, rank)


def expect_bytes(barrier: I32, count: I32 | int) -> None:
    """One arrival, and the phase also waits for this many bytes of copies."""
    do_ptx("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", barrier, count)


def wait(barrier: I32, parity: I32) -> None:
    """Until the phase of this parity (0 for the first) is complete."""
    code = (
        "{ .reg .pred done; again: "
        "mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1; "
        "@!done bra again; }"
    )
    do_ptx(code, barrier, parity, convergent=True)
