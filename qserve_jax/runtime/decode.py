"""The batched decode loop: many steps on the device per host call, and the prefill before it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from qserve_jax.models.llama import CausalLM, Params, decode_step, prefill
from qserve_jax.quantization.qtensor import Array, KVCache
from qserve_jax.runtime.sampling import (
    SampleOutput,
    SamplingFeatures,
    SamplingState,
    TokenCounts,
    count_tokens,
    sample,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """B sequences in the middle of generation. A row with remaining == 0 is idle or finished.

    tokens i32[B]          the last token of each, sampled but not yet in the cache
    context_lens i32[B]    tokens in the cache
    remaining i32[B]       tokens each may still generate
    block_table i32[B, max_pages]   must already hold pages for what may be generated
    rope_lens i32[B]       longest length each may reach (read by dynamic NTK)
    stop_ids i32[B, n]     token ids that end a sequence, -1 for none
    sampling               per-row sampling parameters
    counts                 prompt and output token counts, where penalties are on
    """

    tokens: Array
    context_lens: Array
    remaining: Array
    block_table: Array
    rope_lens: Array
    stop_ids: Array
    sampling: SamplingState
    counts: TokenCounts | None = None


def prefill_and_sample(
    model: CausalLM,
    params: Params,
    cache: KVCache,
    prompts: Array,
    state: DecodeState,
    query_lens: Array | None = None,
    samples: Array | None = None,
    *,
    features: SamplingFeatures,
    attends: str = "full",
) -> tuple[KVCache, DecodeState, SampleOutput]:
    """Prompts i32[B, T] (right-padded, lengths in state.context_lens) -> first tokens.

    query_lens: i32[B], how many of a row's T tokens are real, where they are chunks of prompts
      whose beginnings are in the cache; state.context_lens counts those too. None: fresh prompts.
    samples: bool[B], rows whose first token is chosen; the others only fill the cache, and their
      token is -1. Default all.

    Returns the cache, the state to go on from with `decode_loop` (a row whose first token is a
    stop id, or was its only one, has finished), and the SampleOutput of the first tokens.
    """
    cache, logits = prefill(
        model,
        params,
        cache,
        prompts,
        state.block_table,
        state.context_lens,
        query_lens=query_lens,
        rope_lens=state.rope_lens,
        attends=attends,
        cached_pages=0 if query_lens is None else None,
    )
    out = sample(logits, state.sampling, features, state.context_lens, state.counts)
    active = state.remaining > 0
    if samples is not None:
        active &= samples
        out = out._replace(tokens=jnp.where(samples, out.tokens, -1))
    return cache, advance(state, out.tokens, active, appended=0), out


def decode_loop(
    model: CausalLM,
    params: Params,
    cache: KVCache,
    state: DecodeState,
    num_steps: Array | int,
    yield_idle: Array | int | None = None,
    *,
    max_steps: int,
    features: SamplingFeatures,
    attends: str = "full",
) -> tuple[KVCache, DecodeState, SampleOutput]:
    """Generate on the device until every row is finished, or for min(num_steps, max_steps) steps.

    yield_idle: return as soon as so many of the B rows are idle, but not before the first step, so
      that the host can give away their places. Default, and more than B: go on.
    Returns the cache, the state to go on from, and a SampleOutput whose arrays have a step axis:
    tokens i32[B, max_steps], -1 where a row made none.

    Pure and traceable. Jit it with model, max_steps, features and attends static, and donate the
    cache: it is updated in place.
    """
    batch = state.tokens.shape[0]
    num_steps = jnp.minimum(num_steps, max_steps)

    def sample_next(logits: Array, state: DecodeState, positions: Array) -> SampleOutput:
        with jax.named_scope("sample"):
            return sample(logits, state.sampling, features, positions, state.counts)

    logits = jax.ShapeDtypeStruct((batch, model.config.vocab_size), jnp.float32)
    one_output = jax.eval_shape(sample_next, logits, state, state.context_lens)
    outputs = jax.tree.map(
        lambda x: jnp.full((batch, max_steps, *x.shape[1:]), -1, x.dtype), one_output
    )

    def unfinished(carry):
        step, _, state, _ = carry
        idle = jnp.sum(state.remaining <= 0)
        stop = (step > 0) & (idle >= enough)
        return (step < num_steps) & jnp.any(state.remaining > 0) & ~stop

    def one_step(carry):
        step, cache, state, outputs = carry
        active = state.remaining > 0
        context_lens = jnp.where(active, state.context_lens + 1, 0)
        cache, logits = decode_step(
            model,
            params,
            cache,
            state.tokens,
            state.block_table,
            context_lens,
            rope_lens=state.rope_lens,
            attends=attends,
        )
        out = sample_next(logits, state, context_lens)
        out = out._replace(tokens=jnp.where(active, out.tokens, -1))
        outputs = jax.tree.map(lambda all_, one: all_.at[:, step].set(one), outputs, out)
        state = advance(state, out.tokens, active, appended=1)
        return step + 1, cache, state, outputs

    enough = batch + 1 if yield_idle is None else yield_idle
    carry = (jnp.int32(0), cache, state, outputs)
    _, cache, state, outputs = jax.lax.while_loop(unfinished, one_step, carry)
    return cache, state, outputs


def advance(state: DecodeState, tokens: Array, active: Array, *, appended: int) -> DecodeState:
    """The state after each active row made one token (i32[B], bool[B]).

    appended: cache entries that each active row gained by it: decoding appends the token before,
    prefill has counted the whole prompt already.
    """
    stopped = active & jnp.any(tokens[:, None] == state.stop_ids, axis=1)
    counts = state.counts
    if counts is not None:
        counts = count_tokens(counts, tokens, active)
    return dataclasses.replace(
        state,
        tokens=jnp.where(active, tokens, state.tokens),
        context_lens=state.context_lens + appended * active,
        remaining=jnp.where(stopped, 0, state.remaining - active),
        counts=counts,
    )
