"""Best of n with a rule of one's own over the logits, as one jitted function.

`prefill` and `decode_step` are pure functions: the prompt is computed once, its pages are shared by
all samples, every step goes through `rule`, and only the best sample leaves the device.
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qserve_jax import load_model
from qserve_jax.models import CausalLM, decode_step, prefill
from qserve_jax.pallas_kernels import prepare_for_backend
from qserve_jax.quantization.qtensor import KVCache
from qserve_jax.runtime import init_cache

Rule = Callable[[jax.Array, jax.Array], jax.Array]
"""(logits f32[n, V], tokens so far i32[n, T], -1 where there is none yet) -> logits f32[n, V]."""


def no_repeated_pair(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Forbids a token that has followed the last one before."""
    step = jnp.sum(tokens >= 0, axis=1)
    last = jnp.take_along_axis(tokens, jnp.maximum(step - 1, 0)[:, None], axis=1)
    followed = (tokens[:, :-1] == last) & (tokens[:, :-1] >= 0) & (tokens[:, 1:] >= 0)
    banned = jnp.where(followed, tokens[:, 1:], logits.shape[-1])
    rows = jnp.arange(len(logits))[:, None]
    return logits.at[rows, banned].set(-jnp.inf, mode="drop")


@functools.partial(
    jax.jit, static_argnames=("model", "rule", "n", "max_tokens"), donate_argnames="cache"
)
def best_of_n(
    model: CausalLM,
    params: Any,
    cache: KVCache,
    prompt: jax.Array,
    key: jax.Array,
    *,
    rule: Rule,
    n: int,
    max_tokens: int,
    temperature: float = 1.0,
) -> tuple[KVCache, jax.Array, jax.Array]:
    """Of n samples of prompt i32[T], the one that the model itself finds likeliest per token.

    cache: of at least the prompt's full pages and, for each sample, the pages after them.
    Returns (cache, tokens i32[max_tokens], mean log-probability f32[]).
    """
    size, length = cache.page_size, prompt.size
    shared = length // size  # full pages of the prompt
    own = -(-(length + max_tokens) // size) - shared
    table = jnp.concatenate(
        [
            jnp.broadcast_to(jnp.arange(shared), (n, shared)),
            shared + jnp.arange(n * own).reshape(n, own),
        ],
        axis=1,
    )
    if shared:  # once, for all
        lens = jnp.full(1, shared * size)
        cache, _ = prefill(model, params, cache, prompt[None, : shared * size], table[:1], lens)
    rest = jnp.broadcast_to(prompt[shared * size :], (n, length - shared * size))
    if rest.shape[1] == 0:
        raise ValueError(f"the prompt fills {shared} pages exactly: add a token")
    lens = jnp.full(n, length)
    cache, logits = prefill(
        model, params, cache, rest, table, lens, query_lens=lens - shared * size
    )

    def step(carry, number):
        cache, logits, tokens, score = carry
        scores = rule(logits, tokens) / temperature
        chosen = jax.random.categorical(jax.random.fold_in(key, number), scores)
        logprobs = jax.nn.log_softmax(logits)
        score += jnp.take_along_axis(logprobs, chosen[:, None], axis=1)[:, 0]
        tokens = tokens.at[:, number].set(chosen)
        cache, logits = decode_step(model, params, cache, chosen, table, lens + number + 1)
        return (cache, logits, tokens, score), None

    start = (cache, logits, jnp.full((n, max_tokens), -1), jnp.zeros(n))
    (cache, _, tokens, score), _ = jax.lax.scan(step, start, jnp.arange(max_tokens))
    best = jnp.argmax(score)
    return cache, tokens[best], score[best] / max_tokens


def main() -> None:
    loaded = load_model(str(importlib.resources.files("qserve_jax") / "assets" / "demo"))
    params = prepare_for_backend(loaded.params)
    prompt = jnp.asarray(loaded.tokenizer("Once upon a time, there was a little cat.").input_ids)
    for n in (1, 8):
        cache = init_cache(loaded.config, num_pages=1 + 4 * n, page_size=16)
        _, tokens, score = best_of_n(
            loaded.model,
            params,
            cache,
            prompt,
            jax.random.key(0),
            rule=no_repeated_pair,
            n=n,
            max_tokens=40,
            temperature=0.8,
        )
        text = loaded.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
        print(f"best of {n}, {score:.3f} nats per token:{text}")


if __name__ == "__main__":
    main()
