"""What quantising a model of Llama-3-8B's size takes: seconds, device memory, by part.

    python scripts/quantize_8b.py --output DIR [--shape llama3-8b] [--recipe qoq-g128]

Random weights and tokens; made layer by layer on the device, or, with --weights DIR, written there
as a Hugging Face checkpoint of bfloat16 first and read back, as the command does. A run that is cut
off goes on when started again; its seconds are added up in --save, with those of the runs before.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from qserve_jax import _cli
from qserve_jax.benchmarks.provenance import provenance
from qserve_jax.checkpoint.atomic import atomic_folder, write_json, write_shards
from qserve_jax.checkpoint.export import config_to_hf
from qserve_jax.checkpoint.native import native_tensors
from qserve_jax.layerwise import open_source, quantize_checkpoint
from qserve_jax.layerwise.source import layer_targets, one_layer, top_targets
from qserve_jax.models import ModelConfig, param_shapes
from qserve_jax.quantization.recipes import RECIPES, find_recipe
from qserve_jax.runtime.device_memory import peak_bytes

LLAMA3_8B = ModelConfig(
    model_type="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
)
SHAPES = {
    "llama3-8b": LLAMA3_8B,
    "small": dataclasses.replace(
        LLAMA3_8B,
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=1792,
        num_layers=4,
        num_heads=4,
        num_kv_heads=1,
    ),
}


@dataclasses.dataclass(frozen=True)
class RandomSource:
    """Weights of a normal distribution, std 0.02, made when asked for (`layerwise.Source`)."""

    config: ModelConfig
    folder: Path | None = None
    fingerprint: str = "random weights, seed 0"

    @property
    def nbytes(self) -> int:
        """In 16 bits."""
        shapes: Any = flatten_dict(param_shapes(self.config)).values()
        return 2 * sum(int(np.prod(shape)) for shape in shapes)

    def layer(self, index: int) -> dict[str, Any]:
        shapes = flatten_dict({"layers": param_shapes(one_layer(self.config))["layers"]}, sep="/")
        return unflatten_dict(_random(tuple(shapes.items()), jnp.float32, index), sep="/")

    def top(self, name: str) -> dict[str, Any]:
        shapes = flatten_dict({name: param_shapes(self.config)[name]}, sep="/")
        return unflatten_dict(_random(tuple(shapes.items()), self.config.dtype, 10**6), sep="/")[
            name
        ]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _random(shapes: tuple[tuple[str, tuple[int, ...]], ...], dtype: Any, index: int) -> Any:
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), index), len(shapes))
    return {
        path: jnp.ones(shape, dtype)
        if path.endswith("scale")
        else 0.02 * jax.random.normal(key, shape, dtype)
        for key, (path, shape) in zip(keys, shapes, strict=True)
    }


def write_weights(folder: Path, config: ModelConfig) -> None:
    """A Hugging Face checkpoint of `RandomSource`'s weights in bfloat16."""

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        source = RandomSource(config)
        trees = [(top_targets(config, n), {n: source.top(n)}) for n in ("embed", "final_norm")]
        trees += [(top_targets(config, "lm_head"), {"lm_head": source.top("lm_head")})]
        layers = ((layer_targets(config, i), source.layer(i)) for i in range(config.num_layers))
        for targets, tree in (*trees, *layers):
            leaves = flatten_dict(jax.tree.map(lambda w: w.astype(jnp.bfloat16), tree), sep="/")
            yield from native_tensors(leaves, targets.items())

    with atomic_folder(folder) as partial:
        write_shards(partial, tensors())
        write_json(partial / "config.json", config_to_hf(config))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="llama3-8b")
    parser.add_argument("--recipe", choices=RECIPES, default="qoq-g128")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--calib-dtype", choices=_cli.DTYPES, default="float32")
    parser.add_argument("--weights", type=Path, help="folder for a checkpoint to read")
    parser.add_argument("--save", type=Path, help="JSON of all runs towards this output")
    parser.add_argument("--discard", action="store_true", help="remove the output at the end")
    args = parser.parse_args()
    config = SHAPES[args.shape]
    _cli.leave_matmuls_to_cublas()
    if args.weights is not None and not args.weights.exists():
        write_weights(args.weights, config)
    _cli.enable_compilation_cache()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit's run counts, too
    start = time.perf_counter()
    source = RandomSource(config) if args.weights is None else open_source(args.weights)
    size = (args.samples, args.seq_len)
    tokens = np.random.default_rng(42).integers(0, config.vocab_size, size).astype(np.int32)
    finished = False
    try:
        recipe = find_recipe(args.recipe)
        quantize_checkpoint(
            args.output, source, recipe, tokens, dtype=args.calib_dtype, progress=True
        )
        finished = True
    finally:
        seconds = time.perf_counter() - start
        run = {"seconds": seconds, "finished": finished, "peak_bytes": peak_bytes()}
        save(args, run)
    if args.discard:
        shutil.rmtree(args.output)


def save(args: argparse.Namespace, run: dict[str, Any]) -> None:
    """Print the run and add it to those of --save."""
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("save", "output", "discard")}
    content = {"settings": settings, **provenance(), "runs": []}
    if args.save is not None and args.save.exists():
        content = json.loads(args.save.read_text())
    content["runs"].append(run)
    content["total_seconds"] = sum(r["seconds"] for r in content["runs"])
    print(
        f"{run['seconds']:.1f} s, in all {content['total_seconds']:.1f} s; peak "
        f"{run['peak_bytes'] / 2**30:.2f} GiB"
    )
    if args.save is not None:
        args.save.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
