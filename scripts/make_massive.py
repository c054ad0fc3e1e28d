"""A model with a direction of massive size in its residual stream, fitted from the demo model.

The demo's residual stream has no such direction (its largest holds an eighth of the variance);
large language models have one. It is added along the direction that the demo uses least: at every
norm its size is to be `--ratio` times that of the rest of the token's stream, so that the norm sees
the rest as before, times a constant, which the readers' gains take back. Embeddings can say so
exactly; after that o_proj and down_proj of each layer, one after the other, learn to write what is
missing, by ridge regression from their own inputs over the training stories. No reader sees the
direction itself. Nothing is random. Writes DIR/params.npz, the canonical tree with all norms
folded; `qoq_tables.py --massive DIR` reads it, and makes it where it is not there.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tinystories import join_stories, load_stories
from tokenizers import Tokenizer

from qserve_jax.benchmarks.provenance import ROOT
from qserve_jax.checkpoint import LoadedModel, load_model
from qserve_jax.models import CausalLM, ModelConfig
from qserve_jax.models.llama import decoder_layer, full_attention
from qserve_jax.models.rope import rope_frequencies, rope_turn
from qserve_jax.quantization.transforms import fold_norms

DEMO = ROOT / "qserve_jax/assets/demo"
RATIO = 16.0
RIDGE = 0.1
TOKENS = 16384
READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
WRITERS = ("o_proj", "down_proj")


def massive_model(demo: LoadedModel, params: Any) -> LoadedModel:
    """The demo with biases to write the direction with, a head of its own, and `params`."""
    config = massive_config(demo.config)
    return dataclasses.replace(demo, config=config, model=CausalLM(config), params=params)


def massive_config(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, tie_embeddings=False, o_bias=True, mlp_bias=True)


def add_direction(
    demo: LoadedModel, tokens: Any, ratio: float = RATIO, ridge: float = RIDGE
) -> Any:
    """The folded demo's tree f32, with the direction, fitted on tokens i32[B, T]."""
    base = jax.tree.map(np.asarray, fold_norms(demo.params))
    direction = least_used(LayerByLayer(demo.config, tokens), base)
    params = silenced(base, direction, np.sqrt(1 + ratio**2), massive_config(demo.config))
    table = params["embed"]["embedding"]
    table += ratio * np.linalg.norm(table, axis=1, keepdims=True) * direction
    layers, run = params["layers"], LayerByLayer(massive_config(demo.config), tokens)
    x = table[np.asarray(tokens)]
    for i in range(demo.config.num_layers):
        for name, parts in (("o_proj", "o_proj"), ("down_proj", "whole")):
            y, inputs = run(layers, x, i, parts)
            along = y @ direction
            rest = np.linalg.norm(y - along[..., None] * direction, axis=-1)
            weight, bias = ridge_regression(inputs[name], ratio * rest - along, ridge)
            layers[name]["kernel"][i] += np.outer(weight, direction)
            layers[name]["bias"][i] = bias * direction
        x, _ = run(layers, x, i, "whole")
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


def silenced(params: Any, direction: np.ndarray, gain: float, config: ModelConfig) -> Any:
    """Nobody writes or reads `direction`; readers times `gain`; the biases of `config`, zero."""
    project = np.eye(len(direction)) - np.outer(direction, direction)
    layers = dict(params["layers"])
    for name in READERS:
        layers[name] = {"kernel": gain * project @ layers[name]["kernel"]}
    for name in WRITERS:
        layers[name] = {"kernel": layers[name]["kernel"] @ project}
    sizes = {"o_proj": config.hidden_size, "down_proj": config.hidden_size}
    sizes |= dict.fromkeys(("gate_proj", "up_proj"), config.intermediate_size)
    for name, size in sizes.items():
        layers[name]["bias"] = np.zeros((config.num_layers, size))
    embedding = params["embed"]["embedding"] @ project
    head = gain * params["lm_head"]["embedding"] @ project
    changed = {"layers": layers, "embed": {"embedding": embedding}, "lm_head": {"embedding": head}}
    return {**params, **changed}


