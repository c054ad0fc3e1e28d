"""Where a thread stands, and what threads do together: meet, and reduce over a warp."""

from __future__ import annotations

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir.dialects import arith, gpu

from qserve_jax.pallas_kernels.intrinsics._mlir import do_ptx, ptx_value
from qserve_jax.pallas_kernels.intrinsics.registers import F32, I32, Predicate, select


def block_index() -> I32:
    """Of `launch`'s blocks. vmap adds further dimensions to the grid, and slices the operands."""
    return I32(arith.index_cast(I32.mlir_type(), gpu.block_id(gpu.Dimension.x)))


def thread_index() -> I32:
    """Of the block's threads."""
    return I32(mgpu.utils.thread_idx())


def warp_index() -> I32:
    """thread_index() // 32, known to be the same in the whole warp."""
    return I32(mgpu.utils.warp_idx(sync=True))


def cluster_rank() -> I32:
    """This block's index in its cluster."""
    return ptx_value(I32, "mov.u32 $0, %cluster_ctarank;")


def sync_warp() -> None:
    do_ptx("bar.warp.sync 0xffffffff;", convergent=True)


def sync_block(threads: int, barrier: I32 | int = 1) -> None:
    """Of `threads` threads, whole warps; each group that meets has a barrier of 1..15."""
    do_ptx(f"bar.sync $0, {threads};", barrier, convergent=True)


def arrive_at_block(threads: int, barrier: I32 | int) -> None:
    """Counts among those that meet in `sync_block`, and does not wait."""
    do_ptx("bar.arrive $0, $1;", barrier, threads, convergent=True)


def sync_cluster() -> None:
    """Of all threads of all blocks; shared memory written before is visible after."""
    sync_warp()
    do_ptx(
        "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;",
        convergent=True,
    )


def arrive_at_cluster() -> None:
    """The first half of `meet_cluster`, which does not wait."""
    sync_warp()
    do_ptx("barrier.cluster.arrive.relaxed.aligned;", convergent=True)


def wait_for_cluster() -> None:
    """The second half."""
    sync_warp()
    do_ptx("barrier.cluster.wait.aligned;", convergent=True)


def meet_cluster() -> None:
    """As `sync_cluster`, but orders no memory, and so waits for none: before a block ends, from
    whose shared memory others have loaded what they have stored since."""
    sync_warp()
    do_ptx("barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;", convergent=True)


def set_max_registers(count: int, *, increase: bool) -> None:
    """How many registers each thread of this warpgroup has from here on; a multiple of 8."""
    action = "inc" if increase else "dec"
    do_ptx(f"setmaxnreg.{action}.sync.aligned.u32 {count};", convergent=True)


def warp_max(value: I32) -> I32:
    """The largest of the warp's 32 signed integers, in every lane."""
    return ptx_value(I32, "redux.sync.max.s32 $0, $1, 0xffffffff;", value, convergent=True)


def warp_sum(value: I32) -> I32:
    """The sum of the warp's 32 integers, in every lane."""
    return ptx_value(I32, "redux.sync.add.s32 $0, $1, 0xffffffff;", value, convergent=True)


def warp_sum_float(value: F32) -> F32:
    """The sum of the warp's 32 floats, in every lane with the same bits: a butterfly."""
    for lanes in (16, 8, 4, 2, 1):
        value += exchange(value, lanes)
    return value


def exchange[R: (I32, F32)](value: R, lanes: int) -> R:
    """The value of the lane whose number differs by XOR with `lanes`, a power of two below 32."""
    code = f"shfl.sync.bfly.b32 $0, $1, {lanes}, 31, 0xffffffff;"
    return ptx_value(type(value), code, value, convergent=True)


def value_of_lane[R: (I32, F32)](value: R, lane: I32 | int) -> R:
    """The value that a lane of the warp holds; each asks for its own."""
    code = "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;"
    return ptx_value(type(value), code, value, lane, convergent=True)


def any_lane(condition: Predicate) -> Predicate:
    """Whether it holds in any lane of the warp."""
    code = (
        "{ .reg .pred one, all; setp.ne.b32 one, $1, 0; "
        "vote.sync.any.pred all, one, 0xffffffff; selp.b32 $0, 1, 0, all; }"
    )
    return ptx_value(I32, code, select(condition, 1, 0), effect=True, convergent=True) > 0
