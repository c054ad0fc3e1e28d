"""Registers, shared memory and PTX for warp-level Mosaic GPU kernels.

The one module that touches JAX's MLIR internals, which move between releases. A kernel body written
with it runs per thread (Lane semantics) and does its own synchronisation: see `launch`.

Values are `I32`, `F32` (a register each) and `Address` (global memory, 64 bits). Addresses in
shared memory are plain I32 byte offsets, as in PTX. `I32` has Python's operators, so that index
formulas can be written once and tested with numpy integers.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, scf


def _i32_type() -> Any:
    return ir.IntegerType.get_signless(32)


def _i64_type() -> Any:
    return ir.IntegerType.get_signless(64)


def _i32(value: Any) -> Any:
    """The MLIR value of an I32, or a constant; 2**31.. are taken as the same 32 bits."""
    if isinstance(value, I32):
        return value.value
    return mgpu.utils.c(value - 2**32 if value >= 2**31 else value, _i32_type())


def _operator(op: Callable, *, swap: bool = False) -> Callable:
    def apply(self: I32, other: Any) -> I32:
        left, right = (other, self) if swap else (self, other)
        return I32(op(_i32(left), _i32(right)))

    return apply


def _comparison(predicate: str) -> Callable:
    def compare(self: I32, other: Any) -> Predicate:
        kind = getattr(arith.CmpIPredicate, predicate)
        return Predicate(arith.cmpi(kind, _i32(self), _i32(other)))

    return compare


@dataclasses.dataclass(frozen=True, eq=False)
class I32:
    """32 bits in a register. //, % and >> take them as unsigned, < and > as signed."""

    value: Any

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


@dataclasses.dataclass(frozen=True)
class Predicate:
    """One bit."""

    value: Any

    def __and__(self, other: Predicate) -> Predicate:
        return Predicate(arith.andi(self.value, other.value))

    def __invert__(self) -> Predicate:
        true = arith.constant(ir.IntegerType.get_signless(1), 1)
        return Predicate(arith.xori(self.value, true))


@dataclasses.dataclass(frozen=True)
class F32:
    """A float32 in a register; every operation rounds to nearest and none is contracted to FMA."""

    value: Any

    def _apply(self, op: str, other: F32) -> F32:
        return F32(_ptx(f"{op}.rn.f32 $0, $1, $2;", self, other, result=ir.F32Type.get()))

    def __add__(self, other: F32) -> F32:
        return self._apply("add", other)

    def __sub__(self, other: F32) -> F32:
        return self._apply("sub", other)

    def __mul__(self, other: F32) -> F32:
        return self._apply("mul", other)

    def __truediv__(self, other: F32) -> F32:
        return self._apply("div", other)


@dataclasses.dataclass(frozen=True)
class Address:
    """A byte address in global memory."""

    value: Any

    def advance(self, index: I32 | int, stride: int) -> Address:
        """index * stride bytes further, in 64 bits; index >= 0."""
        wide = arith.extui(_i64_type(), _i32(index))
        step = arith.muli(wide, mgpu.utils.c(stride, _i64_type()))
        return Address(arith.addi(self.value, step))


def select(condition: Predicate, yes: Any, no: Any) -> I32:
    return I32(arith.select(condition.value, _i32(yes), _i32(no)))


def minimum(a: Any, b: Any) -> I32:
    """The smaller, as signed integers."""
    return I32(arith.minsi(_i32(a), _i32(b)))


def maximum(a: Any, b: Any) -> I32:
    """The larger, as signed integers."""
    return I32(arith.maxsi(_i32(a), _i32(b)))


# Control flow


@contextlib.contextmanager
def when(condition: Predicate) -> Iterator[None]:
    """The statements inside run where the condition holds."""
    branch = scf.IfOp(condition.value)
    with ir.InsertionPoint(branch.then_block):
        yield
        scf.yield_([])


def branch(condition: Predicate, yes: Callable[[], None], no: Callable[[], None]) -> None:
    """One of two bodies: whole warps, or even warpgroups, that do different things."""
    op: Any = scf.IfOp(condition.value, has_else=True)
    for block, body in ((op.then_block, yes), (op.else_block, no)):
        with ir.InsertionPoint(block):
            body()
            scf.yield_([])