class LayerByLayer:
    """run(layers, x f[B, T, D], i, "o_proj" | "whole") -> (the stream behind o_proj of layer i or
    behind the whole layer f64[B, T, D], the layer's matmul inputs by name)."""

    def __init__(self, config: ModelConfig, tokens: Any):
        model = CausalLM(config)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        turn = rope_turn(positions, *rope_frequencies(config))
        attention = full_attention(config, positions, 16)

        @jax.jit
        def run(p, x, i):
            taps = {}
            tap = lambda name, value: taps.update({name: value()})  # noqa: E731
            y, _ = decoder_layer(model, p, x, i, turn, attention, None, tap)
            return y, {name: taps[name] for name in WRITERS}

        self.tokens, self._run = np.asarray(tokens), run

    def __call__(self, layers: Any, x: Any, i: int, parts: str) -> tuple[np.ndarray, Any]:
        p = jax.tree.map(lambda w: jnp.asarray(w[i], jnp.float32), layers)
        if parts == "o_proj":
            p["down_proj"] = jax.tree.map(jnp.zeros_like, p["down_proj"])
        y, inputs = self._run(p, jnp.asarray(x, jnp.float32), i)
        return np.asarray(y, np.float64), inputs


def least_used(run: LayerByLayer, params: Any) -> np.ndarray:
    """Unit f64[D]: where all the norms' inputs together, each of one size, have least variance."""
    x, shares = params["embed"]["embedding"][run.tokens], 0.0
    for i in range(len(params["layers"]["o_proj"]["kernel"])):
        for stream in (x, run(params["layers"], x, i, "o_proj")[0]):
            flat = np.asarray(stream, np.float64).reshape(-1, stream.shape[-1])
            shares = shares + flat.T @ flat / np.square(flat).sum()
        x, _ = run(params["layers"], x, i, "whole")
    return np.linalg.eigh(shares)[1][:, 0]


def ridge_regression(x: Any, y: np.ndarray, ridge: float) -> tuple[np.ndarray, float]:
    """(w, b) with x @ w + b ~= y for x [..., K]; `ridge` times the mean variance of x is the price
    of w^2."""
    x, y = np.asarray(x, np.float64).reshape(y.size, -1), y.reshape(-1)
    mean, centred = x.mean(axis=0), x - x.mean(axis=0)
    moment = centred.T @ centred / len(x)
    price = ridge * np.trace(moment) / len(moment) * np.eye(len(moment))
    w = np.linalg.solve(moment + price, centred.T @ (y - y.mean()) / len(x))
    return w, y.mean() - mean @ w


def save_massive(folder: Path, params: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    arrays = {n: np.asarray(x) for n, (_, x) in zip(names, leaves, strict=True)}
    np.savez(folder / "params.npz", allow_pickle=False, **arrays)


def load_massive(folder: Path) -> Any:
    """The canonical tree f32 that this script wrote to `folder`."""
    tree: dict[str, Any] = {}
    with np.load(folder / "params.npz") as arrays:
        for path, value in arrays.items():
            *parents, name = path.split("/")
            at = tree
            for parent in parents:
                at = at.setdefault(parent, {})
            at[name] = jnp.asarray(value, jnp.float32)
    return tree


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the two excerpts")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ratio", type=float, default=RATIO)
    parser.add_argument("--ridge", type=float, default=RIDGE)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    text = join_stories(tokenizer, load_stories(args.data).train)
    demo = load_model(DEMO, precision="w16a16kv16", dtype="float32")
    tokens = text[:TOKENS].reshape(-1, 512)
    save_massive(args.output, add_direction(demo, tokens, args.ratio, args.ridge))


if __name__ == "__main__":
    main()
