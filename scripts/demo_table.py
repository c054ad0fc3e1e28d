"""What quantisation costs the demo model: held-out perplexity of each precision, as a table.

Prints markdown and writes the rows to docs/results/demo_perplexity.json. The held-out stories are
those that scripts/train_demo.py never looked at; --data is the same folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
from tinystories import held_out, join_stories, load_stories
from tokenizers import Tokenizer

from qserve_jax import QuantConfig, quantize_params
from qserve_jax.benchmarks.provenance import ROOT, provenance
from qserve_jax.checkpoint import LoadedModel, load_model
from qserve_jax.models import CausalLM
from qserve_jax.runtime.perplexity import Perplexity, loss_difference

ROWS = {
    "float": QuantConfig.preset("w16a16kv16"),
    "W4A8KV4 g128": QuantConfig.preset("w4a8kv4"),
    "W4A8KV4 per channel": QuantConfig.preset("w4a8kv4", group_size=-1),
    "W4A8KV8 g128": QuantConfig.preset("w4a8kv8"),
    "W8A8KV8": QuantConfig.preset("w8a8kv8"),
}
NOTE = (
    "Round to nearest; every query attends to the quantised K and V. ± is one standard error: of "
    "perplexity from the choice of stories, which all rows share; of Δ from differences window by "
    "window."
)


def measure(loaded: LoadedModel, tokens: Any, config: QuantConfig) -> Perplexity:
    """Held-out perplexity of the float model, quantised as `config` says."""
    params = jax.jit(quantize_params, static_argnums=1)(loaded.params, config)
    model = CausalLM(loaded.config, act_bits=config.act_bits)
    return held_out(model, params, tokens, config.kv_bits)


def make_rows(results: dict[str, Perplexity]) -> list[dict[str, Any]]:
    """One dict per precision: perplexity, and Δ against float in per cent and in nats per token."""
    exact = next(iter(results.values()))
    rows = []
    for name, result in results.items():
        change, error = loss_difference(result, exact)
        rows.append(
            {
                "precision": name,
                "perplexity": result.value,
                "standard_error": result.standard_error,
                "change_percent": 100 * (result.value / exact.value - 1),
                "loss": result.loss,
                "loss_change": change,
                "loss_change_standard_error": error,
                "num_tokens": result.num_tokens,
            }
        )
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table for the README."""
    lines = ["| precision | held-out perplexity | Δ | Δ loss, nats/token |", "|---|---|---|---|"]
    for i, row in enumerate(rows):
        change = f"{row['change_percent']:+.2f} %"
        loss = f"{row['loss_change']:+.4f} ± {row['loss_change_standard_error']:.4f}"
        perplexity = f"{row['perplexity']:.3f} ± {row['standard_error']:.3f}"
        shown = (row["precision"], perplexity, *((change, loss) if i else ("", "")))
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the two excerpts")
    parser.add_argument("--model", type=Path, default=ROOT / "qserve_jax/assets/demo")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results/demo_perplexity.json")
    args = parser.parse_args()
    try:
        stories = load_stories(args.data).test
        loaded = load_model(args.model, precision="w16a16kv16", dtype="float32")
        if loaded.tokenizer is None:
            raise ValueError(f"{args.model} has no tokenizer: give the model of train_demo.py")
    except ValueError as error:
        parser.error(str(error))
    tokens = join_stories(Tokenizer.from_file(str(args.model / "tokenizer.json")), stories)
    results = {name: measure(loaded, tokens, config) for name, config in ROWS.items()}
    rows = make_rows(results)
    print(f"{markdown(rows)}\n\n{len(stories)} stories, {rows[0]['num_tokens']} tokens. {NOTE}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    content = {"note": NOTE, **provenance(), "rows": rows}
    args.output.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
