"""One kernel for each operation that ends in int8 activations, from sm_80 on.

A block owns a row. Its threads read the row once, eight numbers at a time, keep it in registers and
write the codes; between them they agree on one or two numbers through shared memory:

    load       all vectors of a thread at once, and the scales of the norm
    norm       sum of squares over the block      (rms_norm_quantize)
    product    SiLU(gate) * up                    (silu_mul_quantize)
    absmax     largest magnitude over the block; bits of floats >= 0 sort as they do
    codes      x * (1 / scale), rounded half to even by adding 1.5 * 2**23, low bytes stored
    code sum   over the block; thread 0 stores it, and the scale

What comes before the codes is rounded to the dtype of the input, as the reference does. The codes
are those of `numerics.quantize_activation` bit for bit: `div.rn` is correctly rounded, nothing is
contracted, and maxima and integer sums depend on no order. How a row is cut depends on its width
only, so that a row gets the same codes in any batch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.intrinsics import F32, I32, Address
from qserve_jax.quantization.numerics import MIN_ACTIVATION_ABSMAX
from qserve_jax.quantization.qtensor import Array, Int8Activation

DTYPES = ("bfloat16", "float16", "float32")
VECTOR = 8
"""Numbers a thread reads at a time: 16 or 32 bytes of input, 8 bytes of codes."""
WIDTH_MULTIPLE, MAX_WIDTH = 128, 32768
FEW_THREADS, MANY_THREADS = 256, 1024
"""In a block, about. More than one block on an SM hides the latency of the others' barriers. Those
of SiLU and product need so many registers for more vectors that it does not pay."""
ROUND_TO_INTEGER = 1.5 * 2.0**23
"""Added to a float32 below 2**22, it leaves the nearest integer in the low bits (ties to even)."""


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Sizes that are known when the kernel is built. width: codes of a row."""

    width: int
    dtype: str
    vectors: int

    @property
    def row_vectors(self) -> int:
        return self.width // VECTOR

    @property
    def threads(self) -> int:
        return 128 * math.ceil(self.row_vectors / self.vectors / 128)


@dataclasses.dataclass(frozen=True)
class _Norm:
    eps: float
    dtype: str
    layers: int | None


def quantize_activation(x: Array, *, vectors: int | None = None) -> Int8Activation:
    """See `api`. vectors: how many each thread takes, None for the choice by width."""
    vectors = vectors or vectors_per_thread(x.shape[-1], FEW_THREADS)
    return _call(_load_row, x, x.shape[-1], [], "quantize_activation", vectors)


def rms_norm_quantize(
    x: Array,
    scale: Array,
    *,
    eps: float,
    layer: Array | int | None,
    vectors: int | None = None,
) -> Int8Activation:
    norm = _Norm(eps, scale.dtype.name, None if layer is None else scale.shape[0])
    if norm.dtype not in DTYPES:
        raise NotImplementedError(f"norm scales are {norm.dtype}: the kernel reads {DTYPES}")
    operands = [scale] if layer is None else [scale, jnp.asarray(layer, jnp.int32).reshape(1)]
    load = functools.partial(_load_normalized, norm)
    vectors = vectors or vectors_per_thread(x.shape[-1], FEW_THREADS)
    return _call(load, x, x.shape[-1], operands, "rms_norm_quantize", vectors)


def silu_mul_quantize(gate_up: Array, *, vectors: int | None = None) -> Int8Activation:
    width = gate_up.shape[-1] // 2
    vectors = vectors or vectors_per_thread(width, MANY_THREADS)
    return _call(_load_product, gate_up, width, [], "silu_mul_quantize", vectors)


def vectors_per_thread(width: int, threads: int) -> int:
    """For about so many threads; measured on an H200, for all numbers of rows together."""
    return min(8, max(2, math.ceil(width / VECTOR / threads)))