def loop(count: I32, carry: Sequence[I32], body: Callable[..., Sequence[I32]]) -> list[I32]:
    """carry = body(i, carry) for i in 0..count-1, a loop of the machine."""
    values = [c.value for c in carry]
    op: Any = scf.ForOp(_i32(0), count.value, _i32(1), values)
    with ir.InsertionPoint(op.body):
        inner = [I32(v) for v in op.inner_iter_args]
        scf.yield_([v.value for v in body(I32(op.induction_variable), inner)])
    return [I32(v) for v in op.results]


def constant(value: int) -> I32:
    return I32(_i32(value))


# Where a thread is


def block_index() -> I32:
    """Of `launch`'s blocks. vmap adds further dimensions to the grid, and slices the operands."""
    return I32(arith.index_cast(_i32_type(), gpu.block_id(gpu.Dimension.x)))


def thread_index() -> I32:
    return I32(mgpu.utils.thread_idx())


def warp_index() -> I32:
    """thread_index() // 32, known to be the same in the whole warp."""
    return I32(mgpu.utils.warp_idx(sync=True))


def global_address(ref: Any) -> Address:
    return Address(llvm.ptrtoint(_i64_type(), mgpu.utils.memref_ptr(ref)))


def shared_address(ref: Any) -> I32:
    return I32(llvm.ptrtoint(_i32_type(), mgpu.utils.memref_ptr(ref)))


# PTX


def _ptx(code: str, *args: Any, result: Any = None, effect=False, convergent=False) -> Any:
    """Inline PTX. effect: not to be moved or dropped. convergent: the warp acts together."""
    return mgpu.utils.inline_ptx(
        code,
        *(
            arg.value if hasattr(arg, "value") and not isinstance(arg, ir.Value) else arg
            for arg in args
        ),
        result_types=result,
        has_side_effects=effect or result is None,
        convergent=convergent,
    )


def _vector(first: int, count: int) -> str:
    """Operands $first.. as PTX writes a vector of them."""
    names = ", ".join(f"${i}" for i in range(first, first + count))
    return f"{{{names}}}" if count > 1 else names


def _load(space: str, address: Any, offset: int, count: int, kind: type) -> list[Any]:
    suffix = f".v{count}" if count > 1 else ""
    element = ir.F32Type.get() if kind is F32 else _i32_type()
    letter = "f" if kind is F32 else "b"
    code = f"ld.{space}{suffix}.{letter}32 {_vector(0, count)}, [${count}+{offset}];"
    values = _ptx(code, address, result=[element] * count, effect=True)
    return [kind(v) for v in values]


def load_shared(address: I32, offset: int = 0, *, count: int = 1, kind: type = I32) -> list[Any]:
    """`count` (1, 2, 4) consecutive words of shared memory, aligned to all of them."""
    return _load("shared", address, offset, count, kind)


def load_global(address: Address, *, count: int = 1, kind: type = I32) -> list[Any]:
    """`count` words of global memory that no one writes while the kernel runs."""
    return _load("global.nc", address, 0, count, kind)


def store_shared(address: I32, value: I32 | F32, offset: int = 0) -> None:
    letter = "f" if isinstance(value, F32) else "b"
    _ptx(f"st.shared.{letter}32 [$0+{offset}], $1;", address, value)


def load_matrix(address: I32, offset: int = 0) -> list[I32]:
    """ldmatrix: four matrices of 8 rows x 16 bytes; lane l names row l % 8 of matrix l // 8.

    Word j of lane l is bytes 4 (l % 4) .. + 3 of row l // 4 of matrix j: for int8 rows of tokens,
    words 0, 1 and 2, 3 are the B fragments of two mma_s8 over features 0..31 and 32..63.
    """
    code = f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {_vector(0, 4)}, [$4+{offset}];"
    values = _ptx(code, address, result=[_i32_type()] * 4, effect=True, convergent=True)
    return [I32(v) for v in values]


