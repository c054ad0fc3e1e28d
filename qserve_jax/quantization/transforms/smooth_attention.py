"""SmoothAttention (QServe section 4.2): move the outliers of keys, which are cached in 4 bits, to
the queries, which are not.

Q' = Q * s, K' = K / s, with one s per channel of a KV head, equal for both channels of a rotary
pair so that it commutes with the embedding. Fused into the projections, or into Qwen3's norms.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from qserve_jax.quantization.numerics import fake_quantize_kv
from qserve_jax.quantization.transforms.calibration import ActivationStats, statistic
from qserve_jax.quantization.transforms.center_keys import CENTER
from qserve_jax.quantization.transforms.heads import (
    AttentionConfig,
    flat_heads,
    group_max,
    repeat_heads,
)
from qserve_jax.quantization.transforms.linear import (
    Array,
    Params,
    in_float32,
    scale_outputs,
    update_layers,
)

GRID = tuple((i / 10, beta) for i in range(1, 11) for beta in (0.0, 1 - i / 10))
"""The 20 points (alpha, beta) of the search."""
SMALLEST = 1e-5
"""Of the smoothing scales' largest: channels that are never used get no larger a gain."""


def smooth_attention(
    params: Params, config: AttentionConfig, stats: ActivationStats, alpha: float = 0.5
) -> Params:
    """The same function with keys divided by s = max|K|^alpha over the calibration set.

    Reads `layers/keys` f32[L, K, H]. Where keys are normalised (Qwen3) their norm has one scale
    for all heads, so s is that of the largest head.
    """
    return apply_scales(params, config, key_scales(config, *head_maxima(config, stats), alpha))


def head_maxima(config: AttentionConfig, stats: ActivationStats) -> tuple[Array, Array]:
    """max|K| and max|Q| per KV head, [L, K, H], equal in both channels of a rotary pair."""
    keys, queries = stats.absmax.get("layers/keys"), stats.absmax.get("layers/queries")
    layers = () if keys is None else keys.shape[:-2]
    n_kv, n, h = config.num_kv_heads, config.num_heads, config.head_dim
    keys = statistic(stats.absmax, "layers/keys", (*layers, n_kv, h))
    queries = statistic(stats.absmax, "layers/queries", (*layers, n, h))
    return _pair_max(keys), _pair_max(group_max(queries, config))


def _pair_max(x: Array) -> Array:
    half = x.shape[-1] // 2
    pair = jnp.maximum(x[..., :half], x[..., half:])
    return jnp.concatenate([pair, pair], axis=-1)


def key_scales(
    config: AttentionConfig, keys: Array, queries: Array, alpha: float, beta: float = 0.0
) -> Array:
    """s = max|K|^alpha / max|Q|^beta, f32[L, K, H], from the maxima of `head_maxima`."""
    if config.qk_norm:
        keys = jnp.broadcast_to(keys.max(axis=-2, keepdims=True), keys.shape)
        queries = jnp.broadcast_to(queries.max(axis=-2, keepdims=True), queries.shape)
    return _powers(keys, alpha) / _powers(queries, beta)


def _powers(x: Array, exponent: float) -> Array:
    top = x.max(axis=-1, keepdims=True)
    x = jnp.maximum(x, SMALLEST * top)
    return jnp.where(top > 0, x, 1.0) ** exponent


def apply_scales(params: Params, config: AttentionConfig, s: Array) -> Params:
    """Keys divided and queries multiplied by s f32[L, K, H], in the parameters that make them."""
    layers = params["layers"]
    if CENTER in layers:
        center = in_float32(lambda c: c / s, layers[CENTER]["center"])
        params = update_layers(params, **{CENTER: {"center": center}})
    if config.qk_norm:
        s = s[..., 0, :]
        changed = {"q_norm": s, "k_norm": 1 / s}
        return update_layers(
            params,
            **{
                name: {"scale": in_float32(lambda w, s=by: w * s, layers[name]["scale"])}
                for name, by in changed.items()
            },
        )
    return update_layers(
        params,
        q_proj=scale_outputs(layers["q_proj"], flat_heads(repeat_heads(s, config))),
        k_proj=scale_outputs(layers["k_proj"], 1 / flat_heads(s)),
    )


def search_smooth_attention(
    params: Params,
    config: AttentionConfig,
    stats: ActivationStats,
    heads: dict[str, Array],
    *,
    kv_bits: int = 4,
) -> Params:
    """`smooth_attention` with the (alpha, beta) of GRID, for each layer, that leaves the least
    squared error of the attention's output with keys in `kv_bits` bits.

    heads: `layers/queries` [L, B, T, N, H], `layers/keys` and `layers/values` [L, B, T, K, H] of
    some tokens (`attention_heads` of qserve_jax.models), from position 0 on. One of the candidates
    is alpha 0: no smoothing.
    """
    maxima = head_maxima(config, stats)
    scales = jnp.stack([key_scales(config, *maxima, *point) for point in ((0.0, 0.0), *GRID)])
    errors = attention_errors(
        *(heads[f"layers/{name}"] for name in ("queries", "keys", "values")),
        scales,
        config.sliding_window,
        kv_bits,
    )
    best = jnp.argmin(errors, axis=0)
    chosen = jnp.take_along_axis(scales, best[None, :, None, None], axis=0)[0]
    return apply_scales(params, config, chosen)


@functools.partial(jax.jit, static_argnums=(4, 5))
def attention_errors(q, k, v, scales, window, kv_bits) -> Array:
    """f32[C, L]: mean squared error of the output for each of the scales [C, L, K, H]."""

    def of_layer(xs):
        q, k, v, scales = (x.astype(jnp.float32) for x in xs)
        exact = attention(q, k, v, window)

        def error(s):
            seen = fake_quantize_kv(k / s, kv_bits) * s
            return jnp.mean(jnp.square(attention(q, seen, v, window) - exact))

        return jax.lax.map(error, scales)

    return jax.lax.map(of_layer, (q, k, v, jnp.moveaxis(scales, 1, 0))).T


def attention(q: Array, k: Array, v: Array, window: int | None) -> Array:
    """Causal attention of whole sequences: q [B, T, N, H], k and v [B, T, K, H] -> like q."""
    b, t, n, h = q.shape
    q = q.reshape(b, t, k.shape[2], -1, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, precision="highest") * h**-0.5
    distance = jnp.arange(t)[:, None] - jnp.arange(t)
    seen = (distance >= 0) & (distance < (t if window is None else window))
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v, precision="highest").reshape(b, t, n, h)
