"""One kernel for an all-reduce and what follows it: every rank reads the others' partials itself.

NCCL takes some 20 us for the 1 MB of a decode step, most of it until all have met; a kernel that
reads a peer's memory over NVLink needs the bytes' time and two meetings. A block owns a row, as in
quantize_activation/mosaic.py, and meets the blocks of the same row on the other ranks, no others:

    ready   raised on all ranks: this rank's partial is there, since the matmul before has ended
    load    the row of every rank, all vectors of a thread at once, when all are ready
    sum     in float32, by rank, so that all ranks get the same bits; plus the residual; stored
    norm    as there; when the block has met in it, all its loads are done
    done    raised on all ranks
    codes   as there
    wait    until all ranks are done: what comes next may write to this rank's partial

A flag is the number of the launch, which each row counts for itself, so that nothing is ever reset:
it is raised anew only after everybody has seen it, which the other meeting shows, and equality
survives the wrap of 2**32 launches. Flags live in memory of their own, zeros when the first kernel
starts on any device: a fast rank raises them while a slow one is still computing what is before.

A block waits for blocks of its own row only. Blocks start in the order of rows, on all ranks, so
that of the rows not done the first runs everywhere, however few fit on a GPU. All ranks must launch
the same kernels in the same order, as programs of one mesh do.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.intrinsics import F32, I32, Address
from qserve_jax.pallas_kernels.quantize_activation import mosaic as rows
from qserve_jax.pallas_kernels.sum_norm_quantize.api import MAX_RANKS, ROW_WORDS
from qserve_jax.quantization.qtensor import Array, Int8Activation

READY, DONE = 8, 16
"""Of a row's flags, where those that the ranks raise begin; word 0 counts its launches."""


def sum_norm_quantize(
    partial: Array,
    residual: Array,
    scale: Array,
    flags: Array,
    *,
    axis: str,
    eps: float,
    layer: Array | int | None,
    vectors: int | None = None,
) -> tuple[Array, Int8Activation]:
    """See `api`. vectors: how many each thread takes, None for the choice by width."""
    *lead, width = partial.shape
    count, ranks = math.prod(lead), jax.lax.axis_size(axis)
    norm = rows._Norm(eps, scale.dtype.name, None if layer is None else scale.shape[0])
    _check(partial, norm, count, ranks)
    vectors = vectors or rows.vectors_per_thread(width, rows.FEW_THREADS)
    p = rows._Problem(width, partial.dtype.name, vectors)
    operands = [partial.reshape(count, width), residual.reshape(count, width), flags, scale]
    operands += [] if layer is None else [jnp.asarray(layer, jnp.int32).reshape(1)]
    x, codes, step, code_sum = ptx.launch(
        functools.partial(_body, p, norm, ranks),
        operands,
        [
            jax.ShapeDtypeStruct((count, width), partial.dtype),
            jax.ShapeDtypeStruct((count, width), jnp.int8),
            jax.ShapeDtypeStruct((count,), jnp.float32),
            jax.ShapeDtypeStruct((count,), jnp.int32),
        ],
        name="sum_norm_quantize",
        blocks=count,
        warpgroups=p.threads // 128,
        shared_bytes=3 * 4 * 32,
        barriers=1,
        with_context=True,
        peers=True,
    )
    y = Int8Activation(codes.reshape(*lead, width), step.reshape(lead), code_sum.reshape(lead))
    return x.reshape(partial.shape), y


def _check(partial: Array, norm: Any, count: int, ranks: int) -> None:
    width, dtypes = partial.shape[-1], {partial.dtype.name, norm.dtype}
    if not dtypes <= set(rows.DTYPES):
        raise NotImplementedError(f"partial and scale are {sorted(dtypes)}: use {rows.DTYPES}")
    if width % rows.WIDTH_MULTIPLE or not 0 < width <= rows.MAX_WIDTH or count == 0:
        raise NotImplementedError(
            f"{count} rows of {width}, but the kernel takes 1 or more, of a multiple of "
            f"{rows.WIDTH_MULTIPLE} up to {rows.MAX_WIDTH}: sum by NCCL"
        )
    if not 1 < ranks <= MAX_RANKS or jax.process_count() > 1:
        raise NotImplementedError(
            f"{ranks} ranks of {jax.process_count()} process(es), but the kernel is for 2 to "
            f"{MAX_RANKS} devices of one: sum by NCCL"
        )


