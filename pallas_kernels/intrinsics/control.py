"""Control flow of the machine. Python's own if and for unroll while the kernel is built."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import scf

from qserve_jax.pallas_kernels.intrinsics._mlir import Register, mlir_i32
from qserve_jax.pallas_kernels.intrinsics.registers import I32, Predicate


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


def branch_values[R: Register](
    condition: Predicate, kept: Sequence[R], changed: Callable[[], Sequence[R]]
) -> list[R]:
    """What `changed` gives where the condition holds, as many registers as `kept`; else those."""
    op: Any = scf.IfOp(condition.value, [r.value.type for r in kept], has_else=True)
    with ir.InsertionPoint(op.then_block):
        scf.yield_([r.value for r in changed()])
    with ir.InsertionPoint(op.else_block):
        scf.yield_([r.value for r in kept])
    return [type(r)(v) for r, v in zip(kept, op.results, strict=True)]


def loop[R: Register](count: I32, carry: Sequence[R], body: Callable[..., Sequence[R]]) -> list[R]:
    """carry = body(i, carry) for i in 0..count-1; returns the last carry."""
    kinds = [type(c) for c in carry]
    op: Any = scf.ForOp(mlir_i32(0), count.value, mlir_i32(1), [c.value for c in carry])
    with ir.InsertionPoint(op.body):
        inner = [kind(v) for kind, v in zip(kinds, op.inner_iter_args, strict=True)]
        scf.yield_([v.value for v in body(I32(op.induction_variable), inner)])
    return [kind(v) for kind, v in zip(kinds, op.results, strict=True)]
