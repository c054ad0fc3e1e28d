"""What QoQ mends and what each of its steps is worth, on the demo model: two tables.

outliers: function-preserving outliers (qserve_jax/quantization/transforms/outliers.py) put into
  the model, then float, round to nearest, each transform alone, and the recipes.
ablation: the published order, W8A8 -> W4 -> rotation -> clip -> KV4 -> SmoothAttention -> group ->
  reorder.

Perplexity on the held-out stories that scripts/train_demo.py never looked at, calibrated on stories
that it trained on. Writes docs/results/qoq_{outliers,ablation}.json and .md. Residual outliers
need a model with a massive direction, which scripts/make_massive.py makes; without --massive they
are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from make_massive import load_massive
from tinystories import join_stories, load_stories
from tokenizers import Tokenizer

from qserve_jax import QuantConfig
from qserve_jax.benchmarks.provenance import ROOT, provenance
from qserve_jax.checkpoint import load_model
from qserve_jax.models import CausalLM, ModelConfig
from qserve_jax.models.calibration import Calibrator
from qserve_jax.quantization.recipes import (
    QOQ_G128,
    QOQ_PER_CHANNEL,
    Recipe,
    quantize_with_recipe,
)
from qserve_jax.quantization.transforms import fold_norms, rotate
from qserve_jax.quantization.transforms.outliers import (
    hidden_outliers,
    key_outliers,
    residual_outliers,
    salient_groups,
    value_outliers,
)
from qserve_jax.runtime.perplexity import Perplexity, loss_difference, perplexity

DEMO = ROOT / "qserve_jax/assets/demo"
FLOAT = Recipe(quant=QuantConfig.preset("w16a16kv16"))
GROUPS = QuantConfig()
CHANNELS = QuantConfig(group_size=-1)


@dataclasses.dataclass
class Bench:
    """A model to quantise again and again, and the texts: calibration batches, held-out tokens."""

    config: ModelConfig
    batches: list[jax.Array]
    tokens: np.ndarray

    def run(self, params: Any, recipe: Recipe) -> Perplexity:
        """Held-out perplexity after `recipe`, with its activations and cache."""
        calibrator = Calibrator(CausalLM(self.config), self.batches)
        quantized = quantize_with_recipe(self.config, params, calibrator, recipe)
        config = dataclasses.replace(self.config, tie_embeddings="lm_head" not in quantized)
        model = CausalLM(config, act_bits=recipe.quant.act_bits)
        return perplexity(
            model, quantized, self.tokens, seq_len=512, batch_size=4, kv_bits=recipe.quant.kv_bits
        )


def row(name: str, result: Perplexity, exact: Perplexity, group_size: int | str) -> dict[str, Any]:
    change, error = loss_difference(result, exact)
    print(f"  {name}: {result.value:.3f} ({change:+.4f} ± {error:.4f})", flush=True)
    return {
        "name": name,
        "group_size": group_size,
        "perplexity": result.value,
        "loss_change": change,
        "loss_change_standard_error": error,
    }


def ablation_recipes() -> dict[str, Recipe]:
    """The rows in the published order; each has what the ones before it have, but for the clip
    search, which groups replace. Output smoothing and GPTQ, absent there, come last."""
    w8 = Recipe(quant=QuantConfig(weight_bits=8, kv_bits=8))
    w4 = Recipe(quant=QuantConfig(group_size=-1, kv_bits=8))
    rotation = w4.without(rotate=True)
    clip = rotation.without(clip=True)
    kv4 = clip.without(quant=CHANNELS)
    smooth = kv4.without(smooth_keys="search")
    group = smooth.without(clip=False, quant=GROUPS)
    reorder = group.without(reorder=True)
    return {
        "W8A8KV8": w8,
        "W4A8KV8 per channel": w4,
        "+ rotation": rotation,
        "+ clip search": clip,
        "+ KV4": kv4,
        "+ SmoothAttention": smooth,
        "+ groups of 128 (no clip search)": group,
        "+ reordering": reorder,
        "+ output smoothing": reorder.without(smooth_outputs=0.05),
        "+ GPTQ = qoq-g128": QOQ_G128,
        "qoq-per-channel": QOQ_PER_CHANNEL,
        "rtn W4A8KV4 g128": Recipe(),
        "rtn W4A8KV4 per channel": Recipe(quant=CHANNELS),
    }


def ablation(bench: Bench, params: Any) -> list[dict[str, Any]]:
    exact = bench.run(params, FLOAT)
    rows = [row("float", exact, exact, "")]
    for name, recipe in ablation_recipes().items():
        size = recipe.quant.group_size
        rows.append(row(name, bench.run(params, recipe), exact, size))
    return rows


SINGLE = {
    "rtn": {},
    "rotation only": {"rotate": True},
    "SmoothAttention only, alpha 0.5": {"smooth_keys": 0.5},
    "SmoothAttention only, search": {"smooth_keys": "search"},
    "output smoothing only": {"smooth_outputs": 0.05},
    "reordering only": {"reorder": True},
    "GPTQ only": {"gptq": True},
    "rotation and GPTQ": {"rotate": True, "gptq": True},
}


def outlier_rows(bench: Bench, params: Any, group_size: int, singles: Any) -> list[dict[str, Any]]:
    """float, RTN, single transforms at `group_size`, and both recipes, of one injected model."""
    exact = bench.run(params, FLOAT)
    rows = [row("float", exact, exact, "")]
    quant = QuantConfig(group_size=group_size)
    for name in singles:
        recipe = Recipe(quant=quant, **SINGLE[name])
        rows.append(row(name, bench.run(params, recipe), exact, group_size))
    for name, recipe in (("qoq-g128", QOQ_G128), ("qoq-per-channel", QOQ_PER_CHANNEL)):
        rows.append(row(name, bench.run(params, recipe), exact, recipe.quant.group_size))
    return rows


def kv4_alone(bench: Bench, params: Any) -> list[dict[str, Any]]:
    """16-bit weights and activations, cache of 16 or 4 bits, with and without SmoothAttention."""
    exact = bench.run(params, FLOAT)
    quant = QuantConfig.preset("w4a16kv4")
    quant = dataclasses.replace(quant, weight_bits=16)
    rows = [row("KV16", exact, exact, "")]
    for name, keys in (("KV4", None), ("KV4, alpha 0.5", 0.5), ("KV4, search", "search")):
        recipe = Recipe(smooth_keys=keys, quant=quant)
        rows.append(row(name, bench.run(params, recipe), exact, ""))
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| | group | perplexity | Δ | Δ loss, nats/token |", "|---|---|---|---|---|"]
    exact = rows[0]["perplexity"]
    for r in rows:
        percent = f"{100 * (r['perplexity'] / exact - 1):+.2f} %"
        loss = f"{r['loss_change']:+.4f} ± {r['loss_change_standard_error']:.4f}"
        cells = (r["name"], r["group_size"], f"{r['perplexity']:.3f}", percent, loss)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def save(args: argparse.Namespace, name: str, title: str, tables: dict[str, Any]) -> None:
    """args.output/name.json and .md, written after each table: a stopped run keeps its rows."""
    folder = args.output
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"held_out_tokens": args.tokens, "calibration_tokens": args.batches * 8 * 512}
    content = {"note": title, **sizes, **provenance(), "tables": tables}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    texts = (
        f"{args.tokens or 'All'} held-out tokens in windows of 512; {sizes['calibration_tokens']} "
    )
    texts += "calibration tokens. Δ is against float in the same table, ± one standard error of it."
    parts = [f"## {heading}\n\n{markdown(rows)}" for heading, rows in tables.items()]
    (folder / f"{name}.md").write_text("\n\n".join([f"# {title}", texts, *parts]) + "\n")


def massive_direction(config: ModelConfig, params: Any, tokens: jax.Array) -> np.ndarray:
    """The direction f32[D] of the largest second moment of what layer 1 reads (norms folded)."""
    moment = Calibrator(CausalLM(config), [tokens]).statistics(params, hessians=True)
    hessian = np.asarray(moment.hessian["layers/q_proj"][1], np.float64)
    return np.linalg.eigh(hessian)[1][:, -1]


def injections(bench: Bench, params: Any, sizes: argparse.Namespace) -> dict[str, Any]:
    """name -> (injected params, group size of the single rows, which single rows)."""
    config = bench.config

    def keys(p):
        return key_outliers(p, config, sizes.keys, 2)

    def values(p):
        return value_outliers(p, config, sizes.values, 8)

    def hidden(p):
        return hidden_outliers(p, sizes.hidden, 192)

    def salient(p):
        stats = Calibrator(CausalLM(config), bench.batches).statistics(p)
        return salient_groups(p, stats, sizes.salient, channels=256)

    return {
        f"(a) post-RoPE keys, 2 pairs of 32 per head, c = {sizes.keys:g}": (keys, -1),
        f"(c) v–o, 8 of 64 channels per head, c = {sizes.values:g}": (values, -1),
        f"(c) up–down, 192 of 768 channels, c = {sizes.hidden:g}": (hidden, -1),
        f"(d) salient 256 of 768 channels over all groups, c = {sizes.salient:g}": (salient, 128),
        "all of (a), (c), (d)": (lambda p: keys(values(hidden(salient(p)))), 128),
    }


def outliers(bench: Bench, params: Any, args: argparse.Namespace) -> None:
    tables: dict[str, Any] = {}

    def add(name, rows):
        tables[name] = rows
        save(args, "qoq_outliers", "Outliers in the demo model, W4A8KV4", tables)

    names = list(SINGLE)[:-1]
    print("as trained", flush=True)
    add("as trained", outlier_rows(bench, params, -1, ["rtn"]))
    add("as trained, groups of 128", outlier_rows(bench, params, 128, ["rtn"])[:2])
    for name, (inject, group_size) in injections(bench, params, args).items():
        print(name, flush=True)
        injected = inject(params)
        add(name, outlier_rows(bench, injected, group_size, names))
        if name.startswith("(a)"):
            add("KV4 alone, (a)", kv4_alone(bench, injected))
    if args.massive is not None:
        residual_rows(bench, args, add)


def residual_rows(bench: Bench, args: argparse.Namespace, add: Callable) -> None:
    """(b): the direction spread over all channels, which costs without GPTQ too; and on one."""
    config, massive = load_massive(args.massive, bench.config)
    bench = dataclasses.replace(bench, config=config)
    direction = massive_direction(config, massive, bench.batches[0])
    spread, inject = rotate(massive), residual_outliers(massive, jnp.asarray(direction))
    for name, p in (("before: the direction spread", spread), ("(b)", inject)):
        print(name, flush=True)
        rows = outlier_rows(bench, p, -1, SINGLE if name == "(b)" else ["rtn", "GPTQ only"])
        if name == "(b)":
            exact = bench.run(p, FLOAT)
            folded = bench.run(fold_norms(p), Recipe(quant=CHANNELS))
            rows.insert(2, row("norm folding only", folded, exact, -1))
        add(f"residual outliers, {name} (model of make_massive.py)", rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", default=["ablation", "outliers"])
    parser.add_argument("--data", type=Path, required=True, help="folder with the two excerpts")
    parser.add_argument("--massive", type=Path, help="folder that make_massive.py wrote")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results")
    parser.add_argument("--tokens", type=int, default=None, help="held-out tokens, default all")
    parser.add_argument("--batches", type=int, default=4, help="of 8 x 512 calibration tokens")
    for name, size in (("keys", 32), ("values", 32), ("hidden", 64), ("salient", 18)):
        parser.add_argument(f"--{name}", type=float, default=size, help="c of these outliers")
    args = parser.parse_args()
    stories = load_stories(args.data)
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    train = join_stories(tokenizer, stories.train)[: args.batches * 8 * 512].reshape(-1, 8, 512)
    loaded = load_model(DEMO, precision="w16a16kv16", dtype="float32")
    held_out = join_stories(tokenizer, stories.test)[: args.tokens]
    bench = Bench(loaded.config, list(map(jnp.asarray, train)), held_out)
    if "ablation" in args.tables:
        rows = ablation(bench, loaded.params)
        save(args, "qoq_ablation", "Ablation on the demo model", {"ablation": rows})
    if "outliers" in args.tables:
        outliers(bench, loaded.params, args)


if __name__ == "__main__":
    main()