def _body(p: Any, norm: Any, ranks: int, context: Any, *refs: Any) -> None:
    """The kernel. refs: operands, x, codes, scale, code sum, shared memory, barriers."""
    partial, residual, flags, scale, *layer = refs[:-6]
    x, codes, step_ref, sum_ref, shared, _ = refs[-6:]
    t = rows._Thread(p, shared)
    row_bytes = p.width * rows._itemsize(p.dtype)
    meeting = _Meeting(ranks, context, flags, t)
    sources = [
        ptx.address_on(context, partial, ptx.constant(rank)).advance(t.row, row_bytes)
        for rank in range(ranks)
    ]
    meeting.announce(READY)
    added = rows._load_row(p, t, ptx.global_address(residual))
    weights = _weights(norm, p, t, scale, *layer)
    meeting.wait(READY)
    ptx.sync_block(p.threads)
    parts = [[_load_part(p, t, s, v) for v in range(p.vectors)] for s in sources]
    row = [_sum(p.dtype, [*words, last]) for *words, last in zip(*parts, added, strict=True)]
    _store_row(p, t, ptx.global_address(x).advance(t.row, row_bytes), row)
    normalized = rows._normalized(norm, p, t, row, weights)
    meeting.announce(DONE)
    step = rows._scale(p, t, normalized)
    total = rows._store_codes(p, t, ptx.global_address(codes), normalized, step)
    total = rows._tree(I32.__add__, rows._all_warps(p, t, 2, ptx.warp_sum(total)))
    with ptx.when(t.index.is_(0)):
        for ref, value in ((step_ref, ptx.float_bits(step)), (sum_ref, total)):
            ptx.store_global(ptx.global_address(ref).advance(t.row, 4), [value])
    meeting.wait(DONE)
    meeting.close()


class _Meeting:
    """Of the blocks of a row on all ranks. Thread i of the first in a block deals with rank i."""

    def __init__(self, ranks: int, context: Any, flags: Any, t: Any):
        self.here = t.index < ranks
        self.is_first = t.index.is_(0)
        self.rank = ptx.own_rank(context)
        self.peer = ptx.minimum(t.index, ranks - 1)
        self.theirs = ptx.address_on(context, flags, self.peer).advance(t.row, 4 * ROW_WORDS)
        self.ours = ptx.global_address(flags).advance(t.row, 4 * ROW_WORDS)
        self.launch = ptx.load_flag(self.ours) + 1

    def announce(self, event: int) -> None:
        """Tell every rank, in the order of what the block has done."""
        with ptx.when(self.here):
            ptx.raise_flag(self.theirs.advance(self.rank + event, 4), self.launch)

    def wait(self, event: int) -> None:
        """Until every rank has told us."""
        with ptx.when(self.here):
            ptx.wait_for_flag(self.ours.advance(self.peer + event, 4), self.launch)

    def close(self) -> None:
        """One launch more."""
        with ptx.when(self.is_first):
            ptx.store_global(self.ours, [self.launch])


def _weights(norm: Any, p: Any, t: Any, scale: Any, layer: Any = None) -> list[list[I32]]:
    address = ptx.global_address(scale)
    if layer is not None:
        index = rows._clamped_layer(norm, ptx.global_address(layer))
        address = address.advance(index, p.width * rows._itemsize(norm.dtype))
    return [rows._load_vector(p, t, address, norm.dtype, v) for v in range(p.vectors)]


def _load_part(p: Any, t: Any, row: Address, v: int) -> list[I32]:
    """The words of this thread's v-th vector of a rank's row; zeros beyond it."""
    size = rows.VECTOR * rows._itemsize(p.dtype)
    vector = ptx.minimum(t.vectors[v], p.row_vectors - 1)
    quads = [
        ptx.load_shared_by_devices(row.advance(vector, size).advance(i, 16), count=4)
        for i in range(size // 16)
    ]
    return [ptx.select(t.vectors[v] < p.row_vectors, w, 0) for quad in quads for w in quad]


def _sum(dtype: str, parts: list[list[I32]]) -> list[I32]:
    """Vectors added in float32, one after the other, and rounded."""
    first, *others = (ptx.floats_of(words, dtype) for words in parts)
    for other in others:
        first = [F32.__add__(a, b) for a, b in zip(first, other, strict=True)]
    return ptx.words_of(first, dtype)


def _store_row(p: Any, t: Any, target: Address, row: list[list[I32]]) -> None:
    for vector, words in zip(t.vectors, row, strict=True):
        with ptx.when(vector < p.row_vectors):
            ptx.store_words(target.advance(vector, 4 * len(words)), words)