def _call(
    load: Callable[..., list[list[I32]]],
    x: Array,
    width: int,
    operands: list[Array],
    name: str,
    vectors: int,
) -> Int8Activation:
    *lead, columns = x.shape
    rows = math.prod(lead)
    if x.dtype.name not in DTYPES:
        raise NotImplementedError(f"{name}: input is {x.dtype}: the kernel reads {DTYPES}")
    if width % WIDTH_MULTIPLE or not 0 < width <= MAX_WIDTH or rows == 0:
        raise NotImplementedError(
            f"{name}: {rows} rows of {width}, but the kernel takes 1 or more, of a multiple of "
            f"{WIDTH_MULTIPLE} up to {MAX_WIDTH}: use the reference"
        )
    p = _Problem(width, x.dtype.name, vectors)
    codes, scale, code_sum = ptx.launch(
        functools.partial(_body, p, load, len(operands)),
        [x.reshape(rows, columns), *operands],
        [
            jax.ShapeDtypeStruct((rows, width), jnp.int8),
            jax.ShapeDtypeStruct((rows,), jnp.float32),
            jax.ShapeDtypeStruct((rows,), jnp.int32),
        ],
        name=name,
        blocks=rows,
        warpgroups=p.threads // 128,
        shared_bytes=3 * 4 * 32,
        barriers=1,
    )
    return Int8Activation(codes.reshape(*lead, width), scale.reshape(lead), code_sum.reshape(lead))


class _Thread:
    """Where a thread stands in its block."""

    def __init__(self, p: _Problem, shared: Any):
        self.row, self.index = ptx.block_index(), ptx.thread_index()
        self.warp, self.is_lane0 = ptx.warp_index(), (self.index & 31).is_(0)
        self.shared = ptx.shared_address(shared)
        self.vectors = [self.index + v * p.threads for v in range(p.vectors)]


def _body(p: _Problem, load: Callable, operands: int, x: Any, *refs: Any) -> None:
    """The kernel. refs: the other operands, codes, scale, code sum, shared memory, barriers."""
    others, (codes, scale, code_sum, shared, _) = refs[:operands], refs[operands:]
    t = _Thread(p, shared)
    row = load(p, t, ptx.global_address(x), *map(ptx.global_address, others))
    step = _scale(p, t, row)
    total = _store_codes(p, t, ptx.global_address(codes), row, step)
    total = _tree(I32.__add__, _all_warps(p, t, 2, ptx.warp_sum(total)))
    with ptx.when(t.index.is_(0)):
        for ref, value in ((scale, ptx.float_bits(step)), (code_sum, total)):
            ptx.store_global(ptx.global_address(ref).advance(t.row, 4), [value])


# What is quantised: for each vector of a thread its words, zeros beyond the row. They stay packed
# in the input's dtype until the codes, so that more blocks find registers on an SM.


def _load_row(p: _Problem, t: _Thread, x: Address) -> list[list[I32]]:
    x = x.advance(t.row, p.width * _itemsize(p.dtype))
    return [_load_vector(p, t, x, p.dtype, v) for v in range(p.vectors)]


def _load_normalized(
    norm: _Norm, p: _Problem, t: _Thread, x: Address, scale: Address, layer: Address | None = None
) -> list[list[I32]]:
    if layer is not None:
        scale = scale.advance(_clamped_layer(norm, layer), p.width * _itemsize(norm.dtype))
    row = _load_row(p, t, x)
    weights = [_load_vector(p, t, scale, norm.dtype, v) for v in range(p.vectors)]
    return _normalized(norm, p, t, row, weights)


def _normalized(
    norm: _Norm, p: _Problem, t: _Thread, row: list[list[I32]], weights: list[list[I32]]
) -> list[list[I32]]:
    """The row over its root mean square, times the weights. The block meets in it once."""
    squares = [_tree(F32.__add__, [v * v for v in ptx.floats_of(words, p.dtype)]) for words in row]
    total = ptx.warp_sum_float(_tree(F32.__add__, squares))
    mean = _tree(F32.__add__, _all_warps(p, t, 0, total)) / ptx.constant_float(p.width)
    inverse = ptx.rsqrt(mean + ptx.constant_float(norm.eps))
    return [
        ptx.words_of(
            [
                v * inverse * w
                for v, w in zip(_again(x, p.dtype), _again(w, norm.dtype), strict=True)
            ],
            p.dtype,
        )
        for x, w in zip(row, weights, strict=True)
    ]


