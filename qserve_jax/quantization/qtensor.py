"""Pytree containers of quantised tensors: arrays and static metadata, no packing and no maths.

Shapes: N output channels, K input features (the contraction), g group size, `...` any leading
stack of layers. Containers never validate on construction, because JAX rebuilds them with tracers
and sentinels; `validate_*` functions check at the entry of an operation.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, dataclass_transform

import jax
import numpy as np

Array = jax.Array
AxisRole = Literal["stack", "in", "out"]


@dataclasses.dataclass(frozen=True)
class Source:
    """The kernel a weight container was made from, so that dequantisation gives back its layout.

    roles: for each axis of the original kernel, "in" (contracted), "out" or "stack".
    in_shape, out_shape: sizes of the "in" and "out" axes, in their order; K and N are the products.
    dtype: numpy name of the original dtype.

    The sizes of stack axes are read off the codes, so a slice of a stacked container (as `lax.scan`
    makes it) needs no bookkeeping: stack axes missing from the codes are missing from the result.
    """

    roles: tuple[AxisRole, ...]
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dtype: str

    @property
    def np_dtype(self):
        return jax.numpy.dtype(self.dtype)


@dataclass_transform(frozen_default=True)
def _container(*, static: tuple[str, ...]):
    def register(cls):
        cls = dataclasses.dataclass(frozen=True)(cls)
        data = [f.name for f in dataclasses.fields(cls) if f.name not in static]
        return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=list(static))

    return register


@_container(static=("group_size", "source", "layout"))
class W4PerGroup:
    """4-bit weights with progressive two-level scales (QServe section 4.1).

    codes          u8 [..., N, K/2]   two codes a byte, even k in the low nibble
    channel_scale  f32[..., N]        level 1 (per channel)
    group_scale    u8 [..., N, K/g]   level 2, 1..16
    group_offset   i8 [..., N, K/g]   -zero_point * group_scale

    w8 = code * group_scale + group_offset, in int8 for every stored code
    w ~= channel_scale * w8
    """

    codes: Array
    channel_scale: Array
    group_scale: Array
    group_offset: Array
    group_size: int
    source: Source
    layout: str = "canonical"


@_container(static=("source", "layout"))
class W4PerChannel:
    """4-bit weights with one scale and zero point per output channel.

    codes          u8 [..., N, K/2]   two codes a byte, even k in the low nibble
    channel_scale  f32[..., N]
    scaled_zero    f32[..., N]        zero_point * channel_scale

    w ~= code * channel_scale - scaled_zero
    """

    codes: Array
    channel_scale: Array
    scaled_zero: Array
    source: Source
    layout: str = "canonical"


@_container(static=("source",))
class W8PerChannel:
    """8-bit symmetric weights, one scale per output channel: w ~= channel_scale * code.

    codes i8[..., N, K], channel_scale f32[..., N]
    """

    codes: Array
    channel_scale: Array
    source: Source


@_container(static=())
class Int8Activation:
    """8-bit symmetric activations, one scale per token: x ~= scale * code.

    codes i8[..., K], scale f32[...], code_sum i32[...] = sum of the codes over K (the per-channel
    epilogue multiplies it by the weights' zero point).
    """

    codes: Array
    scale: Array
    code_sum: Array


@_container(static=("bits", "head_dim"))
class KVCache:
    """Paged K/V cache of all layers. L layers, P pages, K KV heads, S_p tokens a page, H head_dim.

    bits 4 or 8: pages i32[L, P, K, S_p * (2b + 8) / 4] with b = H * bits / 8 bytes of codes per
      token and side. Within a (page, head) block: K codes of token t at byte b*t, V codes at
      b*S_p + b*t, then four fp16 (sk, ck, sv, cv) at 2*b*S_p + 8*t.
      value = (code - 2**(bits-1)) * s + c. 4 bits: dim i in byte i//2, even i in the low nibble.
    bits 16: pages float[L, P, K, 2, S_p, H], K before V, unquantised.

    The leading L is absent where one layer's cache is used alone.
    """

    pages: Array
    bits: int
    head_dim: int

    @property
    def page_size(self) -> int:
        """Tokens per page (S_p)."""
        if self.bits == 16:
            return self.pages.shape[-2]
        return self.pages.shape[-1] * 4 // kv_bytes_per_token(self.head_dim, self.bits)

    @property
    def num_pages(self) -> int:
        return self.pages.shape[-5 if self.bits == 16 else -3]

    @property
    def num_kv_heads(self) -> int:
        return self.pages.shape[-4 if self.bits == 16 else -2]

    @property
    def stacked(self) -> bool:
        """Whether `pages` carries the leading layer axis."""
        return self.pages.ndim == (6 if self.bits == 16 else 4)


QUANTIZED_WEIGHTS = (W4PerGroup, W4PerChannel, W8PerChannel)
QuantizedWeight = W4PerGroup | W4PerChannel | W8PerChannel


def is_quantized(leaf: object) -> bool:
    """True for a quantised weight container; use as `is_leaf` in tree functions."""
    return isinstance(leaf, QUANTIZED_WEIGHTS)


def kv_bytes_per_token(head_dim: int, bits: int, itemsize: int = 2) -> int:
    """Bytes one token takes in the cache, per layer and KV head: K and V codes and four fp16.

    head_dim 128: 136 at 4 bits, 264 at 8, 512 at 16 (`itemsize` 2).
    """
    if bits == 16:
        return 2 * head_dim * itemsize
    return 2 * head_dim * bits // 8 + 8


def nbytes(tree: object) -> int:
    """Bytes of all arrays (or ShapeDtypeStructs) of a pytree."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
