"""Registers, shared memory and PTX for warp-level Mosaic GPU kernels.

The one module that touches JAX's MLIR internals, which move between releases. A kernel body written
with it runs per thread (Lane semantics) and does its own synchronisation: see `launch`.

Values are `I32`, `F32` (a register each) and `Address` (global memory, 64 bits). Addresses in
shared memory are plain I32 byte offsets, as in PTX. `I32` has Python's operators, so that index
formulas can be written once and tested with numpy integers.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf


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
    return I32(mgpu.utils.block_idx())


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


def store_global(address: Address, values: Sequence[I32]) -> None:
    """Consecutive words (1, 2 or 4), aligned to all of them."""
    suffix = f".v{len(values)}" if len(values) > 1 else ""
    _ptx(f"st.global{suffix}.b32 [$0], {_vector(1, len(values))};", address, *values)


def to_float(value: I32) -> F32:
    """Signed integer to float32, to nearest, as XLA converts."""
    return F32(arith.sitofp(ir.F32Type.get(), value.value))


def float_bits(value: F32) -> I32:
    return I32(arith.bitcast(_i32_type(), value.value))


def pack_halves(low: F32, high: F32, dtype: Any) -> I32:
    """Two floats rounded to nearest even to bf16 or f16, low in the low half."""
    name = {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(dtype).name]
    return I32(_ptx(f"cvt.rn.{name}x2.f32 $0, $1, $2;", high, low, result=_i32_type()))


def mma_s8(acc: Sequence[I32], a: Sequence[I32], b: Sequence[I32]) -> list[I32]:
    """acc[4] + a[4] @ b[2], m16n8k32, int8 x int8 -> int32, on the tensor cores (one warp)."""
    code = (
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        f"{_vector(0, 4)}, {_vector(4, 4)}, {_vector(8, 2)}, {_vector(10, 4)};"
    )
    values = _ptx(code, *a, *b, *acc, result=[_i32_type()] * 4, convergent=True)
    return [I32(v) for v in values]


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


def fence_shared_reads() -> None:
    """Orders this thread's accesses to shared memory before later asynchronous copies into it."""
    _ptx("fence.proxy.async.shared::cta;")


def sync_warp() -> None:
    _ptx("bar.warp.sync 0xffffffff;", convergent=True)


def sync_block(threads: int) -> None:
    _ptx(f"bar.sync 1, {threads};", convergent=True)


# Launch


def launch(
    body: Callable[..., None],
    inputs: Sequence[jax.Array],
    out: jax.ShapeDtypeStruct,
    *,
    name: str,
    blocks: int,
    warpgroups: int,
    shared_bytes: int,
    barriers: int,
) -> jax.Array:
    """Run body(*inputs, out, shared, barriers), given as MLIR memrefs, in every thread.

    blocks of `warpgroups` x 128 threads; shared: `shared_bytes` of scratch; barriers: room for that
    many mbarriers. Nothing is synchronised or initialised but by the body.
    """
    ref = plgpu.RefType()

    def kernel(*refs: Any) -> None:
        def inline(_: Any, *memrefs: Any) -> tuple[()]:
            body(*memrefs)
            return ()

        plgpu.inline_mgpu(arg_types=(ref,) * len(refs), return_type=())(inline)(*refs)

    kernel.__name__ = name
    threads: dict[str, Any] = {}
    if warpgroups > 1:
        threads = {"num_threads": warpgroups, "thread_name": "warpgroup"}
    call = plgpu.kernel(
        kernel,
        out_type=out,
        grid=(blocks,),
        grid_names=("block",),
        scratch_types=[
            plgpu.SMEM((shared_bytes // 4,), jnp.int32),
            plgpu.SMEM((2 * barriers,), jnp.int32),
        ],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
        ),
        **threads,
    )
    return call(*inputs)