def store_shared_words(address: I32, values: Sequence[I32], offset: int = 0) -> None:
    """Four consecutive words, aligned to all of them."""
    _ptx(f"st.shared.v4.b32 [$0+{offset}], {_vector(1, 4)};", address, *values)


def store_global(address: Address, values: Sequence[I32]) -> None:
    """Consecutive words (1, 2 or 4), aligned to all of them."""
    suffix = f".v{len(values)}" if len(values) > 1 else ""
    _ptx(f"st.global{suffix}.b32 [$0], {_vector(1, len(values))};", address, *values)


def to_float(value: I32) -> F32:
    """Signed integer to float32, to nearest, as XLA converts."""
    return F32(arith.sitofp(ir.F32Type.get(), value.value))


def float_bits(value: F32) -> I32:
    return I32(arith.bitcast(_i32_type(), value.value))


def bits_float(value: I32) -> F32:
    return F32(arith.bitcast(ir.F32Type.get(), value.value))


def pack_halves(low: F32, high: F32, dtype: Any) -> I32:
    """Two floats rounded to nearest even to bf16 or f16, low in the low half."""
    name = {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(dtype).name]
    return I32(_ptx(f"cvt.rn.{name}x2.f32 $0, $1, $2;", high, low, result=_i32_type()))


def unpack_halves(word: I32, dtype: Any) -> tuple[F32, F32]:
    """The bf16 or f16 numbers in the low and the high half, exactly."""
    if jnp.dtype(dtype) == jnp.bfloat16:
        return bits_float(word << 16), bits_float(word & 0xFFFF0000)
    move = "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }"
    low, high = _ptx(move, word, result=[ir.F32Type.get()] * 2)
    return F32(low), F32(high)


def max_magnitudes(a: I32, b: I32, dtype: Any) -> I32:
    """The larger of |a| and |b| in each half, bf16 or f16; NaN where either is."""
    name = {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(dtype).name]
    code = f"max.NaN.{name}x2 $0, $1, $2;"
    return I32(_ptx(code, a & 0x7FFF7FFF, b & 0x7FFF7FFF, result=_i32_type()))


def opaque(word: I32) -> I32:
    """The word, where what is computed from it is not to be kept from an earlier time."""
    return I32(_ptx("mov.b32 $0, $1;", word, result=_i32_type(), effect=True))


def constant_float(value: float) -> F32:
    return F32(mgpu.utils.c(value, ir.F32Type.get()))


def exp2(x: F32) -> F32:
    """2**x to within 2 ulp (0 below 2**-126)."""
    return F32(_ptx("ex2.approx.ftz.f32 $0, $1;", x, result=ir.F32Type.get()))


def reciprocal(x: F32) -> F32:
    """1 / x to within 1 ulp (0 above 2**126)."""
    return F32(_ptx("rcp.approx.ftz.f32 $0, $1;", x, result=ir.F32Type.get()))


def rsqrt(x: F32) -> F32:
    """1 / sqrt(x) to within 2 ulp."""
    return F32(_ptx("rsqrt.approx.ftz.f32 $0, $1;", x, result=ir.F32Type.get()))


def low_bytes(a: I32, b: I32, c: I32, d: I32) -> I32:
    """The lowest byte of each, a's lowest."""
    code = (
        "{ .reg .b32 l, h; prmt.b32 l, $1, $2, 0x0040; prmt.b32 h, $3, $4, 0x0040; "
        "prmt.b32 $0, l, h, 0x5410; }"
    )
    return I32(_ptx(code, a, b, c, d, result=_i32_type()))


def add_bytes(word: I32, total: I32) -> I32:
    """total + the sum of the four int8 in word."""
    code = "dp4a.s32.s32 $0, $1, $2, $3;"
    return I32(_ptx(code, word, constant(0x01010101), total, result=_i32_type()))


def warp_max(value: I32) -> I32:
    """The largest of the warp's 32 signed integers, in every lane."""
    code = "redux.sync.max.s32 $0, $1, 0xffffffff;"
    return I32(_ptx(code, value, result=_i32_type(), convergent=True))


