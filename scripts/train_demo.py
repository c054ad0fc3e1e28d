"""Train the demo model, ship it as a Hugging Face directory, and quantise it.

A Llama of 5.2 M parameters can learn half a million tokens of children's stories by heart, so most
of what is chosen here is against overfitting: weights are dropped at random, decayed, and averaged,
and the average that does best on validation stories is kept. The last step is what a training
repository does to serve its own model: `quantize_params`. Needs optax and tokenizers.

Data: excerpts of TinyStories, https://huggingface.co/datasets/roneneldan/TinyStories, licence
CDLA-Sharing-1.0, in two files that scripts/tinystories.py names.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tinystories import (
    Stories,
    Tokens,
    bits_per_byte,
    held_out,
    load_stories,
    save_tokenizer,
    tokenize,
    train_tokenizer,
)

from qserve_jax import QuantConfig, quantize_params
from qserve_jax.checkpoint.export import export_hf
from qserve_jax.models import CausalLM, ModelConfig
from qserve_jax.runtime.perplexity import Perplexity, loss_difference

# Every contraction (256 and 768) is a multiple of 128: the 4-bit groups fit without a rest.
CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=768,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
    tie_embeddings=True,
    bos_token_id=0,
    eos_token_ids=(0,),
)
AVERAGE_DECAY = 0.995

MODEL_CARD = """\
---
license: cdla-sharing-1.0
language: en
datasets: [roneneldan/TinyStories]
---
# qserve_jax demo model

A Llama of 5.2 M parameters that tells short children's stories: 6 layers, width 256,
4 query and 2 KV heads of 64, FFN 768, tied embeddings, byte-level BPE of 2048 tokens, context 1024,
bfloat16. It exists so that qserve_jax runs without a download; it is good for nothing else.

- Data: excerpts (2.4 MB) of [TinyStories](https://huggingface.co/datasets/roneneldan/TinyStories)
  by Ronen Eldan and Yuanzhi Li, licence CDLA-Sharing-1.0: {train} stories to train,
  {validation} to choose the weights, {test} held out, without near duplicates between them.
- Training: {steps} steps of {batch_size} x {seq_len} tokens; average weights of step {best_step}.
- Held-out loss: {loss:.4f} ± {error:.4f} nats per token, {bits:.4f} bits per byte, perplexity
  {perplexity} (bfloat16 weights, windows of 1024 tokens every 512).
- Made by `{command}`.
"""


class State(NamedTuple):
    """What training carries from step to step. loss_sum: of the steps since it was last reset."""

    params: Any
    opt_state: Any
    average: Any
    loss_sum: jax.Array


def make_optimizer(args: argparse.Namespace) -> optax.GradientTransformation:
    """AdamW with a warm-up, a cosine, and decay of matrices only (not of stacked norm scales)."""
    warmup, peak = min(100, args.steps // 10 + 1), args.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(0, peak, warmup, args.steps + 1, peak / 20)
    is_matrix = functools.partial(
        jax.tree_util.tree_map_with_path, lambda path, _: path[-1].key in ("kernel", "embedding")
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=args.weight_decay, mask=is_matrix),
    )


class Fit(NamedTuple):
    """What training found: parameters, the step they are from, their validation loss."""

    params: Any
    step: int
    loss: float


def drop_weights(key: jax.Array, params: Any, rate: float) -> Any:
    """Each kernel with a random `rate` of its weights at zero and the others scaled up to match.

    DropConnect, as AWD-LSTM (Merity et al., 2017) uses it on a small corpus; it needs no change
    to the model.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)

    def drop(key: jax.Array, path: Any, w: jax.Array) -> jax.Array:
        if path[-1].key != "kernel":
            return w
        return jnp.where(jax.random.bernoulli(key, 1 - rate, w.shape), w / (1 - rate), 0)

    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten(drop(k, path, w) for k, (path, w) in zip(keys, leaves, strict=True))


def make_train(model: CausalLM, optimizer: optax.GradientTransformation, args: argparse.Namespace):
    """train(state, text i32[n], start, stop) -> state: steps start..stop-1 in one device call."""

    def loss_fn(params: Any, key: jax.Array, windows: jax.Array) -> jax.Array:
        params = drop_weights(key, params, args.weight_dropout)
        logits = jnp.asarray(model.apply({"params": params}, windows[:, :-1]))
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    def step(i: jax.Array, state: State, text: jax.Array) -> State:
        crop_key, drop_key = jax.random.split(jax.random.fold_in(jax.random.key(args.seed), i))
        starts = jax.random.randint(crop_key, (args.batch_size, 1), 0, text.size - args.seq_len)
        windows = text[starts + jnp.arange(args.seq_len + 1)]
        loss, gradients = jax.value_and_grad(loss_fn)(state.params, drop_key, windows)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(AVERAGE_DECAY, (i + 1) / (i + 10))
        average = optax.incremental_update(params, state.average, 1 - decay)
        return State(params, opt_state, average, state.loss_sum + loss)

    @functools.partial(jax.jit, donate_argnums=0)
    def train(state: State, text: jax.Array, start: int, stop: int) -> State:
        return jax.lax.fori_loop(start, stop, functools.partial(step, text=text), state)

    return train


