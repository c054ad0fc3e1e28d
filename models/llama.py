"""The decoder all families share (Llama, Mistral, Qwen): pure functions and a thin Flax module.

One token's way: embed -> L x [norm, q/k/v, RoPE, attention, o, residual; norm, gate/up, SiLU * mul,
down, residual] -> norm -> head. The layer loop is one scan over stacked parameters.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qserve_jax.models.collectives import (
    Unsummed,
    add_owed,
    flags_of,
    gather,
    look_up,
    on_ranks,
)
from qserve_jax.models.config import ModelConfig
from qserve_jax.models.layers import (
    Params,
    join_in_place,
    linear,
    normalized_projections,
    quantize_input,
    rms_norm,
    silu_mul,
    silu_mul_input,
    split_gate_up,
    split_in_place,
)
from qserve_jax.models.rope import rope_frequencies, rope_turn
from qserve_jax.models.sharding import EXCHANGE
from qserve_jax.pallas_kernels import paged_attention, quantized_matmul, rope_append_kv
from qserve_jax.pallas_kernels.append_kv import rotate, split_heads
from qserve_jax.pallas_kernels.backend import as_int32, usable
from qserve_jax.pallas_kernels.paged_attention import longest_first
from qserve_jax.pallas_kernels.paged_attention.reference import attend
from qserve_jax.pallas_kernels.quantize_activation import quantize_activation
from qserve_jax.quantization.numerics import fake_quantize_kv
from qserve_jax.quantization.qtensor import Array, KVCache, is_quantized

Turn = tuple[Array, Array]
"""cos and sin f32[B, T, H/2] of the tokens' positions; see `rope_turn`."""

Attention = Callable[[Sequence[Array], Turn, Array | None, Array, Any], tuple[Array, Any]]
"""([q [B, T, N, H], k [B, T, K, H], v] or one [B, T, N + 2K, H], not rotated yet, turn, the keys'
centre [K, H] or None, layer index, state) -> (output [B, T, N, H], state)."""

LAYERS_AT_ONCE = 8
"""In one round of the loop, where kernels read quantised layers in place: on a GPU a round costs a
kernel more, which counts. Float layers are sliced by the loop: XLA copies the slices of a round,
but can read those of a single layer in place (docs/tensor_parallel.md, speed)."""

Tap = Callable[[str, Callable[[], Array]], None]
"""Shown the layer's matmul inputs and heads by name, as thunks; see `calibration.matmul_inputs`."""


class CausalLM(nn.Module):
    """A language model over the canonical parameter tree (docs/architecture.md).

    `apply({"params": p}, tokens)` takes p float or quantised; `init(key, tokens)` makes a float
    tree to train. There are no mutable collections: caches are passed to `prefill` and
    `decode_step` below.

    act_bits: 8 quantises the inputs of quantised kernels per token; 16 leaves them in float.
    backend: of the kernels; None takes the first that can run.
    mesh: of the devices that share the model (tensor parallelism, sharding.py); None for one.
    axis: of a mesh, where this is one device's part of a model, within `shard_map`.
    """

    config: ModelConfig
    act_bits: int = 8
    backend: str | None = None
    param_dtype: Any = jnp.float32
    mesh: jax.sharding.Mesh | None = None
    axis: str | None = None

    @nn.compact
    def __call__(
        self, tokens: Array, *, positions: Array | None = None, kv_bits: int = 16
    ) -> Array:
        """tokens i32[B, T] -> logits f32[B, T, V] of the whole sequence, causally.

        positions: i32[B, T], default 0..T-1. kv_bits 4 or 8: every query sees K and V as a cache
        of that many bits returns them (`attends="quantized"`).
        """
        initial = {}
        if self.is_initializing():
            initial = init_params(self.make_rng("params"), self.config, self.param_dtype)
        params = {
            name: self.variable("params", name, initial.get, name).value
            for name in param_shapes(self.config)
        }
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        whole = functools.partial(_whole_sequence, kv_bits=kv_bits)
        return on_ranks(self, whole, params, None, tokens, positions)[1]


