"""Rotary position embeddings (Su et al. 2021) and their scalings for longer contexts.

inv_freq[i] = theta^(-2i/H) for i < H/2, and dimensions i and i + H/2 of a head are rotated by
position * inv_freq[i] (rotate-half, the convention that Hugging Face checkpoints are stored for).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from qserve_jax.models.config import ModelConfig, RopeConfig
from qserve_jax.pallas_kernels.append_kv import rotate

Array = jax.Array


def rope_frequencies(config: ModelConfig, lengths: Array | None = None) -> tuple[Array, float]:
    """Inverse frequencies and the factor on cos and sin (1 except for yarn). Traceable under jit.

    lengths: i32[B], for each sequence the longest length that it will reach (prompt and everything
    asked for). Read by dynamic NTK only: one base for the whole sequence, so that keys in the cache
    never need another rotation; transformers instead changes the base as the sequence grows.
    Returns (f32[H/2] in radians per position, scale); for dynamic NTK with lengths f32[B, H/2].
    """
    rope, head_dim = config.rope, config.head_dim
    original = rope.original_max_position_embeddings or config.max_position_embeddings
    inv_freq = _base_frequencies(rope.theta, head_dim)
    scale = 1.0
    if rope.rope_type == "linear":
        inv_freq = inv_freq / rope.factor
    elif rope.rope_type == "llama3":
        inv_freq = _llama3(inv_freq, rope, original)
    elif rope.rope_type == "yarn":
        inv_freq, scale = _yarn(inv_freq, rope, original), yarn_attention_factor(rope)
    frequencies = jnp.asarray(inv_freq, jnp.float32)
    if rope.rope_type == "dynamic" and lengths is not None:
        frequencies = _dynamic(frequencies, rope.factor, config.max_position_embeddings, lengths)
    return frequencies, scale


def apply_rope(x: Array, positions: Array, inv_freq: Array, scale: float = 1.0) -> Array:
    """Rotates query or key heads to their positions (transformers `apply_rotary_pos_emb`).

    x [B, T, heads, H]; positions i32[B, T], from 0; inv_freq f32[H/2] or f32[B, H/2] and scale from
    `rope_frequencies`. Returns the shape and dtype of x; angles and rotation are float32.
    """
    return rotate(x, *rope_turn(positions, inv_freq, scale))


def rope_turn(positions: Array, inv_freq: Array, scale: float = 1.0) -> tuple[Array, Array]:
    """cos and sin f32[B, T, H/2] of the angles of tokens at `positions`, times scale.

    Arguments as `apply_rope`. The same for all layers, so made once a step.
    """
    angles = positions[..., None].astype(jnp.float32) * jnp.expand_dims(inv_freq, -2)  # [B, T, H/2]
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def yarn_attention_factor(rope: RopeConfig) -> float:
    """sqrt(1/t) of YaRN (Peng et al. 2023, section 3.4), by which cos and sin are multiplied.

    0.1 ln(factor) + 1 unless `attention_factor` gives it; with both `mscale` and `mscale_all_dim`
    (DeepSeek) the ratio of the two; one alone has no effect (transformers `get_mscale`).
    """
    if rope.attention_factor is not None:
        return rope.attention_factor
    log_factor = 0.1 * math.log(rope.factor)
    if rope.mscale and rope.mscale_all_dim:
        return (rope.mscale * log_factor + 1.0) / (rope.mscale_all_dim * log_factor + 1.0)
    return log_factor + 1.0


def _base_frequencies(theta: float, head_dim: int) -> np.ndarray:
    """f64[H/2]. The exponent is rounded to float32, as the models were trained with."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return theta ** -exponent.astype(np.float64)


def _llama3(inv_freq: np.ndarray, rope: RopeConfig, original: int) -> np.ndarray:
    """Llama 3.1 (transformers `_compute_llama3_parameters`): long waves / factor, short ones kept.

    A wave that turns r times in the original context is kept for r >= high_freq_factor, divided by
    factor for r <= low_freq_factor, and between the two interpolated linearly in r.
    """
    turns = original * inv_freq / (2 * math.pi)
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return _blend(inv_freq, rope.factor, np.clip(keep, 0, 1))


def _yarn(inv_freq: np.ndarray, rope: RopeConfig, original: int) -> np.ndarray:
    """YaRN "NTK-by-parts" (Peng et al. 2023, section 3.2; transformers `_compute_yarn_parameters`).

    As llama3, between beta_slow and beta_fast turns, but linear in the dimension's index i instead:
    dimension(r) is the (real) i whose wave turns r times in the original context.
    """
    head_dim = 2 * len(inv_freq)

    def dimension(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001  # transformers' own guard against a division by 0
    ramp = (np.arange(len(inv_freq)) - low) / width
    return _blend(inv_freq, rope.factor, 1 - np.clip(ramp, 0, 1))


def _blend(inv_freq: np.ndarray, factor: float, keep: np.ndarray) -> np.ndarray:
    """inv_freq where keep is 1, inv_freq / factor where it is 0."""
    return inv_freq * (keep + (1 - keep) / factor)


def _dynamic(inv_freq: Array, factor: float, max_positions: int, lengths: Array) -> Array:
    """Dynamic NTK (transformers `_compute_dynamic_ntk_parameters`): f32[B, H/2].

    base = theta * r^(H/(H-2)) with r = factor * length / max_positions - (factor - 1), so that
    inv_freq changes by r^(-2i/(H-2)). r is written so that nothing cancels, and is exactly 1 for
    lengths up to max_positions.
    """
    half = inv_freq.shape[0]
    excess = jnp.maximum(lengths - max_positions, 0).astype(jnp.float32)
    stretch = 1.0 + excess * (factor / max_positions)
    exponent = np.arange(half, dtype=np.float32) / np.float32(half - 1)
    return inv_freq * stretch[:, None] ** -exponent
