"""What the device alone knows of sequences between calls, and the two calls of the engine with it.

The host launches a call before it has seen the last one's tokens. So the last token of a sequence,
its length and how many tokens it may still make stay on the device, in the sequence's slot, and a
call takes the slots of its rows out and puts them back.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from qserve_jax.models.llama import CausalLM, Params
from qserve_jax.quantization.qtensor import Array, KVCache
from qserve_jax.runtime.decode import DecodeState, decode_loop, prefill_and_sample
from qserve_jax.runtime.sampling import SampleOutput, SamplingFeatures, TokenCounts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Live:
    """The fields of `DecodeState` that calls change, of all slots; the last slot is for padding."""

    tokens: Array
    context_lens: Array
    remaining: Array
    counts: TokenCounts | None


def make_live(num_slots: int, vocab_size: int | None) -> Live:
    """Empty slots and one for padding; vocab_size: of the token counts, None for no counts."""
    zeros = jnp.zeros(num_slots + 1, jnp.int32)
    counts = None
    if vocab_size is not None:
        shape = (num_slots + 1, vocab_size)
        counts = TokenCounts(jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32))
    return Live(zeros, jnp.copy(zeros), jnp.copy(zeros), counts)


def take(live: Live, state: DecodeState, slots: Array) -> DecodeState:
    """The state with what its rows' slots hold; slots i32[B]."""
    rows = jax.tree.map(lambda x: x[slots], live)
    return dataclasses.replace(
        state,
        tokens=rows.tokens,
        context_lens=rows.context_lens,
        remaining=rows.remaining,
        counts=rows.counts,
    )


def put(live: Live, state: DecodeState, slots: Array) -> Live:
    """The slots with what the state's rows hold."""
    rows = Live(state.tokens, state.context_lens, state.remaining, state.counts)
    return jax.tree.map(lambda x, row: x.at[slots].set(row), live, rows)


def prefill_slots(
    model: CausalLM,
    params: Params,
    cache: KVCache,
    live: Live,
    slots: Array,
    prompts: Array,
    state: DecodeState,
    query_lens: Array | None,
    samples: Array,
    *,
    features: SamplingFeatures,
    attends: str,
) -> tuple[KVCache, Live, SampleOutput]:
    """`prefill_and_sample`, which fills the slots of its rows; its outputs get a step axis."""
    cache, state, out = prefill_and_sample(
        model,
        params,
        cache,
        prompts,
        state,
        query_lens,
        samples,
        features=features,
        attends=attends,
    )
    return cache, put(live, state, slots), jax.tree.map(lambda x: x[:, None], out)


def decode_slots(
    model: CausalLM,
    params: Params,
    cache: KVCache,
    live: Live,
    slots: Array,
    state: DecodeState,
    num_steps: int,
    yield_idle: int,
    *,
    max_steps: int,
    features: SamplingFeatures,
    attends: str,
) -> tuple[KVCache, Live, SampleOutput]:
    """`decode_loop` of what is in the slots of its rows."""
    cache, state, out = decode_loop(
        model,
        params,
        cache,
        take(live, state, slots),
        num_steps,
        yield_idle,
        max_steps=max_steps,
        features=features,
        attends=attends,
    )
    return cache, put(live, state, slots), out