def _whole_sequence(
    model: CausalLM, params: Params, state: None, tokens: Array, positions: Array, *, kv_bits: int
) -> tuple[None, Array]:
    """`CausalLM.__call__` on one device, or on its part of a model."""
    attention = full_attention(model.config, positions, kv_bits)
    lengths = positions.max(axis=1) + 1
    x, _ = hidden_states(model, params, tokens, positions, lengths, attention, state)
    return None, lm_logits(model.config, params, x, model.axis)


def param_shapes(config: ModelConfig) -> dict[str, Any]:
    """The canonical float tree, with a shape tuple for each leaf."""
    d, f, h, n_layers = (
        config.hidden_size,
        config.intermediate_size,
        config.head_dim,
        config.num_layers,
    )
    n_kv = config.num_kv_heads
    heads = {"q_proj": config.num_heads, "k_proj": n_kv, "v_proj": n_kv}

    def dense(k: int, n: int, bias: bool) -> dict[str, tuple[int, ...]]:
        return {"kernel": (n_layers, k, n)} | ({"bias": (n_layers, n)} if bias else {})

    layers: dict[str, Any] = {
        "attn_norm": {"scale": (n_layers, d)},
        **{name: dense(d, count * h, config.qkv_bias) for name, count in heads.items()},
        "o_proj": dense(config.num_heads * h, d, config.o_bias),
        "mlp_norm": {"scale": (n_layers, d)},
        "gate_proj": dense(d, f, config.mlp_bias),
        "up_proj": dense(d, f, config.mlp_bias),
        "down_proj": dense(f, d, config.mlp_bias),
    }
    if config.qk_norm:
        layers |= {"q_norm": {"scale": (n_layers, h)}, "k_norm": {"scale": (n_layers, h)}}
    if config.centered_keys:
        layers["key_center"] = {"center": (n_layers, n_kv, h)}
    vocabulary = {"embedding": (config.vocab_size, d)}
    tree = {"embed": vocabulary, "layers": layers, "final_norm": {"scale": (d,)}}
    return tree if config.tie_embeddings else tree | {"lm_head": dict(vocabulary)}


def config_of(config: ModelConfig, params: Params) -> ModelConfig:
    """The config of a tree that transforms have changed: an untied head, centred keys."""
    return dataclasses.replace(
        config,
        tie_embeddings="lm_head" not in params,
        centered_keys="key_center" in params["layers"],
    )