def warp_sum(value: I32) -> I32:
    """The sum of the warp's 32 integers, in every lane."""
    code = "redux.sync.add.s32 $0, $1, 0xffffffff;"
    return I32(_ptx(code, value, result=_i32_type(), convergent=True))


def warp_sum_float(value: F32) -> F32:
    """The sum of the warp's 32 floats, in every lane with the same bits: a butterfly."""
    for lanes in (16, 8, 4, 2, 1):
        code = f"shfl.sync.bfly.b32 $0, $1, {lanes}, 31, 0xffffffff;"
        value += F32(_ptx(code, value, result=ir.F32Type.get(), convergent=True))
    return value


def mma_s8(acc: Sequence[I32], a: Sequence[I32], b: Sequence[I32]) -> list[I32]:
    """acc[4] + a[4] @ b[2], m16n8k32, int8 x int8 -> int32, on the tensor cores (one warp)."""
    code = (
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        f"{_vector(0, 4)}, {_vector(4, 4)}, {_vector(8, 2)}, {_vector(10, 4)};"
    )
    values = _ptx(code, *a, *b, *acc, result=[_i32_type()] * 4, convergent=True)
    return [I32(v) for v in values]


def transpose_halves(value: I32) -> I32:
    """8 x 8 half words, row lane // 4 and columns 2 * (lane % 4) and the next, are transposed."""
    code = "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;"
    return I32(_ptx(code, value, result=_i32_type(), convergent=True))


# Tensor cores of Hopper: a warpgroup multiplies asynchronously (PTX ISA, wgmma)


def _asm_in_place(code: str, changed: Sequence[I32], *args: I32) -> list[I32]:
    """PTX with side effects on registers: $0.. are `changed`, in and out, and then `args`."""
    count = len(changed)
    constraints = ["=r"] * count + [str(i) for i in range(count)] + ["r"] * len(args)
    # The inputs that are tied to outputs take numbers too.
    result = llvm.inline_asm(
        llvm.StructType.get_literal([_i32_type()] * count),
        [v.value for v in (*changed, *args)],
        code,
        ",".join(constraints),
        has_side_effects=True,
        convergent=True,
        asm_dialect=0,
    )
    return [I32(llvm.extractvalue(_i32_type(), result, [i])) for i in range(count)]


def wgmma_fence(registers: Sequence[I32]) -> list[I32]:
    """Before a wgmma that reads registers which were written since the last one."""
    return _asm_in_place("wgmma.fence.sync.aligned;", registers)


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
        f"{_vector(0, count)}, {_vector(d, 4)}, b, add; }}"
    )
    return _asm_in_place(code, acc, *a, descriptor)


def wgmma_commit() -> None:
    _ptx("wgmma.commit_group.sync.aligned;", convergent=True)


def wgmma_wait(acc: Sequence[I32], a: Sequence[I32]) -> list[I32]:
    """Until all wgmma of this warpgroup are done. `a`: operands, in registers kept so long."""
    return _asm_in_place("wgmma.wait_group.sync.aligned 0;", acc, *a)


def wgmma_wait_for_older(a: Sequence[I32]) -> None:
    """Until all but the last committed group are done. `a`: their operands, kept so long."""
    _ptx("wgmma.wait_group.sync.aligned 1;", *a, convergent=True)


def set_max_registers(count: int, *, increase: bool) -> None:
    """How many registers each thread of this warpgroup has from here on; a multiple of 8."""
    action = "inc" if increase else "dec"
    _ptx(f"setmaxnreg.{action}.sync.aligned.u32 {count};", convergent=True)


# Asynchronous copies by the threads themselves (sm_80)


def copy_16_bytes(
    target: I32, source: Address, *, offset: int = 0, source_offset: int = 0, filled: I32 | int = 16
) -> None:
    """Starts a copy of 16 bytes to shared memory; filled = 0 writes zeros and reads nothing."""
    code = f"cp.async.cg.shared.global [$0+{offset}], [$1+{source_offset}], 16, $2;"
    _ptx(code, target, source, _i32(filled))


