"""What an output head in 8 bits loses: held-out perplexity of the demo model in W4A8KV4.

Prints markdown and writes docs/results/demo_lm_head.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from attends import ROOT
from demo_table import make_rows, markdown
from tinystories import held_out, join_stories, load_stories
from tokenizers import Tokenizer

from qserve_jax.benchmarks.provenance import provenance
from qserve_jax.checkpoint import load_model
from qserve_jax.runtime.int8_head import with_int8_head


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the two excerpts")
    parser.add_argument("--model", type=Path, default=ROOT / "qserve_jax/assets/demo")
    parser.add_argument("--stories", type=int, help="at most this many (default: all held out)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results/demo_lm_head.json")
    args = parser.parse_args()
    loaded = load_model(args.model, precision="w4a8kv4")
    stories = load_stories(args.data).test[: args.stories]
    tokens = join_stories(Tokenizer.from_file(str(args.model / "tokenizer.json")), stories)
    results = {
        name: held_out(model.model, model.params, tokens, kv_bits=4)
        for name, model in (
            ("W4A8KV4, head in bfloat16", loaded),
            ("W4A8KV4, head in 8 bits", with_int8_head(loaded)),
        )
    }
    rows = make_rows(results)
    print(f"{markdown(rows)}\n\n{len(stories)} stories, {rows[0]['num_tokens']} tokens.")
    args.output.write_text(json.dumps({**provenance(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
