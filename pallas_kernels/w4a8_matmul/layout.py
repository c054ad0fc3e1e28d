"""The weight layout "mma_w4": what a warp reads of the weights, in the order it does.

One layout for all kernels. A block holds 16 output channels x 128 input features as 32-bit words:
256 words of codes and, per group, 8 words of scales, in one piece so that one copy brings both
(1024 or 1056 bytes). The four blocks of 64 channels, what a warpgroup multiplies, lie beside each
other: one copy of them takes the time of four small ones to start.

  codes  word (h * 32 + lane) * 4 + v, lane = 4 * g + c: in byte i the codes of feature
         k = 64 h + 16 v + 4 c + i, fragment row g in the low nibble and row g + 8 in the high one
  rows   fragment row r is channel 4 * (r % 8 // 2) + 2 * (r // 8) + r % 2 of the block
  scales word 256 + g, bytes from the lowest: scale and offset + 128 of fragment row g, then of
         row g + 8

so that lane (g, c) reads 16 bytes at a time and, with one mask or one shift and a mask, has the
registers of the tensor core's A fragments: of mma.m16n8k32 and of wgmma alike, rows g and g + 8,
two words for each 32 features, k in its natural order. So the activations stay row-major.

The rows are dealt so that a lane whose accumulators were transposed (movmatrix), and then holds
fragment rows 2 c, 2 c + 1, 2 c + 8 and 2 c + 9 of a token, has four channels beside each other.

The formulas here take numpy integers, JAX arrays and the kernel's registers alike.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qserve_jax.quantization.packing import pack_nibbles, unpack_nibbles
from qserve_jax.quantization.qtensor import (
    Array,
    QuantizedWeight,
    W4PerChannel,
    W4PerGroup,
    W8PerChannel,
)

LAYOUT = "mma_w4"
ROWS, FEATURES = 16, 128  # of one block
BLOCKS = 4  # beside each other
CODE_WORDS, SCALE_WORDS = 256, 8

# A channel is [t, b, g // 2, hi, g % 2], a feature [kc, h, v, c, i]: t numbers the 64 channels, b
# the blocks in them, kc the blocks along K; hi picks the nibble. The axes of both, in the order of
# the words (one transposition: XLA made two, and the second of a whole stack, after the loop):
_CHANNEL, _FEATURE = (BLOCKS, 4, 2, 2), (2, 4, 4, 4)
_TO_WORDS = (0, 5, 1, 6, 2, 4, 8, 7, 9, 3)
_FROM_WORDS = tuple(_TO_WORDS.index(axis) for axis in range(10))
# And those of the scales, [*channel, kc, (scale, offset)].
_TO_SCALES = (0, 5, 1, 2, 4, 3, 6)
_FROM_SCALES = tuple(_TO_SCALES.index(axis) for axis in range(7))


def weight_shape(w: QuantizedWeight) -> tuple[int, int]:
    """(N, K), in any layout."""
    if not isinstance(w, W4PerGroup | W4PerChannel):
        return w.codes.shape[-2], w.codes.shape[-1]
    if w.layout == LAYOUT:
        return BLOCKS * ROWS * w.codes.shape[-4], FEATURES * w.codes.shape[-3]
    return w.codes.shape[-2], 2 * w.codes.shape[-1]


def fits(w: object) -> bool:
    """Whether w is 4-bit, canonical, of N % 64 == 0 and K % 128 == 0, and in groups of 128."""
    if not isinstance(w, W4PerGroup | W4PerChannel) or w.layout != "canonical":
        return False
    group = w.group_size if isinstance(w, W4PerGroup) else FEATURES
    n, k = weight_shape(w)
    return group == FEATURES and n % 64 == 0 and k % FEATURES == 0 and n * k > 0


def take_layer[W: QuantizedWeight](w: W, layer: Array | int | None) -> W:
    """One layer of a stacked container; the container itself where layer is None."""
    return w if layer is None else jax.tree.map(lambda leaf: leaf[layer], w)


@jax.jit
def to_kernel_layout(w: W4PerGroup | W4PerChannel) -> W4PerGroup | W4PerChannel:
    """A canonical container -> the same with `layout` "mma_w4" and all static metadata.

    codes u8[..., N, K/2] -> i32[..., N/64, K/128, 4, 264 (per group) | 256 (per channel)]. Per
    group, the scales and offsets lie in the same words, and their own arrays keep the stack axes
    only: [..., 0, 0]. Channel scales and zeros stay as they are.

    Raises ValueError on a container that does not fit.
    """
    if not fits(w):
        raise ValueError(
            f"{type(w).__name__} of [N, K] = {list(weight_shape(w))} and layout {w.layout!r} "
            "cannot be packed: N must be a multiple of 64, K and groups of 128, layout canonical"
        )
    words = _code_words(unpack_nibbles(w.codes))
    if isinstance(w, W4PerChannel):
        return dataclasses.replace(w, codes=words, layout=LAYOUT)
    scales = _scale_words(w.group_scale, w.group_offset)
    none = (*w.codes.shape[:-2], 0, 0)
    return dataclasses.replace(
        w,
        codes=jnp.concatenate([words, scales], axis=-1),
        group_scale=jnp.zeros(none, jnp.uint8),
        group_offset=jnp.zeros(none, jnp.int8),
        layout=LAYOUT,
    )


@jax.jit
def from_kernel_layout[W: QuantizedWeight](w: W) -> W:
    """The inverse of `to_kernel_layout`, exactly. Other containers are returned as they are.

    Raises ValueError on another layout.
    """
    if isinstance(w, W8PerChannel) or w.layout == "canonical":
        return w
    if w.layout != LAYOUT:
        raise ValueError(f"layout {w.layout!r} is unknown: need 'canonical' or {LAYOUT!r}")
    words = w.codes
    codes = pack_nibbles(_codes(words[..., :CODE_WORDS]))
    if isinstance(w, W4PerChannel):
        return dataclasses.replace(w, codes=codes, layout="canonical")
    scale, offset = _scales(words[..., CODE_WORDS:])
    return dataclasses.replace(
        w, codes=codes, group_scale=scale, group_offset=offset, layout="canonical"
    )


def block_index(t: Any, chunk: Any, chunks: Any) -> Any:
    """Where block t of N/16 and `chunk` of K/128 lies, in blocks."""
    return (t // BLOCKS * chunks + chunk) * BLOCKS + t % BLOCKS


def _block_axes(lead: int, order: tuple[int, ...]) -> tuple[int, ...]:
    return (*range(lead), *(lead + axis for axis in order))


def _code_words(codes: Array) -> Array:
    """u8[..., N, K] -> i32[..., N/64, K/128, 4, 256]."""
    *lead, n, k = codes.shape
    t, kc = n // (BLOCKS * ROWS), k // FEATURES
    blocks = codes.reshape(*lead, t, *_CHANNEL, kc, *_FEATURE)
    blocks = blocks.transpose(_block_axes(len(lead), _TO_WORDS))
    octets = blocks[..., 0] | (blocks[..., 1] << 4)
    words = jax.lax.bitcast_convert_type(octets, jnp.int32)
    return words.reshape(*lead, t, kc, BLOCKS, CODE_WORDS)


def _codes(words: Array) -> Array:
    """The inverse of `_code_words`."""
    *lead, t, kc, _, _ = words.shape
    lanes = words.reshape(*lead, t, kc, BLOCKS, 2, 4, 2, 4, 4)
    octets = jax.lax.bitcast_convert_type(lanes, jnp.uint8)
    blocks = jnp.stack([octets & 15, octets >> 4], axis=-1)
    blocks = blocks.transpose(_block_axes(len(lead), _FROM_WORDS))
    return blocks.reshape(*lead, BLOCKS * ROWS * t, FEATURES * kc)


def _scale_words(scale: Array, offset: Array) -> Array:
    """u8, i8 [..., N, K/128] -> i32[..., N/64, K/128, 4, 8]."""
    *lead, n, kc = scale.shape
    t = n // (BLOCKS * ROWS)
    biased = jax.lax.bitcast_convert_type(offset, jnp.uint8) ^ jnp.uint8(0x80)
    pairs = jnp.stack([scale, biased], axis=-1).reshape(*lead, t, *_CHANNEL, kc, 2)
    octets = pairs.transpose(_block_axes(len(lead), _TO_SCALES))
    octets = octets.reshape(*lead, t, kc, BLOCKS, SCALE_WORDS, 4)
    return jax.lax.bitcast_convert_type(octets, jnp.int32)


def _scales(words: Array) -> tuple[Array, Array]:
    """The inverse of `_scale_words`."""
    *lead, t, kc, _, _ = words.shape
    octets = jax.lax.bitcast_convert_type(words, jnp.uint8)
    octets = octets.reshape(*lead, t, kc, BLOCKS, 4, 2, 2, 2)
    pairs = octets.transpose(_block_axes(len(lead), _FROM_SCALES))
    pairs = pairs.reshape(*lead, BLOCKS * ROWS * t, kc, 2)
    offset = jax.lax.bitcast_convert_type(pairs[..., 1] ^ jnp.uint8(0x80), jnp.int8)
    return pairs[..., 0], offset


def channel_of_row(r: Any) -> Any:
    """The channel of a block, 0..15, whose weights are fragment row r, 0..15."""
    return (r % 8 // 2) * 4 + (r // 8) * 2 + r % 2


def split_scales(word: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """A word of scales -> (scale, 4 x (offset + 128)) of fragment rows g and g + 8."""

    def pair(shift: int) -> tuple[Any, Any]:
        return (word >> shift) & 0xFF, ((word >> (shift + 8)) & 0xFF) * 0x01010101

    return pair(0), pair(16)


def expand(word: Any, scales: tuple[tuple[Any, Any], tuple[Any, Any]] | None) -> list[Any]:
    """A word of codes -> four int8 weights of fragment row g in one word, four of g + 8.

    With scales: code * scale + offset in all four bytes by one multiplication and one addition.
    Nothing carries from byte to byte, because code * scale + (offset + 128) is the int8 weight
    plus 128 and so within 0..255, and code * scale is no larger; the XOR takes the 128 off again.
    """
    codes = [word & 0x0F0F0F0F, (word >> 4) & 0x0F0F0F0F]
    if scales is None:
        return codes
    return [
        (q * scale + offset) ^ 0x80808080 for q, (scale, offset) in zip(codes, scales, strict=True)
    ]