def _load_product(p: _Problem, t: _Thread, gate_up: Address) -> list[list[I32]]:
    row_bytes = p.width * _itemsize(p.dtype)
    gate = gate_up.advance(t.row, 2 * row_bytes)
    up = gate.advance(1, row_bytes)
    row = []
    for v in range(p.vectors):
        words = (_load_vector(p, t, half, p.dtype, v) for half in (gate, up))
        halves = (ptx.floats_of(half, p.dtype) for half in words)
        row.append(ptx.words_of([_silu(g) * u for g, u in zip(*halves, strict=True)], p.dtype))
    return row


def _silu(x: F32) -> F32:
    """x / (1 + exp(-x))."""
    exp = ptx.exp2(x * ptx.constant_float(-math.log2(math.e)))
    return x * ptx.reciprocal(ptx.constant_float(1) + exp)


def _clamped_layer(norm: _Norm, layer: Address) -> I32:
    """The layer, counted from the end below 0, and within the array."""
    assert norm.layers is not None
    index = ptx.load_global(layer)[0]
    index = ptx.select(index < 0, index + norm.layers, index)
    return ptx.minimum(ptx.maximum(index, 0), norm.layers - 1)


def _itemsize(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize


def _load_vector(p: _Problem, t: _Thread, row: Address, dtype: str, v: int) -> list[I32]:
    """The words of this thread's v-th vector."""
    size = VECTOR * _itemsize(dtype)
    vector = t.vectors[v]
    if (v + 1) * p.threads <= p.row_vectors:
        return ptx.load_words(row.advance(vector, size), size)
    words = ptx.load_words(row.advance(ptx.minimum(vector, p.row_vectors - 1), size), size)
    return [ptx.select(vector < p.row_vectors, w, 0) for w in words]


def _again(words: list[I32], dtype: str) -> list[F32]:
    """`floats_of`, not kept since they were last needed."""
    return ptx.floats_of([ptx.opaque(w) for w in words], dtype)


# The block together


def _tree(combine: Callable[[Any, Any], Any], items: list[Any]) -> Any:
    """All items combined, neighbours first."""
    while len(items) > 1:
        pairs = zip(items[::2], items[1::2], strict=False)
        items = [combine(a, b) for a, b in pairs] + items[len(items) // 2 * 2 :]
    return items[0]


def _all_warps(p: _Problem, t: _Thread, region: int, value: Any) -> list[Any]:
    """The values of all warps, each known to its lane 0, in every thread. A region is used once."""
    first = t.shared + region * 4 * 32
    with ptx.when(t.is_lane0):
        ptx.store_shared(first + t.warp * 4, value)
    ptx.sync_block(p.threads)
    parts = (
        ptx.load_shared(first, 16 * i, count=4, kind=type(value)) for i in range(p.threads // 128)
    )
    return [x for part in parts for x in part]


def _scale(p: _Problem, t: _Thread, row: list[list[I32]]) -> F32:
    """max(|x|, MIN_ACTIVATION_ABSMAX) / 127 of the row; NaN, the largest of all bits, stays."""
    words = [w for vector in row for w in vector]
    if p.dtype != "float32":
        words = [_tree(lambda a, b: ptx.max_magnitudes(a, b, p.dtype), words)]
    bits = [ptx.float_bits(x) & 0x7FFFFFFF for x in ptx.floats_of(words, p.dtype)]
    floor = ptx.float_bits(ptx.constant_float(MIN_ACTIVATION_ABSMAX))
    largest = _all_warps(p, t, 1, ptx.warp_max(_tree(ptx.maximum, bits)))
    absmax = ptx.bits_float(_tree(ptx.maximum, [*largest, floor]))
    return absmax / ptx.constant_float(127)


def _store_codes(p: _Problem, t: _Thread, codes: Address, row: list[list[I32]], step: F32) -> I32:
    """Codes to memory; their sum over this thread."""
    inverse, shift = ptx.constant_float(1) / step, ptx.constant_float(ROUND_TO_INTEGER)
    target = codes.advance(t.row, p.width)
    total = ptx.constant(0)
    for vector, words in zip(t.vectors, row, strict=True):
        bits = [ptx.float_bits(v * inverse + shift) for v in ptx.floats_of(words, p.dtype)]
        packed = [ptx.low_bytes(*bits[:4]), ptx.low_bytes(*bits[4:])]
        for word in packed:
            total = ptx.add_bytes(word, total)
        with ptx.when(vector < p.row_vectors):
            ptx.store_global(target.advance(vector, VECTOR), packed)
    return total