def fit(model: CausalLM, tokens: Tokens, stories: Stories, args: argparse.Namespace) -> Fit:
    """The averaged parameters with the lowest validation loss."""
    optimizer = make_optimizer(args)
    train = make_train(model, optimizer, args)
    params = jax.jit(model.init)(jax.random.key(args.seed), jnp.zeros((1, 1), jnp.int32))["params"]
    # The average has its own buffers, because the state is donated.
    state = State(params, optimizer.init(params), jax.tree.map(jnp.copy, params), jnp.zeros(()))
    best, began = Fit(None, 0, np.inf), time.perf_counter()
    for start in range(0, args.steps, args.eval_every):
        stop = min(start + args.eval_every, args.steps)
        state = train(state._replace(loss_sum=jnp.zeros(())), tokens.train, start, stop)
        result = held_out(model, state.average, tokens.validation)
        if result.loss < best.loss:
            best = Fit(jax.device_get(state.average), stop, result.loss)
        print(
            f"step {stop}/{args.steps} · train {state.loss_sum / (stop - start):.4f} nats per token"
            f" · validation {result.loss:.4f}, {bits_per_byte(result, stories.validation):.4f} bits"
            f" per byte{' (best)' * (best.step == stop)} · {time.perf_counter() - began:.0f} s",
            flush=True,
        )
    if best.params is None:
        raise SystemExit(f"training diverged at --learning-rate {args.learning_rate}: lower it")
    return best


def report_quantised(model: CausalLM, params: Any, tokens: np.ndarray, exact: Perplexity) -> None:
    """Quantise the trained tree and print what that costs on the held-out stories."""
    config = QuantConfig()  # W4A8KV4, groups of 128
    quantised = jax.jit(quantize_params, static_argnums=1)(params, config)
    result = held_out(model, quantised, tokens, config.kv_bits)
    change = "{:+.4f} ± {:.4f}".format(*loss_difference(result, exact))
    print(f"held-out perplexity: float {exact}, {config.precision} {result} ({change} nats/token)")


def model_card(args: argparse.Namespace, stories: Stories, step: int, result: Perplexity) -> str:
    """README.md of the model, with the numbers of this run."""
    settings = {name: value for name, value in vars(args).items() if name not in ("data", "output")}
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())
    return MODEL_CARD.format(
        **settings,
        **{name: len(part) for name, part in stories._asdict().items()},
        best_step=step,
        loss=result.loss,
        error=result.loss_standard_error,
        bits=bits_per_byte(result, stories.test),
        perplexity=result,
        command=f"python scripts/train_demo.py --data DIR {flags}",
    )


def parse_args() -> tuple[argparse.Namespace, Stories]:
    """The flags, checked, and the stories of --data."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the two excerpts")
    parser.add_argument("--output", type=Path, required=True, help="qserve_jax/assets/demo to ship")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=16, help="windows per step")
    parser.add_argument("--seq-len", type=int, default=CONFIG.max_position_embeddings)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=1.0)
    parser.add_argument("--weight-dropout", type=float, default=0.25)
    parser.add_argument("--eval-every", type=int, default=100, help="steps per device call")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name, low, high in (
        *((name, 1, 10**6) for name in ("steps", "batch_size", "eval_every")),
        ("seq_len", 1, CONFIG.max_position_embeddings),
        ("weight_dropout", 0, 0.9),
    ):
        if not low <= getattr(args, name) <= high:
            parser.error(f"{name}={getattr(args, name)} is outside {low}..{high}")
    try:
        return args, load_stories(args.data)
    except ValueError as error:
        parser.error(str(error))


def main() -> None:
    args, stories = parse_args()
    tokenizer = train_tokenizer(stories.train, CONFIG.vocab_size)
    tokens = tokenize(tokenizer, stories)
    print({f"{part}_tokens": ids.size for part, ids in tokens._asdict().items()})
    model = CausalLM(CONFIG)
    best = fit(model, tokens, stories, args)
    # What is measured is what is shipped: weights rounded to bfloat16.
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16).astype(jnp.float32), best.params)
    result = held_out(model, params, tokens.test)
    export_hf(args.output, params, CONFIG)
    save_tokenizer(tokenizer, args.output, CONFIG.max_position_embeddings)
    (args.output / "README.md").write_text(model_card(args, stories, best.step, result))
    report_quantised(model, params, tokens.test, result)


if __name__ == "__main__":
    main()
