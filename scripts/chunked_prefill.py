"""What it costs to prefill a prompt in chunks: each chunk sees the earlier ones as the cache has
them, quantised, where one shot sees the whole prompt unquantised.

    python scripts/chunked_prefill.py --data FOLDER [--output FILE]

Windows of 1024 tokens of held-out stories through the demo model in float, in one shot and in
chunks, over caches of 16, 8 and 4 bits. Written to docs/results/chunked_prefill.json.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tinystories import join_stories, load_stories
from tokenizers import Tokenizer

from qserve_jax.benchmarks.provenance import ROOT, provenance
from qserve_jax.checkpoint import load_model
from qserve_jax.models import CausalLM
from qserve_jax.models.llama import prefill
from qserve_jax.runtime import init_cache

WINDOW, WINDOWS, BATCH = 1024, 8, 4
CHUNKS = (256, 128)  # as 8192 tokens in chunks of 2048 and 1024
CACHES = ((16, "full"), (8, "full"), (4, "full"), (4, "quantized"))
NOTE = (
    "Loss in nats per token of the next token, all positions; its standard error is of the "
    "differences window by window. logits: relative Frobenius difference to one shot with the same "
    "attends."
)


@functools.partial(jax.jit, static_argnames=("model", "kv_bits", "chunk", "attends"))
def run_chunks(
    model: CausalLM, params: Any, tokens: jax.Array, *, kv_bits: int, chunk: int, attends: str
) -> jax.Array:
    """logits f32[B, T, V] of tokens i32[B, T], prefilled `chunk` at a time."""
    b, t = tokens.shape
    each = -(-t // 64)
    dtype = params["embed"]["embedding"].dtype
    cache = init_cache(model.config, num_pages=b * each, kv_bits=kv_bits, dtype=dtype)
    table = jnp.arange(b * each, dtype=jnp.int32).reshape(b, each)
    logits = []
    for start in range(0, t, chunk):
        lens = jnp.full(b, min(start + chunk, t), jnp.int32)
        cache, found = prefill(
            *(model, params, cache, tokens[:, start : start + chunk], table, lens),
            attends=attends,
            cached_pages=-(-start // 64),
            all_logits=True,
        )
        logits.append(found)
    return jnp.concatenate(logits, axis=1)


@jax.jit
def compare(logits: jax.Array, whole: jax.Array, tokens: jax.Array) -> dict[str, jax.Array]:
    """Of each window: its loss, and the squared norms of the difference and of `whole`."""
    scores = jax.nn.log_softmax(logits[:, :-1])
    chosen = jnp.take_along_axis(scores, tokens[:, 1:, None], axis=2)[..., 0]
    return {
        "loss": -chosen.mean(1),
        "difference": jnp.square(logits - whole).sum((1, 2)),
        "norm": jnp.square(whole).sum((1, 2)),
    }


def measure(model: CausalLM, params: Any, windows: np.ndarray) -> Iterator[dict[str, Any]]:
    """A row for each cache, `attends` and chunk, beside one shot; windows i32[n, T]."""
    batches = [jnp.asarray(part) for part in np.split(windows, len(windows) // BATCH)]
    for kv_bits, attends in CACHES:
        options = {"kv_bits": kv_bits, "attends": attends}
        run = functools.partial(run_chunks, model, params, **options)
        one_shot = [run(tokens, chunk=WINDOW) for tokens in batches]
        whole: dict[str, np.ndarray] = {}
        for chunk in (WINDOW, *CHUNKS):
            parts = []
            for tokens, one in zip(batches, one_shot, strict=True):
                found = one if chunk == WINDOW else run(tokens, chunk=chunk)
                parts.append(jax.device_get(compare(found, one, tokens)))
            joined = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
            whole = whole or joined
            yield options | {"chunk": chunk} | summary(joined, whole)


def summary(found: dict[str, np.ndarray], whole: dict[str, np.ndarray]) -> dict[str, float]:
    """Means over windows."""
    change = found["loss"] - whole["loss"]
    return {
        "loss": float(found["loss"].mean()),
        "loss_change": float(change.mean()),
        "loss_change_standard_error": float(change.std(ddof=1) / len(change) ** 0.5),
        "logits": float((found["difference"].sum() / found["norm"].sum()) ** 0.5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the two excerpts")
    parser.add_argument("--model", type=Path, default=ROOT / "qserve_jax/assets/demo")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results/chunked_prefill.json")
    args = parser.parse_args()
    try:
        stories = load_stories(args.data).test
    except ValueError as error:
        parser.error(str(error))
    tokens = join_stories(Tokenizer.from_file(str(args.model / "tokenizer.json")), stories)
    windows = tokens[: WINDOWS * WINDOW].reshape(WINDOWS, WINDOW)
    loaded = load_model(args.model, precision="w16a16kv16", dtype="float32")
    rows, origin = [], provenance()  # before its own output makes the tree a changed one
    for row in measure(loaded.model, loaded.params, windows):
        rows.append(row)
        print(json.dumps(row), flush=True)
        content = {"note": NOTE, **origin, "window": WINDOW, "windows": WINDOWS, "rows": rows}
        args.output.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
