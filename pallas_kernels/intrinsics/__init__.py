"""Registers, memory and PTX for warp-level Mosaic GPU kernels.

    registers     I32, F32, Predicate and what gives them
    packed        two halves or four bytes in a register
    control       if and loop of the machine
    threads       where a thread stands; threads that meet, and reduce over a warp
    memory        addresses, loads, stores
    barriers      mbarriers
    async_copies  cp.async, bulk copies, TMA
    tensor_cores  mma, wgmma, and the matrices they take
    target        the compute capability to lower for
    kernel        `launch`: a body as a JAX function

Kernels say `from qserve_jax.pallas_kernels import intrinsics as ptx` and take every name from here.
A body runs per thread (Lane semantics) and does its own synchronisation. Index formulas in I32,
which has Python's operators, can be tested with numpy integers.

Nothing else of this library touches JAX's MLIR internals and Mosaic, which move between releases
(tests/test_internals.py).
"""

from qserve_jax.pallas_kernels.intrinsics.async_copies import (
    commit_copies,
    copy_4_bytes,
    copy_16_bytes,
    copy_tile_to_shared,
    copy_to_shared,
    tensor_map,
    wait_all_copies,
    wait_copies,
)
from qserve_jax.pallas_kernels.intrinsics.barriers import (
    arrive,
    arrive_in_block,
    expect_bytes,
    init_barrier,
    publish_barriers,
    wait,
)
from qserve_jax.pallas_kernels.intrinsics.control import branch, loop, when
from qserve_jax.pallas_kernels.intrinsics.kernel import launch
from qserve_jax.pallas_kernels.intrinsics.memory import (
    Address,
    global_address,
    load_global,
    load_shared,
    shared_address,
    store_global,
    store_shared,
    store_shared_words,
)
from qserve_jax.pallas_kernels.intrinsics.packed import (
    add_bytes,
    low_bytes,
    max_magnitudes,
    pack_halves,
    unpack_halves,
)
from qserve_jax.pallas_kernels.intrinsics.registers import (
    F32,
    I32,
    Predicate,
    bits_float,
    constant,
    constant_float,
    exp2,
    float_bits,
    maximum,
    minimum,
    opaque,
    reciprocal,
    rsqrt,
    select,
    to_float,
)
from qserve_jax.pallas_kernels.intrinsics.target import architecture
from qserve_jax.pallas_kernels.intrinsics.tensor_cores import (
    load_matrix,
    mma_s8,
    transpose_halves,
    wgmma_commit,
    wgmma_descriptor,
    wgmma_fence,
    wgmma_s8,
    wgmma_wait,
)
from qserve_jax.pallas_kernels.intrinsics.threads import (
    arrive_at_block,
    block_index,
    cluster_rank,
    set_max_registers,
    sync_block,
    sync_cluster,
    sync_warp,
    thread_index,
    warp_index,
    warp_max,
    warp_sum,
    warp_sum_float,
)

__all__ = [
    "Address",
    "F32",
    "I32",
    "Predicate",
    "add_bytes",
    "architecture",
    "arrive",
    "arrive_at_block",
    "arrive_in_block",
    "bits_float",
    "block_index",
    "branch",
    "cluster_rank",
    "commit_copies",
    "constant",
    "constant_float",
    "copy_16_bytes",
    "copy_4_bytes",
    "copy_tile_to_shared",
    "copy_to_shared",
    "exp2",
    "expect_bytes",
    "float_bits",
    "global_address",
    "init_barrier",
    "launch",
    "load_global",
    "load_matrix",
    "load_shared",
    "loop",
    "low_bytes",
    "max_magnitudes",
    "maximum",
    "minimum",
    "mma_s8",
    "opaque",
    "pack_halves",
    "publish_barriers",
    "reciprocal",
    "rsqrt",
    "select",
    "set_max_registers",
    "shared_address",
    "store_global",
    "store_shared",
    "store_shared_words",
    "sync_block",
    "sync_cluster",
    "sync_warp",
    "tensor_map",
    "thread_index",
    "to_float",
    "transpose_halves",
    "unpack_halves",
    "wait",
    "wait_all_copies",
    "wait_copies",
    "warp_index",
    "warp_max",
    "warp_sum",
    "warp_sum_float",
    "wgmma_commit",
    "wgmma_descriptor",
    "wgmma_fence",
    "wgmma_s8",
    "wgmma_wait",
    "when",
]
