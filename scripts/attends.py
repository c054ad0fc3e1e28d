"""What a query may see of its own call's K and V: perplexity of attends="full" and "quantized".

Windows of held-out text: the first half is prefilled in one call, the second decoded token by
token, each given the true one before. Prints markdown and writes docs/results/demo_attends.json.
"""

from __future__ import annotations

import argparse
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
from qserve_jax.models import CausalLM, decode_step, prefill
from qserve_jax.runtime import init_cache

ROWS = {"KV16": (16, "full"), "KV4 full": (4, "full"), "KV4 quantized": (4, "quantized")}
PAGE = 64


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def token_losses(
    model: CausalLM, params: Any, windows: jax.Array, kv_bits: int, attends: str
) -> jax.Array:
    """windows i32[B, T] -> nats of tokens 1..T-1, f32[B, T-1]: the first half as prefill sees
    them, the others as decoding does."""
    b, t = windows.shape
    half, pages = t // 2, -(-t // PAGE)
    cache = init_cache(
        model.config,
        num_pages=b * pages,
        page_size=PAGE,
        kv_bits=kv_bits,
        dtype=params["embed"]["embedding"].dtype,
    )
    table = jnp.arange(b * pages, dtype=jnp.int32).reshape(b, pages)
    lens = jnp.full(b, half, jnp.int32)
    cache, first = prefill(
        model, params, cache, windows[:, :half], table, lens, attends=attends, all_logits=True
    )

    def step(carry, tokens):
        cache, lens = carry
        cache, logits = decode_step(model, params, cache, tokens, table, lens + 1, attends=attends)
        return (cache, lens + 1), logits

    _, rest = jax.lax.scan(step, (cache, lens), windows[:, half:-1].T)
    logits = jnp.concatenate([first, jnp.swapaxes(rest, 0, 1)], axis=1)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.take_along_axis(logprobs, windows[:, 1:, None], axis=-1)[..., 0]


def make_rows(losses: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """losses f64[windows, T - 1] -> a dict per row, for the prompt and for what was decoded; Δ is
    against the 16-bit cache, with its standard error over windows."""
    exact, rows = losses["KV16"], []
    half = (exact.shape[1] + 1) // 2
    for name, found in losses.items():
        row: dict[str, Any] = {"attends": name}
        for part, where in (("prompt", slice(0, half)), ("decoded", slice(half, None))):
            change = (found - exact)[:, where].mean(axis=1)
            row |= {
                f"{part}_perplexity": float(np.exp(found[:, where].mean())),
                f"{part}_loss_change": float(change.mean()),
                f"{part}_standard_error": float(change.std(ddof=1) / len(change) ** 0.5),
            }
        change = (losses["KV4 quantized"] - losses["KV4 full"])[:, half:].mean(axis=1)
        row["quantized_less_full"] = float(change.mean())
        row["quantized_less_full_standard_error"] = float(change.std(ddof=1) / len(change) ** 0.5)
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| cache, attends | prompt | Δ loss | decoded | Δ loss |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [row["attends"]]
        for part in ("prompt", "decoded"):
            change, error = row[f"{part}_loss_change"], row[f"{part}_standard_error"]
            cells += [f"{row[f'{part}_perplexity']:.3f}", f"{change:+.4f} ± {error:.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the two excerpts")
    parser.add_argument("--model", type=Path, default=ROOT / "qserve_jax/assets/demo")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, help="at most this many (default: all)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results/demo_attends.json")
    args = parser.parse_args()
    loaded = load_model(args.model, precision="w4a8kv4")
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    tokens = np.asarray(join_stories(tokenizer, load_stories(args.data).test))
    count = min(len(tokens) // args.window, args.windows or len(tokens))
    windows = jnp.asarray(tokens[: count * args.window].reshape(count, args.window), jnp.int32)
    losses = {
        name: np.asarray(token_losses(loaded.model, loaded.params, windows, *how), np.float64)
        for name, how in ROWS.items()
    }
    rows = make_rows(losses)
    print(f"{markdown(rows)}\n\n{count} windows of {args.window} tokens, W4A8 g128.")
    content = {**provenance(), "windows": count, "window": args.window, "rows": rows}
    args.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
