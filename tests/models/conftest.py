"""Tiny models, and a plain decoder in float64 that shares no code with the package's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.models import ModelConfig, param_shapes
from qserve_jax.models.rope import rope_frequencies


@pytest.fixture(scope="session")
def tiny():
    """tiny(**changes): a two-layer ModelConfig with two query heads per KV head."""

    def make(**changes):
        return ModelConfig(
            **{
                "model_type": "llama",
                "vocab_size": 64,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_layers": 2,
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 16,
                "max_position_embeddings": 64,
            }
            | changes
        )

    return make


@pytest.fixture(scope="session")
def random_params():
    """random_params(config): a canonical float32 tree that makes logits of order one."""

    def make(config, seed=0):
        rng = np.random.default_rng(seed)

        def leaf(path, shape):
            normal = rng.standard_normal(shape)
            if path[-1].key == "scale":
                return 1 + 0.2 * normal
            if path[-1].key == "bias":
                return 0.2 * normal
            return normal * (1 if path[0].key == "embed" else shape[-2] ** -0.5)

        shapes = param_shapes(config)
        tree = jax.tree_util.tree_map_with_path(
            leaf, shapes, is_leaf=lambda x: isinstance(x, tuple)
        )
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)

    return make


@pytest.fixture(scope="session")
def plain_decoder():
    return plain


def plain(config, params, tokens, *, length=None, stored=None, fresh=None):
    """One sequence, tokens [T] -> logits float64[T, V], its own K and V [2, L, T, K, H].

    length: for dynamic rope. stored: K and V [2, L, T, K, H] as the cache gives them back, and
    fresh bool[T, T]: where query t reads key s as it was computed instead, by default everywhere.
    """
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    lengths = jnp.asarray([len(tokens) if length is None else length])
    inv_freq, rope_scale = rope_frequencies(config, lengths)
    angles = np.arange(len(tokens))[:, None] * np.asarray(inv_freq, np.float64).reshape(1, -1)
    rotation = rope_scale * np.exp(1j * angles)[:, None]
    x = p["embed"]["embedding"][tokens]
    own = np.zeros((2, config.num_layers, len(tokens), config.num_kv_heads, config.head_dim))
    for i in range(config.num_layers):
        layer = jax.tree.map(lambda w, i=i: w[i], p["layers"])
        y = plain_norm(x, layer["attn_norm"], config)
        q, k, v = (
            plain_linear(y, layer[f"{name}_proj"]).reshape(len(y), -1, config.head_dim)
            for name in "qkv"
        )
        if config.qk_norm:
            q, k = plain_norm(q, layer["q_norm"], config), plain_norm(k, layer["k_norm"], config)
        q, k = rotate(q, rotation), rotate(k, rotation)
        own[:, i] = k, v
        seen = own[:, i][:, None]
        if stored is not None and fresh is not None:
            seen = np.where(fresh[:, :, None, None], seen, stored[:, i][:, None])
        heads = plain_attention(q, *np.broadcast_to(seen, (2, len(y), *k.shape)), config)
        x = x + plain_linear(heads, layer["o_proj"])
        y = plain_norm(x, layer["mlp_norm"], config)
        gate = plain_linear(y, layer["gate_proj"])
        up = plain_linear(y, layer["up_proj"])
        x = x + plain_linear(gate / (1 + np.exp(-gate)) * up, layer["down_proj"])
    head = p["embed" if config.tie_embeddings else "lm_head"]["embedding"]
    return plain_norm(x, p["final_norm"], config) @ head.T, own


def plain_norm(x, p, config):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps) * p["scale"]


def plain_linear(x, p):
    return x @ p["kernel"] + p.get("bias", 0)


def rotate(x, rotation):
    """The pairs (i, i + H/2) of x [T, heads, H] as complex numbers times rotation [T, 1, H/2]."""
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * rotation
    return np.concatenate([z.real, z.imag], axis=-1)


def plain_attention(q, k, v, config):
    """q [T, N, H], k and v [T, S, K, H] as each query sees them -> [T, N * H]."""
    position = np.arange(len(q))
    distance = position[:, None] - position
    seen = (distance >= 0) & (distance < (config.sliding_window or len(q)))
    k, v = (np.repeat(x, config.group_heads, axis=2) for x in (k, v))
    scores = np.einsum("tnh,tsnh->nts", q, k) / np.sqrt(config.head_dim)
    weights = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    weights = weights / weights.sum(-1, keepdims=True)
    return np.einsum("nts,tsnh->tnh", weights, v).reshape(len(q), -1)
