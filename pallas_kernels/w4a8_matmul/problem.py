"""What the W4A8 kernels have in common: their operands, the sizes, and the layer they read."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.intrinsics import Address
from qserve_jax.pallas_kernels.w4a8_matmul import layout
from qserve_jax.quantization.qtensor import Array, Int8Activation, W4PerChannel, W4PerGroup

FLOATS = ("bfloat16", "float16", "float32")
MOST_FEATURES = 65536  # 127 * 128 * 65536 is within int32
INT32_SUMS = "int32"
"""As out_dtype: the sums before the epilogue, for tests; per channel those of the codes."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes and choices that are known when a kernel is built. residual: its dtype."""

    m: int
    n: int
    k: int
    layers: int | None
    per_group: bool
    bias: bool
    residual: str | None
    out_dtype: str

    @property
    def chunks(self) -> int:
        return self.k // layout.FEATURES

    @property
    def tile_bytes(self) -> int:
        """Of 16 channels x 128 features."""
        return 4 * (layout.CODE_WORDS + (layout.SCALE_WORDS if self.per_group else 0))

    @property
    def kind(self) -> str:
        return "g128" if self.per_group else "channel"


def gather(
    backend: str,
    x: Int8Activation,
    w: W4PerGroup | W4PerChannel,
    bias: Array | None,
    residual: Array | None,
    layer: Array | int | None,
    out_dtype: jax.typing.DTypeLike,
) -> tuple[Problem, dict[str, Array]]:
    """The problem, and the kernel's operands by name; x and residual with tokens flattened.

    x i8[M, K], w i32[(L,) N/64, K/128, 4, words], channel_scale and scaled_zero f32[(L,) N], bias
    f32[N], x_scale f32[M], code_sum i32[M], residual [M, N], layer i32[1].

    Raises NotImplementedError on another layout than `layout.LAYOUT`, weights that it cannot hold
    (per channel too K must be a multiple of 128), no tokens, K beyond MOST_FEATURES, and other
    types of the output or the residual than bf16, f16 and f32.
    """
    k = x.codes.shape[-1]
    codes = x.codes.reshape(-1, k)
    m, n = codes.shape[0], layout.weight_shape(w)[0]
    added = None if residual is None else residual.dtype.name
    dtype = jnp.dtype(out_dtype).name
    if w.layout == "canonical" and not layout.fits(w):
        raise NotImplementedError(
            f"{backend}: a weight of N={n}, K={k} cannot be packed: N must be a multiple of 64, K "
            "and groups of 128, others are for the reference"
        )
    if w.layout != layout.LAYOUT:
        raise NotImplementedError(
            f"{backend}: layout {w.layout!r} is not {layout.LAYOUT!r}: use prepare_for_backend"
        )
    if m == 0:
        raise NotImplementedError(f"{backend}: x has no tokens, but needs at least 1")
    for what, name in (("out_dtype", dtype), ("residual", added)):
        if name not in (*FLOATS, INT32_SUMS if what == "out_dtype" else None):
            raise NotImplementedError(f"{backend}: {what} {name} is none of {FLOATS}")
    if k > MOST_FEATURES:
        raise NotImplementedError(
            f"{backend}: {k=} may leave int32, at most {MOST_FEATURES} cannot: split K"
        )
    operands = {
        "x": codes,
        "w": w.codes,
        "channel_scale": w.channel_scale,
        "x_scale": x.scale.reshape(m),
    }
    if isinstance(w, W4PerChannel):
        operands |= {"scaled_zero": w.scaled_zero, "code_sum": x.code_sum.reshape(m)}
    if bias is not None:
        operands["bias"] = bias
    # The kernels read words of 4 bytes; scales may have been cast with the rest of a tree.
    for name in ("channel_scale", "x_scale", "scaled_zero", "bias"):
        if name in operands:
            operands[name] = operands[name].astype(jnp.float32)
    if "code_sum" in operands:
        operands["code_sum"] = operands["code_sum"].astype(jnp.int32)
    if residual is not None:
        operands["residual"] = residual.reshape(m, n)
    if layer is not None:
        operands["layer"] = jnp.asarray(layer, jnp.int32).reshape(1)
    layers = None if layer is None else w.codes.shape[0]
    per_group = isinstance(w, W4PerGroup)
    return Problem(m, n, k, layers, per_group, bias is not None, added, dtype), operands


def go_to_layer(p: Problem, gmem: dict[str, Address]) -> None:
    """Moves the addresses of stacked arrays to the layer, which counts from the end below 0."""
    if p.layers is None:
        return
    layer = ptx.load_global(gmem["layer"])[0]
    layer = ptx.select(layer < 0, layer + p.layers, layer)
    layer = ptx.minimum(ptx.maximum(layer, 0), p.layers - 1)
    weight_bytes = p.n // layout.ROWS * p.chunks * p.tile_bytes
    strides = {"w": weight_bytes, "channel_scale": 4 * p.n, "scaled_zero": 4 * p.n}
    for name, stride in strides.items():  # in this order: the same text in every process
        if name in gmem:
            gmem[name] = gmem[name].advance(layer, stride)