def commit_copies() -> None:
    """What this thread copies since the last commit is a group."""
    _ptx("cp.async.commit_group;")


def wait_copies(pending: int) -> None:
    """Until at most the last `pending` groups of this thread are under way."""
    _ptx(f"cp.async.wait_group {pending};")


# Barriers in shared memory (8 bytes each) and asynchronous copies that arrive on them


def init_barrier(barrier: I32, arrivals: int) -> None:
    _ptx(f"mbarrier.init.shared::cta.b64 [$0], {arrivals};", barrier)


def publish_barriers() -> None:
    """Makes this thread's initialised barriers visible to asynchronous copies."""
    _ptx("fence.mbarrier_init.release.cluster;")
    fence_shared_reads()


def arrive(barrier: I32) -> None:
    _ptx("mbarrier.arrive.shared::cta.b64 _, [$0];", barrier)


def wait(barrier: I32, parity: I32) -> None:
    """Until the phase of this parity (0 for the first) is complete."""
    code = (
        "{ .reg .pred done; again: "
        "mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1; "
        "@!done bra again; }"
    )
    _ptx(code, barrier, parity, convergent=True)


def expect_bytes(barrier: I32, count: I32 | int) -> None:
    """One arrival, and the phase also waits for this many bytes of copies."""
    _ptx("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", barrier, _i32(count))


def copy_to_shared(target: I32, source: Address, count: I32 | int, barrier: I32) -> None:
    """Starts an asynchronous copy of `count` bytes (16-byte multiples) that ends on `barrier`."""
    code = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];"
    _ptx(code, target, source, _i32(count), barrier)


def tensor_map(context: Any, ref: Any, box: tuple[int, int]) -> Address:
    """A descriptor for `copy_tile_to_shared` of a row-major array, swizzled by 128 bytes.

    context: of `launch(..., with_context=True)`. ref: an operand, int8 [rows, columns] with columns
    a multiple of 16; box: rows (at most 256) and 128 columns of one copy.
    """
    descriptor = context._get_tma_desc(ref, (), None, box, 128, None)
    return Address(llvm.ptrtoint(_i64_type(), descriptor))


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
    _ptx(code, target, descriptor, column, row, barrier)


def copy_word_to_shared(target: I32, source: Address) -> None:
    """Starts an asynchronous copy of 4 bytes, of this thread: see `await_word_copies`."""
    _ptx("cp.async.ca.shared.global [$0], [$1], 4;", target, source)


def await_word_copies() -> None:
    """Until this thread's `copy_word_to_shared` are done; others see them after a barrier."""
    _ptx("cp.async.wait_all;")


def fence_shared_reads() -> None:
    """Orders this thread's accesses to shared memory before later asynchronous copies into it."""
    _ptx("fence.proxy.async.shared::cta;")


def sync_warp() -> None:
    _ptx("bar.warp.sync 0xffffffff;", convergent=True)


def sync_block(threads: int, barrier: I32 | int = 1) -> None:
    """Of `threads` threads, whole warps; each group that meets has a barrier of 1..15."""
    _ptx(f"bar.sync $0, {threads};", _i32(barrier), convergent=True)


# Clusters of blocks


def cluster_rank() -> I32:
    """This block's index in its cluster."""
    return I32(_ptx("mov.u32 $0, %cluster_ctarank;", result=_i32_type()))


def sync_cluster() -> None:
    """Of all threads of all blocks; shared memory written before is visible after."""
    sync_warp()
    _ptx(
        "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;",
        convergent=True,
    )


def arrive_in_block(barrier: I32, rank: I32) -> None:
    """Arrives on the barrier at the same address of another block of the cluster."""
    code = (
        "{ .reg .b32 there; mapa.shared::cluster.u32 there, $0, $1; "
        "mbarrier.arrive.shared::cluster.b64 _, [there]; }"
    )
    _ptx(code, barrier, rank)


# Launch

