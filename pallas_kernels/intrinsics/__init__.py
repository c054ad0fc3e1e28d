"""Registers, memory and PTX for warp-level Mosaic GPU kernels.

    registers     I32, F32, Predicate and what gives them
    packed        two halves or four bytes in a register
    vectors       several words of a dtype at once
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
    fence_reads,
    fence_writes,
    init_barrier,
    publish_barriers,
    wait,
)
from qserve_jax.pallas_kernels.intrinsics.control import (
    branch,
    branch_values,
    loop,
    when,
)
from qserve_jax.pallas_kernels.intrinsics.kernel import launch
from qserve_jax.pallas_kernels.intrinsics.memory import (
    Address,
    address_in_block,
    global_address,
    load_cluster,
    load_global,
    load_shared,
    shared_address,
    store_global,
    store_shared,
    store_shared_words,
)
from qserve_jax.pallas_kernels.intrinsics.packed import (
    add_bytes,
    add_halves,
    low_bytes,
    masked_or,
    max_magnitudes,
    multiply_add_halves,
    pack_halves,
    pick_bytes,
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
    float_maximum,
    float_minimum,
    maximum,
    minimum,
    multiply_add,
    opaque,
    reciprocal,
    rsqrt,
    select,
    select_float,
    to_float,
)
from qserve_jax.pallas_kernels.intrinsics.target import architecture
from qserve_jax.pallas_kernels.intrinsics.tensor_cores import (
    load_matrix,
    mma_halves,
    mma_s8,
    transpose_halves,
    wgmma_commit,
    wgmma_descriptor,
    wgmma_fence,
    wgmma_halves,
    wgmma_s8,
    wgmma_wait,
)
from qserve_jax.pallas_kernels.intrinsics.threads import (
    any_lane,
    arrive_at_block,
    block_index,
    cluster_rank,
    exchange,
    meet_cluster,
    set_max_registers,
    sync_block,
    sync_cluster,
    sync_warp,
    thread_index,
    value_of_lane,
    warp_index,
    warp_max,
    warp_sum,
    warp_sum_float,
)
from qserve_jax.pallas_kernels.intrinsics.vectors import (
    floats_of,
    load_words,
    store_words,
    words_of,
)

__all__ = [
    "Address",
    "F32",
    "I32",
    "Predicate",
    "add_bytes",
    "add_halves",
    "address_in_block",
    "any_lane",
    "architecture",
    "arrive",
    "arrive_at_block",
    "arrive_in_block",
    "bits_float",
    "block_index",
    "branch",
    "branch_values",
    "cluster_rank",
    "commit_copies",
    "constant",
    "constant_float",
    "copy_16_bytes",
    "copy_4_bytes",
    "copy_tile_to_shared",
    "copy_to_shared",
    "exchange",
    "exp2",
    "expect_bytes",
    "fence_reads",
    "fence_writes",
    "float_bits",
    "float_maximum",
    "float_minimum",
    "floats_of",
    "global_address",
    "init_barrier",
    "launch",
    "load_cluster",
    "load_global",
    "load_matrix",
    "load_shared",
    "load_words",
    "loop",
    "low_bytes",
    "masked_or",
    "max_magnitudes",
    "maximum",
    "meet_cluster",
    "minimum",
    "mma_halves",
    "mma_s8",
    "multiply_add",
    "multiply_add_halves",
    "opaque",
    "pack_halves",
    "pick_bytes",
    "publish_barriers",
    "reciprocal",
    "rsqrt",
    "select",
    "select_float",
    "set_max_registers",
    "shared_address",
    "store_global",
    "store_shared",
    "store_shared_words",
    "store_words",
    "sync_block",
    "sync_cluster",
    "sync_warp",
    "tensor_map",
    "thread_index",
    "to_float",
    "transpose_halves",
    "unpack_halves",
    "value_of_lane",
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
    "wgmma_halves",
    "wgmma_s8",
    "wgmma_wait",
    "when",
    "words_of",
]
