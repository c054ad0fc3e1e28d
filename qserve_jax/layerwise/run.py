"""A float model -> a native checkpoint, one layer at a time.

Bytes on the device beside the compiled programs, for a layer of P weights, hidden states of n
tokens, and inputs of at most K channels: the layer's weights in float32 about three times over
(12 P), the hidden states (4 n D in float32), the Hessians (4 sum K^2) and, while the widest is
factorised, six arrays of its size (24 K^2), or what one batch makes in its layer. For Llama-3-8B
(P = 218 M, K = 14336, n = 131072) that is 2.6 + 2.1 + 1.0 + 4.9 GB = 11 GB.
Operations: 2 n P a pass over the calibration set, up to six of them (57 TFLOP each, in the
calibration's dtype), 2 n sum K^2 for the Hessians (67 TFLOP, float32), about 4 K^3 for each factor,
and per channel 81 products dW H in the clip search (242 TFLOP, float32).
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from tqdm import tqdm

from qserve_jax.checkpoint.atomic import check_free
from qserve_jax.checkpoint.load import quantized_shapes
from qserve_jax.checkpoint.native import native_config, native_tensors
from qserve_jax.layerwise.layer import as_stored, embedded, quantize_layer, rotate_tree
from qserve_jax.layerwise.source import Source, layer_targets, top_targets
from qserve_jax.layerwise.work import Work, open_work
from qserve_jax.models.config import ModelConfig
from qserve_jax.models.layer_calibration import LayerCalibrator
from qserve_jax.quantization.recipes import Recipe
from qserve_jax.quantization.transforms import hadamard_rotation

PROCEDURE = 1
"""Raised where this package makes other bytes of the same settings, so that no run mixes them."""
BATCH_TOKENS = 4096
"""Calibration tokens that go through a layer at once."""


def quantize_checkpoint(
    output: str | os.PathLike[str],
    source: Source,
    recipe: Recipe,
    tokens: np.ndarray | None,
    *,
    dtype: str = "float32",
    restart: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Quantise `source` into the new directory `output`, which `load_model` reads.

    tokens: i32[samples, T], the calibration set; None for recipes that need none.
    dtype: of the calibration's activations; weights are transformed and quantised in float32.
    restart: forget an unfinished output. progress: show a bar on stderr.

    Returns the report that is kept beside the weights: settings, and errors of each layer
    (`quantize_layer`). What a killed run has finished is kept, and the same call goes on with it;
    the result is the same to the byte on the same device and versions. Host memory: one layer.

    Raises CheckpointError as `open_work` does and for weights that are not finite, and ValueError
    where an activation is not, naming the layer, or tokens are not those of the model.
    """
    config, output = source.config, Path(output).expanduser()
    check_free(output)
    if recipe.needs_calibration:
        _check_tokens(config, tokens)
    else:
        tokens = None
    config = dataclasses.replace(config, centered_keys=recipe.center_keys)
    if recipe.rotate:
        config = dataclasses.replace(config, tie_embeddings=False)
    shapes = quantized_shapes(config, recipe.quant, config.dtype, strict=False)  # warns, once
    settings = _settings(source, recipe, tokens, dtype)
    with open_work(output, config.num_layers + 1, settings, restart=restart) as work:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*cannot be quantised as asked")
            _make_parts(work, source, config, recipe, tokens, dtype, progress)
        leaves = flatten_dict(shapes, sep="/")
        hf_config = native_config(leaves, config, recipe.quant, "safetensors")
        work.finish(hf_config, source.folder)
        return {"settings": settings, "parts": work.parts}


def _check_tokens(config: ModelConfig, tokens: np.ndarray | None) -> None:
    if tokens is None or not np.size(tokens):
        raise ValueError("the recipe needs calibration tokens: give i32[samples, T] of some text")
    if np.ndim(tokens) != 2 or not np.issubdtype(tokens.dtype, np.integer):
        found = f"{tokens.dtype}{list(tokens.shape)}"
        raise ValueError(f"calibration tokens are {found}, not i32[samples, T]: give whole windows")
    outside = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
    if outside.size:
        raise ValueError(
            f"calibration token {outside[0]} is not in the model's vocabulary of "
            f"{config.vocab_size}: use the tokenizer of this model"
        )


