"""What the choices of `quantize` are worth on the demo model: docs/results/quantize_options.json.

Level 1 rounded or not, value heads rotated or not, float or quantised layers before the one that is
calibrated, and the dtype of the calibration's activations. Loss on all held-out stories against the
recipe as it is, paired window by window.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tinystories import join_stories, load_stories
from tokenizers import Tokenizer

from qserve_jax.benchmarks.provenance import ROOT, provenance
from qserve_jax.checkpoint import load_model
from qserve_jax.layerwise.layer import quantize_layer
from qserve_jax.models import CausalLM, ModelConfig
from qserve_jax.models.calibration import through_layers
from qserve_jax.models.layer_calibration import LayerCalibrator
from qserve_jax.quantization.recipes import QOQ_G128, QOQ_PER_CHANNEL, Recipe, find_recipe
from qserve_jax.quantization.transforms import rotate
from qserve_jax.runtime.perplexity import Perplexity, loss_difference, perplexity

DEMO = ROOT / "qserve_jax/assets/demo"
BASES = {"rtn": find_recipe("rtn"), "qoq-g128": QOQ_G128, "qoq-per-channel": QOQ_PER_CHANNEL}


@dataclasses.dataclass(frozen=True)
class Bench:
    """The float model, calibration batches i32[B, T] and held-out tokens."""

    config: ModelConfig
    params: Any
    batches: list[np.ndarray]
    tokens: np.ndarray

    def run(self, recipe: Recipe, dtype: str = "float32", quantized_before=False) -> Perplexity:
        """Held-out loss after a recipe, layer by layer."""
        params, config = self.params, self.config
        if recipe.rotate:
            params = jax.jit(rotate)(params)
            config = dataclasses.replace(config, tie_embeddings=False)
        table = params["embed"]["embedding"]
        hidden = [table[batch].astype(dtype) for batch in self.batches]
        calibrator = LayerCalibrator(config, hidden)
        layers = []
        for i in range(config.num_layers):
            layer = {"layers": jax.tree.map(lambda w, i=i: w[i : i + 1], params["layers"])}
            used = calibrator if recipe.needs_calibration else None
            quantized, _ = quantize_layer(config, layer, used, recipe)
            layers.append(quantized["layers"])
            if quantized_before:
                calibrator.hidden = [advance(config, quantized, x) for x in calibrator.hidden]
            else:
                calibrator.advance(layer)
        whole = {**params, "layers": jax.tree.map(lambda *x: jnp.concatenate(x), *layers)}
        return self.loss(CausalLM(config), whole, 4)

    def loss(self, model: CausalLM, params: Any, kv_bits: int) -> Perplexity:
        return perplexity(model, params, self.tokens, seq_len=512, batch_size=4, kv_bits=kv_bits)


@functools.partial(jax.jit, static_argnums=0)
def advance(config: ModelConfig, quantized: Any, x: jax.Array) -> jax.Array:
    return through_layers(CausalLM(config), quantized["layers"], x, kv_bits=4)[0]


def options(name: str, recipe: Recipe) -> dict[str, tuple[Any, ...]]:
    """What is measured beside a recipe: name -> arguments of `Bench.run`."""
    rounded = recipe.without(quant=dataclasses.replace(recipe.quant, round_level_one=True))
    if name == "rtn":
        return {"level 1 rounded": (rounded,)}
    found = {
        "value heads rotated": (recipe.without(rotate_values=True),),
        "quantised layers before": (recipe, "float32", True),
        "bfloat16 activations": (recipe, "bfloat16"),
    }
    return found | ({"level 1 rounded": (rounded,)} if name == "qoq-g128" else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the two excerpts")
    save = ROOT / "docs/results/quantize_options.json"
    parser.add_argument("--save", type=Path, default=save)
    args = parser.parse_args()
    stories = load_stories(args.data)
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    train = join_stories(tokenizer, stories.train)[: 32 * 512].reshape(4, 8, 512)
    held_out = join_stories(tokenizer, stories.test)
    loaded = load_model(DEMO, precision="w16a16kv16", dtype="float32")
    bench = Bench(loaded.config, loaded.params, list(train), held_out)
    sizes = {"held_out_tokens": len(held_out), "calibration_tokens": int(train.size)}
    content = {"note": (__doc__ or "").splitlines()[0], **sizes, **provenance(), "rows": []}
    exact = bench.loss(CausalLM(bench.config), bench.params, 16)

    def add(name: str, option: str, result: Perplexity, against: Perplexity) -> None:
        change, error = loss_difference(result, against)
        row = {"recipe": name, "option": option, "perplexity": result.value}
        row |= {"loss_change": change, "loss_change_standard_error": error}
        content["rows"].append(row)
        print(f"{name}, {option}: {result.value:.4f} ({change:+.5f} ± {error:.5f})", flush=True)
        args.save.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    for name, recipe in BASES.items():
        base = bench.run(recipe)
        add(name, "as it is, against float", base, exact)
        for option, arguments in options(name, recipe).items():
            add(name, option, bench.run(*arguments), base)


if __name__ == "__main__":
    main()
