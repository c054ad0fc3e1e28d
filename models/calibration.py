"""What calibration sees of a model: the inputs of its matmuls and its attention heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qserve_jax.models.layers import Params, join_in_place, split_in_place
from qserve_jax.models.llama import CausalLM, decoder_layer, full_attention
from qserve_jax.models.rope import rope_frequencies, rope_turn
from qserve_jax.quantization.qtensor import Array
from qserve_jax.quantization.transforms.calibration import (
    ActivationStats,
    InputStats,
    collect_statistics,
    reduce_input,
)

HEADS = ("queries", "keys", "values")
Summarize = Callable[[dict[str, Array]], dict[str, Any]]
"""What is kept of a layer's taps."""


def keep_nothing(taps: dict[str, Array]) -> dict[str, Any]:
    """Keeps nothing of a layer's taps: XLA then computes none of them."""
    return {}


def matmul_inputs(
    model: CausalLM, *, hessians: bool = False
) -> Callable[[Params, Array], dict[str, Any]]:
    """The `apply_fn` of `collect_statistics`: (params, tokens i32[B, T]) -> reduced statistics.

    `layers/{q,o,gate,down}_proj` f32[L, K], with `hessians` also X^T X f32[L, K, K], and the
    maxima of `layers/queries` [L, N, H] and `layers/keys` [L, K, H] after the rotary embedding.
    The scan over layers stacks statistics, never activations.
    """
    return _tapped(model, reduce_taps(hessians))


def reduce_taps(hessians: bool) -> Summarize:
    """Keeps the statistics of a layer's inputs, queries and keys."""

    def reduce(name: str, x: Array) -> InputStats:
        if name in HEADS:
            flat = reduce_input(x.reshape(*x.shape[:-2], -1))
            return InputStats(flat.absmax.reshape(x.shape[-2:]), None, flat.count)
        return reduce_input(x, moment=hessians)

    return lambda taps: {k: reduce(k, x) for k, x in taps.items() if k != "values"}


def attention_heads(model: CausalLM) -> Callable[[Params, Array], dict[str, Array]]:
    """(params, tokens i32[B, T]) -> `layers/queries` [L, B, T, N, H], `layers/keys` and
    `layers/values` [L, B, T, K, H] after the rotary embedding, for a search over few tokens."""
    return _tapped(model, keep_heads)


def keep_heads(taps: dict[str, Array]) -> dict[str, Array]:
    """Keeps queries, keys and values as they are."""
    return {name: taps[name] for name in HEADS}


def _tapped(model: CausalLM, summarize: Summarize):
    """One pass over all layers that returns `summarize(taps)` of each, stacked."""

    def apply_fn(params: Params, tokens: Array) -> dict[str, Any]:
        x = params["embed"]["embedding"][tokens]
        return through_layers(model, params["layers"], x, summarize)[1]

    return apply_fn


def through_layers(
    model: CausalLM,
    layers: Params,
    x: Array,
    summarize: Summarize = keep_nothing,
    kv_bits: int = 16,
) -> tuple[Array, dict[str, Any]]:
    """Hidden states x [B, T, D] through stacked layers: (x, `summarize(taps)` of each, stacked).

    Keys and values are seen as a cache of `kv_bits` returns them.
    """
    config = model.config
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    turn = rope_turn(positions, *rope_frequencies(config, positions.max(axis=1) + 1))
    attention = full_attention(config, positions, kv_bits)
    scanned, in_place = split_in_place(layers)

    def body(x, xs):
        layer, scanned_layer = xs
        p, taps = join_in_place(scanned_layer, in_place), {}

        def tap(name, value):
            taps[name] = value()

        x, _ = decoder_layer(model, p, x, layer, turn, attention, None, tap)
        return x, {f"layers/{name}": s for name, s in summarize(taps).items()}

    count = layers["attn_norm"]["scale"].shape[0]
    return jax.lax.scan(body, x, (jnp.arange(count), scanned))


def calibrate(
    model: CausalLM, params: Params, token_batches: Iterable[Array], *, hessians: bool = False
) -> ActivationStats:
    """`collect_statistics` of one of our models over batches i32[B, T]."""
    apply_fn = matmul_inputs(model, hessians=hessians)
    return collect_statistics(apply_fn, params, token_batches, hessians=hessians)


class Calibrator:
    """The calibration set of a model, as `quantize_with_recipe` asks for it between its steps.

    token_batches: i32[B, T] each, kept and read several times. The first `search_tokens` of the
    first batch serve searches over the attention's output.
    """

    def __init__(
        self, model: CausalLM, token_batches: Sequence[Array], *, search_tokens: int = 1024
    ):
        first = token_batches[0]
        rows = max(1, search_tokens // first.shape[1])
        self._batches, self._sample = token_batches, first[:rows, :search_tokens]
        self._inputs = {h: matmul_inputs(model, hessians=h) for h in (False, True)}
        self._heads = jax.jit(attention_heads(model))

    def statistics(self, params: Params, *, hessians: bool = False) -> ActivationStats:
        """The statistics of `params`; see `calibrate`."""
        apply_fn = self._inputs[hessians]
        return collect_statistics(apply_fn, params, self._batches, hessians=hessians)

    def heads(self, params: Params) -> dict[str, Array]:
        """See `attention_heads`."""
        return self._heads(params, self._sample)