def _settings(
    source: Source, recipe: Recipe, tokens: np.ndarray | None, dtype: str
) -> dict[str, Any]:
    """All that the output depends on, as JSON values."""
    calibration = None
    if tokens is not None:
        calibration = {
            "samples": tokens.shape[0],
            "seq_len": tokens.shape[1],
            "dtype": dtype,
            "sha256": hashlib.sha256(np.ascontiguousarray(tokens).tobytes()).hexdigest(),
        }
    return {
        "model": source.fingerprint,
        "recipe": dataclasses.asdict(recipe),
        "calibration": calibration,
        "procedure": PROCEDURE,
        "jax": jax.__version__,
        "device": jax.local_devices()[0].device_kind,
    }


def _make_parts(
    work: Work,
    source: Source,
    config: ModelConfig,
    recipe: Recipe,
    tokens: np.ndarray | None,
    dtype: str,
    progress: bool,
) -> None:
    """What is not finished yet of the tables and the layers."""
    basis = None
    if recipe.rotate:
        basis = jnp.asarray(hadamard_rotation(config.hidden_size), jnp.float32)
    if not work.parts:
        work.add(dict(_top_tensors(source, config, basis)), {"part": "embedding, norm and head"})
    calibrator = None
    if tokens is not None and len(work.parts) < work.num_parts:
        hidden = _first_hidden(source, tokens, basis, dtype)
        calibrator = LayerCalibrator(config, hidden)
    done = len(work.parts) - 1
    options = {"unit": "layer", "disable": not progress}
    for i in tqdm(range(config.num_layers), "Quantizing layers", **options):
        if i < done and (calibrator is None or done == config.num_layers):
            continue
        layer = source.layer(i)
        layer = layer if basis is None else rotate_tree(layer, basis)
        if i >= done:
            quantized, errors = quantize_layer(config, layer, calibrator, recipe)
            tensors = _layer_tensors(config, i, as_stored(quantized, config.dtype))
            work.add(tensors, {"layer": i, **errors})
        if calibrator is not None and i + 1 < config.num_layers:
            calibrator.advance(layer)


def _top_tensors(source: Source, config: ModelConfig, basis: Any) -> Iterator[tuple[str, Any]]:
    """Embedding, final norm and head as they are to be stored, one table after the other."""
    for tree in _top_trees(source, config):
        tree = tree if basis is None else rotate_tree(tree, basis)
        for module, part in as_stored(tree, config.dtype).items():
            targets = top_targets(config, module).items()
            yield from native_tensors(flatten_dict({module: part}, sep="/"), targets)


def _top_trees(source: Source, config: ModelConfig) -> Iterator[dict[str, Any]]:
    """The norm comes with the table of the head, into which a rotation folds it."""
    embed, norm = source.top("embed"), source.top("final_norm")
    if config.tie_embeddings:
        yield {"embed": embed, "final_norm": norm}
        return
    yield {"embed": embed}
    head = embed if source.config.tie_embeddings else source.top("lm_head")
    yield {"lm_head": head, "final_norm": norm}


def _layer_tensors(config: ModelConfig, index: int, layer: dict[str, Any]) -> dict[str, np.ndarray]:
    leaves = flatten_dict(layer, sep="/")
    return dict(native_tensors(leaves, layer_targets(config, index).items()))


def _first_hidden(source: Source, tokens: np.ndarray, basis: Any, dtype: str) -> list[jax.Array]:
    """What enters the first layer, in batches of BATCH_TOKENS."""
    table = source.top("embed")["embedding"]
    rows = max(1, BATCH_TOKENS // tokens.shape[1])
    starts = range(0, len(tokens), rows)
    return [embedded(table, tokens[i : i + rows], basis).astype(dtype) for i in starts]
