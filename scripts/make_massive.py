"""A model whose residual stream has a direction of massive constant size, from the demo model.

The demo's residual stream has no such direction (its largest holds an eighth of the variance),
large language models have one. It is added to every layer's output (biases of o_proj and
down_proj), made invisible to all readers, and their gains raised by what the norm then takes away;
a short training heals that the norm no longer sees a token's own size. Writes DIR/params.npz, the
canonical tree with all norms folded; `qoq_tables.py --massive DIR` reads it.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tinystories import join_stories, load_stories
from tokenizers import Tokenizer

from qserve_jax.benchmarks.provenance import ROOT
from qserve_jax.checkpoint import LoadedModel, load_model
from qserve_jax.models import CausalLM, ModelConfig
from qserve_jax.quantization.transforms import fold_norms

DEMO = ROOT / "qserve_jax/assets/demo"


def massive_config(config: ModelConfig) -> ModelConfig:
    """The demo's config with biases to write the direction with, and a head of its own."""
    return dataclasses.replace(config, tie_embeddings=False, o_bias=True, mlp_bias=True)


def load_massive(folder: Path, config: ModelConfig) -> tuple[ModelConfig, Any]:
    """(config, canonical tree f32) of the model that this script wrote to `folder`."""
    tree: dict[str, Any] = {}
    with np.load(folder / "params.npz") as arrays:
        for path, value in arrays.items():
            *parents, name = path.split("/")
            at = tree
            for parent in parents:
                at = at.setdefault(parent, {})
            at[name] = jnp.asarray(value, jnp.float32)
    return massive_config(config), tree


def residual_streams(loaded: LoadedModel, params: Any, tokens: Any) -> np.ndarray:
    """f32[2 L + 1, tokens, D]: what each norm is given, in order."""
    from qserve_jax.models.llama import decoder_layer, full_attention
    from qserve_jax.models.rope import rope_frequencies

    config = loaded.config
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    rope, attention = rope_frequencies(config), full_attention(config, positions, 16)
    x, streams = params["embed"]["embedding"][tokens], []
    for i in range(config.num_layers):
        p = jax.tree.map(lambda w, i=i: w[i], params["layers"])
        silent = {**p, "down_proj": jax.tree.map(jnp.zeros_like, p["down_proj"])}
        middle, _ = decoder_layer(loaded.model, silent, x, i, positions, rope, attention, None)
        streams += [x, middle]
        x, _ = decoder_layer(loaded.model, p, x, i, positions, rope, attention, None)
    return np.stack([*streams, x]).reshape(2 * config.num_layers + 1, -1, config.hidden_size)


def add_direction(loaded: LoadedModel, tokens: Any, ratio: float) -> Any:
    """The folded demo with a constant of `ratio` times the stream's own rms size along the
    direction that it uses least."""
    params = fold_norms(loaded.params)
    streams = residual_streams(loaded, params, tokens).astype(np.float64)
    sizes = np.sqrt((streams**2).sum(-1).mean(-1))
    shares = sum(x.T @ x / np.square(x).sum() for x in streams)
    direction = np.linalg.eigh(shares)[1][:, 0]
    project = np.eye(len(direction)) - np.outer(direction, direction)
    constants, gain = ratio * sizes, np.sqrt(1 + ratio**2)
    layers, n = dict(params["layers"]), loaded.config.num_layers
    for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        layers[name] = {"kernel": jnp.asarray(gain * project @ layers[name]["kernel"])}
        if name in ("gate_proj", "up_proj"):
            layers[name]["bias"] = jnp.zeros((n, loaded.config.intermediate_size))
    steps = np.diff(constants)  # o of layer 0, down of layer 0, o of layer 1, ...
    for i, name in enumerate(("o_proj", "down_proj")):
        bias = steps[i::2, None] * direction
        layers[name] = {"kernel": jnp.asarray(layers[name]["kernel"] @ project), "bias": bias}
    embedding = params["embed"]["embedding"] @ project + constants[0] * direction
    head = gain * params["lm_head"]["embedding"] @ project
    tree = {**params, "layers": layers}
    tree |= {"embed": {"embedding": embedding}, "lm_head": {"embedding": head}}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def train(model: CausalLM, params: Any, text: np.ndarray, steps: int, rate: float, seed: int):
    """Adam on windows of 8 x 256 tokens; the norms' scales stay one."""
    rows, length = 8, 256
    schedule = optax.warmup_cosine_decay_schedule(0, rate, steps // 10, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.98))
    rng = np.random.default_rng(seed)

    def loss_of(params, tokens):
        logits: Any = model.apply({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @jax.jit
    def step(params, state, tokens):
        loss, grads = jax.value_and_grad(loss_of)(params, tokens)
        mask = jax.tree_util.tree_map_with_path(lambda path, g: path[-1].key != "scale", grads)
        grads = jax.tree.map(lambda g, m: g if m else jnp.zeros_like(g), grads, mask)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state = optimizer.init(params)
    for i in range(steps):
        starts = rng.integers(0, len(text) - length - 1, rows)
        tokens = jnp.asarray(np.stack([text[s : s + length + 1] for s in starts]))
        params, state, loss = step(params, state, tokens)
        if i % 20 == 0 or i == steps - 1:
            print(f"step {i} loss {float(loss):.4f}", flush=True)
    return params


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the two excerpts")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ratio", type=float, default=12.0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    args = parser.parse_args()
    stories = load_stories(args.data)
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    text = join_stories(tokenizer, stories.train)
    loaded = load_model(DEMO, precision="w16a16kv16", dtype="float32")
    params = add_direction(loaded, jnp.asarray(text[:4096].reshape(8, 512)), args.ratio)
    model = CausalLM(massive_config(loaded.config))
    params = train(model, params, text, args.steps, args.learning_rate, seed=0)
    args.output.mkdir(parents=True, exist_ok=True)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    arrays = {n: np.asarray(x) for n, (_, x) in zip(names, leaves, strict=True)}
    np.savez(args.output / "params.npz", allow_pickle=False, **arrays)


if __name__ == "__main__":
    main()