def init_params(key: Array, config: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """Random weights for training: normal, std 0.02, over sqrt(2 L) into the residual (GPT-2)."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(
        param_shapes(config), is_leaf=lambda x: isinstance(x, tuple)
    )

    def initial(key: Array, path: Any, shape: tuple[int, ...]) -> Array:
        owner, name = path[-2].key, path[-1].key
        if name == "scale":
            return jnp.ones(shape, dtype)
        if name in ("bias", "center"):
            return jnp.zeros(shape, dtype)
        residual = owner in ("o_proj", "down_proj")
        std = 0.02 / (2 * config.num_layers) ** 0.5 if residual else 0.02
        return std * jax.random.normal(key, shape, dtype)

    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten(initial(k, path, s) for k, (path, s) in zip(keys, leaves, strict=True))


def hidden_states(
    model: CausalLM,
    params: Params,
    tokens: Array,
    positions: Array,
    rope_lens: Array,
    attention: Attention,
    state: Any,
    unroll: int = 1,
) -> tuple[Array, Any]:
    """tokens, positions i32[B, T] -> final hidden states [B, T, D] and the attention's state.

    unroll: layers in one round of the loop.
    """
    config = model.config
    turn = rope_turn(positions, *rope_frequencies(config, rope_lens))
    scanned, in_place = split_in_place(params["layers"])

    def body(carry, xs):
        x, state = carry
        layer, scanned_layer = xs
        p = join_in_place(scanned_layer, in_place)
        x, state = decoder_layer(model, p, x, layer, turn, attention, state)
        return (x, state), None

    flags = flags_of(params, tokens.size)
    x = look_up(params["embed"]["embedding"], tokens, model.axis, owed=flags is not None)
    layers = jnp.arange(config.num_layers)
    (x, state), _ = jax.lax.scan(body, (x, state), (layers, scanned), unroll=unroll)
    scale, eps = params["final_norm"]["scale"], config.rms_norm_eps
    options = {"axis": model.axis, "layer": None, "backend": model.backend}
    x, _ = add_owed(x, scale, flags, eps=eps, **options)
    return rms_norm(x, scale, eps), state


def no_tap(name: str, value: Callable[[], Array]) -> None:
    """Looks at nothing."""


def decoder_layer(model, p, x, layer, turn: Turn, attention: Attention, state, tap: Tap = no_tap):
    """One layer: x [B, T, D] -> (x, state). An `Unsummed` x -> another."""
    config, act_bits, backend = model.config, model.act_bits, model.backend
    eps, owed = config.rms_norm_eps, isinstance(x, Unsummed)
    exchange = {"axis": model.axis, "eps": eps, "layer": layer, "backend": backend}
    flags = p[EXCHANGE]["flags"] if owed else None
    with jax.named_scope("attention"):
        x, normed = add_owed(x, p["attn_norm"]["scale"], flags, **exchange)
        options = {"layer": layer, "dtype": x.dtype, "backend": backend}
        norm = x, p["attn_norm"]["scale"], eps
        names = ("q_proj", "k_proj", "v_proj")
        tap("q_proj", lambda: rms_norm(*norm))
        fused = {"act_bits": act_bits, "normed": normed, **options}
        qkv = normalized_projections(*norm, p, names, "qkv_proj", **fused)
        qkv = [y.reshape(*y.shape[:-1], -1, config.head_dim) for y in qkv]
        if config.qk_norm:
            q, k, v = split_heads(qkv, config.num_kv_heads)
            q = rms_norm(q, p["q_norm"]["scale"], config.rms_norm_eps)
            k = rms_norm(k, p["k_norm"]["scale"], config.rms_norm_eps)
            qkv = [q, k, v]
        center = p["key_center"]["center"] if "key_center" in p else None
        tap("queries", lambda: rotate(split_heads(qkv, config.num_kv_heads)[0], *turn))
        tap("keys", lambda: rotate(split_heads(qkv, config.num_kv_heads)[1], *turn, center=center))
        tap("values", lambda: split_heads(qkv, config.num_kv_heads)[2])
        heads, state = attention(qkv, turn, center, layer, state)
        heads = heads.reshape(*heads.shape[:-2], -1)
        tap("o_proj", lambda: heads)
        o = p["o_proj"]
        y = quantize_input(heads, act_bits, o["kernel"], backend=backend)
        x = linear(y, o, residual=x, axis=model.axis, owed=owed, **options)
    with jax.named_scope("mlp"):
        x, normed = add_owed(x, p["mlp_norm"]["scale"], flags, **exchange)
        norm = x, p["mlp_norm"]["scale"], eps
        names = ("gate_proj", "up_proj")
        tap("gate_proj", lambda: rms_norm(*norm))
        fused = {"act_bits": act_bits, "normed": normed, **options}
        both = normalized_projections(*norm, p, names, "gate_up_proj", **fused)
        down = p["down_proj"]
        tap("down_proj", lambda: silu_mul(*split_gate_up(both)))
        y = silu_mul_input(both, act_bits, down["kernel"], backend=backend)
        return linear(y, down, residual=x, axis=model.axis, owed=owed, **options), state


def lm_logits(config: ModelConfig, params: Params, x: Array, axis: str | None = None) -> Array:
    """x [..., D] -> logits f32[..., V] by the head, or by the embedding where they are tied.

    A head in 8 bits (`runtime.int8_head`) is an integer matmul, with x quantised per token.
    """
    head = params["embed" if config.tie_embeddings else "lm_head"]["embedding"]
    if is_quantized(head):  # W8PerChannel: XLA's int8 dot on every backend
        x_int8 = quantize_activation(x)
        logits = quantized_matmul(x_int8, head, out_dtype=jnp.float32, backend="reference")
    else:
        logits = jnp.einsum(
            "...D,VD->...V", x, head, precision="highest", preferred_element_type=jnp.float32
        )
    return gather(logits, axis)


def full_attention(config: ModelConfig, positions: Array, kv_bits: int) -> Attention:
    """Causal attention of a whole sequence over itself, without a cache."""
    valid = jnp.ones(positions.shape, bool)

    def attention(qkv, turn, center, layer, state):
        q, k, v = split_heads(qkv, config.num_kv_heads)
        q, k = rotate(q, *turn), rotate(k, *turn, center=center)
        k, v = (fake_quantize_kv(x, kv_bits) for x in (k, v))
        out = attend(
            q,
            k,
            v,
            q_positions=positions,
            k_positions=positions,
            k_valid=valid,
            window=config.sliding_window,
        )
        return out, state

    return attention


def cached_attention(
    model: CausalLM,
    block_table: Array,
    context_lens: Array,
    query_lens: Array,
    slots: Array,
    cached_pages: int | None,
    attends: str,
) -> Attention:
    """Rotate, append K and V to the cache (the scan's state), then attend over pages."""
    pages = block_table if attends == "quantized" else block_table[:, :cached_pages]
    order = longest_first(context_lens)  # once for all layers; what does not read it, drops it

    def attention(qkv, turn, center, layer, cache):
        batch = qkv[0].shape[:2]
        qkv, (cos, sin) = ([x.reshape(-1, *x.shape[2:]) for x in xs] for xs in (qkv, turn))
        *qkv, cache = rope_append_kv(
            qkv, cos, sin, cache, slots, center=center, layer=layer, backend=model.backend
        )
        q, k, v = (x.reshape(*batch, *x.shape[1:]) for x in qkv)
        out = paged_attention(
            q,
            cache,
            pages,
            context_lens,
            new_k=k,
            new_v=v,
            query_lens=query_lens,
            attends=attends,
            layer=layer,
            window=model.config.sliding_window,
            order=order,
            backend=model.backend,
        )
        return out, cache

    return attention


def slot_mapping(block_table: Array, positions: Array, valid: Array, page_size: int) -> Array:
    """Cache slots i32[B * T] of tokens at `positions` i32[B, T]; -1 where not valid or no page, or
    one whose slots int32 does not hold."""
    index = positions // page_size
    valid &= (positions >= 0) & (index < block_table.shape[1])
    page = jnp.take_along_axis(block_table, jnp.where(valid, index, 0), axis=1)
    slot = page * page_size + positions % page_size
    exists = (page >= 0) & (page <= 2**31 // page_size - 1)
    return jnp.where(valid & exists, slot, -1).reshape(-1)


def check_inputs(
    tokens: Array, form: str, block_table: Array, lens: dict[str, Array | None]
) -> None:
    """ValueError unless all are integer arrays, tokens of `form`, the lens [B] (or None)."""
    arrays = {"tokens": (tokens, form), "block_table": (block_table, "[B, max_pages]")}
    arrays |= {name: (x, "[B]") for name, x in lens.items() if x is not None}
    rows = jnp.shape(tokens)[:1]
    for name, (x, axes) in arrays.items():
        shape, dtype = jnp.shape(x), jnp.result_type(x)
        fits = len(shape) == axes.count(",") + 1 and shape[:1] == rows
        if not fits or not jnp.issubdtype(dtype, jnp.integer):
            raise ValueError(
                f"{name} is {dtype}{list(shape)} but must be an integer {axes} with one B for all "
                f"(tokens {list(jnp.shape(tokens))}; prefill takes [B, T], decode_step [B])"
            )


def prefill(
    model: CausalLM,
    params: Params,
    cache: KVCache,
    tokens: Array,
    block_table: Array,
    context_lens: Array,
    *,
    query_lens: Array | None = None,
    rope_lens: Array | None = None,
    attends: str = "full",
    cached_pages: int | None = None,
    all_logits: bool = False,
) -> tuple[KVCache, Array]:
    """Run new tokens of B sequences through the model and into the cache.

    tokens: i32[B, T], right-padded. block_table: i32[B, max_pages], -1 for none.
    context_lens: i32[B], length of each sequence after this call; 0 for an idle row.
    query_lens: i32[B], how many of the T tokens are real; default min(T, context_lens), which is
      right for fresh prompts and full chunks. A chunk of a longer prompt has context_lens >
      query_lens and attends to the pages of what came before.
    rope_lens: i32[B], the longest length each sequence may reach; only dynamic NTK reads it (one
      base per sequence, so that cached keys stay valid). Default context_lens.
    attends: "full" or "quantized", see `paged_attention`.
    cached_pages: static bound on the pages that hold earlier chunks; 0 says the prompts are fresh.
    Returns (cache, logits f32[B, V] of each last real token), or [B, T, V] with all_logits.

    Pure and traceable: jit it with model, attends, cached_pages, all_logits static, and donate the
    cache. Raises ValueError on shapes and dtypes that do not fit.
    """
    lens = {"context_lens": context_lens, "query_lens": query_lens, "rope_lens": rope_lens}
    check_inputs(tokens, "[B, T]", block_table, lens)
    tokens, block_table, context_lens, query_lens, rope_lens = as_int32(
        tokens=tokens, block_table=block_table, **lens
    )
    query_lens = jnp.minimum(context_lens, tokens.shape[1]) if query_lens is None else query_lens
    rope_lens = context_lens if rope_lens is None else rope_lens
    body = functools.partial(
        _prefill, attends=attends, cached_pages=cached_pages, all_logits=all_logits
    )
    arrays = tokens, block_table, context_lens, query_lens, rope_lens
    return on_ranks(model, body, params, cache, *arrays)


def _prefill(
    model: CausalLM,
    params: Params,
    cache: KVCache,
    tokens: Array,
    block_table: Array,
    context_lens: Array,
    query_lens: Array,
    rope_lens: Array,
    *,
    attends: str,
    cached_pages: int | None,
    all_logits: bool,
) -> tuple[KVCache, Array]:
    """`prefill` on one device, or on its part of a model."""
    b, t = tokens.shape
    offsets = jnp.broadcast_to(jnp.arange(t), (b, t))
    positions = (context_lens - query_lens)[:, None] + offsets
    slots = slot_mapping(block_table, positions, offsets < query_lens[:, None], cache.page_size)
    attention = cached_attention(
        model, block_table, context_lens, query_lens, slots, cached_pages, attends
    )
    kernels = usable(model.backend) != ("reference",)
    quantized = any(map(is_quantized, jax.tree.leaves(params["layers"], is_leaf=is_quantized)))
    unroll = LAYERS_AT_ONCE if kernels and quantized else 1
    x, cache = hidden_states(model, params, tokens, positions, rope_lens, attention, cache, unroll)
    if not all_logits:
        last = jnp.clip(query_lens - 1, 0, t - 1)
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    return cache, lm_logits(model.config, params, x, model.axis)


def decode_step(
    model: CausalLM,
    params: Params,
    cache: KVCache,
    tokens: Array,
    block_table: Array,
    context_lens: Array,
    *,
    rope_lens: Array | None = None,
    attends: str = "full",
) -> tuple[KVCache, Array]:
    """One new token for each of B sequences: tokens i32[B] -> (cache, logits f32[B, V]).

    context_lens counts the new token; a row with 0 is idle: it writes nothing and its logits mean
    nothing. Other arguments, and errors, as in `prefill`.
    """
    lens = {"context_lens": context_lens, "rope_lens": rope_lens}
    check_inputs(tokens, "[B]", block_table, lens)
    return prefill(
        model,
        params,
        cache,
        tokens[:, None],
        block_table,
        context_lens,
        rope_lens=rope_lens,
        attends=attends,
    )