# Mosaic lowers for the GPU that JAX finds, or Hopper where there is none, by this function. Here it
# asks `architecture` first.
_forced: contextvars.ContextVar[tuple[int, int] | None] = contextvars.ContextVar(
    "forced", default=None
)
_detected_architecture = mgpu.utils._infer_arch
mgpu.utils._infer_arch = lambda: _forced.get() or _detected_architecture()


@contextlib.contextmanager
def architecture(major: int, minor: int) -> Iterator[None]:
    """Mosaic kernels that are lowered inside are lowered for this compute capability.

    That decides which instructions Mosaic itself adds to a body. The GPU's own compute capability
    is what LLVM and ptxas then compile for, and nothing here can change that.
    """
    token = _forced.set((major, minor))
    try:
        yield
    finally:
        _forced.reset(token)


# A call whose Mosaic kernels are lowered for `arch`: lowering comes long after tracing.
_lowered_for = Primitive("lowered_for")


@_lowered_for.def_impl
def _(*args: jax.Array, **params: Any) -> jax.Array:
    return jax.jit(lambda *args: _lowered_for.bind(*args, **params))(*args)


@_lowered_for.def_abstract_eval
def _(*args: Any, out: jax.ShapeDtypeStruct, **_: Any) -> Any:
    return ShapedArray(out.shape, out.dtype)


def _lower_for(ctx: Any, *args: Any, call: Callable, arch: tuple[int, int], **_: Any) -> Any:
    with architecture(*arch):
        return mlir.lower_fun(call, multiple_results=False)(ctx, *args)


mlir.register_lowering(_lowered_for, _lower_for)


def launch(
    body: Callable[..., None],
    inputs: Sequence[jax.Array],
    out: Any,
    *,
    name: str,
    blocks: int,
    warpgroups: int,
    shared_bytes: int,
    barriers: int = 0,
    cluster: int = 1,
    with_context: bool = False,
    arch: tuple[int, int] | None = None,
) -> Any:
    """Run body(*inputs, out, shared, barriers), given as MLIR memrefs, in every thread.

    out: a ShapeDtypeStruct, or a list of them, each of which is then an argument of body.

    blocks of `warpgroups` x 128 threads; shared: `shared_bytes` of scratch; barriers: room for that
    many mbarriers, not given where there are none. Nothing is synchronised or initialised but by
    the body. cluster: of this many consecutive blocks, which divides their number. with_context:
    body(context, *inputs, ...), for `tensor_map`. arch: the compute capability to lower for, see
    `architecture`; None for the GPU's.
    """
    ref = plgpu.RefType()

    def kernel(*refs: Any) -> None:
        def inline(context: Any, *memrefs: Any) -> tuple[()]:
            body(*((context,) if with_context else ()), *memrefs)
            return ()

        plgpu.inline_mgpu(arg_types=(ref,) * len(refs), return_type=())(inline)(*refs)

    kernel.__name__ = name
    shape: dict[str, Any] = {}
    if warpgroups > 1:
        shape |= {"num_threads": warpgroups, "thread_name": "warpgroup"}
    if cluster > 1:
        shape |= {"cluster": (cluster,), "cluster_names": ("rank",)}
    scratch = [plgpu.SMEM((words,), jnp.int32) for words in (shared_bytes // 4, 2 * barriers)]
    call = plgpu.kernel(
        kernel,
        out_type=out,
        grid=(blocks // cluster,),
        grid_names=("block",),
        scratch_types=scratch if barriers else scratch[:1],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
        ),
        **shape,
    )
    if arch is not None:
        call = functools.partial(_lowered_for.bind, call=call, arch=arch, out=out)
    if arch is not None or with_context:  # a tensor map has the operand's own rank
        call = jax.custom_batching.sequential_vmap(call)
    return _without_derivative(call, name)(*inputs)


def _without_derivative(call: Callable, name: str) -> Callable:
    """The call, which says under jax.grad that it has none."""
    wrapped = jax.custom_jvp(call)

    def refuse(*_: Any) -> Any:
        raise NotImplementedError(
            f"{name} has no derivative: differentiate the float model, or use backend='reference'"
        )

    wrapped.defjvp(refuse)
    return wrapped
