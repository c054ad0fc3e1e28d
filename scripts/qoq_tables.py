"""What QoQ mends and what each of its steps is worth, on the demo model.

`qoq_tables.py ablation --data DIR`: the published order, W8A8 -> W4 -> rotation -> clip -> KV4 ->
  SmoothAttention -> group -> reorder, as docs/results/qoq_ablation.{json,md,png}.
`qoq_tables.py outliers --data DIR`: function-preserving outliers put into the model
  (qserve_jax/quantization/transforms/outliers.py), then float, other formats, round to nearest,
  each transform alone and the recipes, as docs/results/qoq_outliers.{json,md}.
Single tables of the latter by name. `outliers` keeps the tables that are there, so that a stopped
run goes on where it was; what is named is made anew. Each table says which commit made it.

Perplexity on all the held-out stories that scripts/train_demo.py never looked at, calibrated on
stories that it trained on. Residual outliers, and all together, are put into the model of
scripts/make_massive.py, whose residual stream has a direction of massive size.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from make_endings import make_questions, write_questions
from make_massive import TOKENS, add_direction, load_massive, massive_model, save_massive
from qoq_bench import CHANNELS, GROUPS, YARDSTICKS, Bench
from qoq_report import plot_ablation, save
from tinystories import join_stories, load_stories
from tokenizers import Tokenizer

from qserve_jax import QuantConfig
from qserve_jax.benchmarks.provenance import ROOT, provenance
from qserve_jax.checkpoint import load_model
from qserve_jax.evaluation.choices import read_questions
from qserve_jax.evaluation.compare import Work
from qserve_jax.quantization.recipes import QOQ_G128, QOQ_PER_CHANNEL, Recipe
from qserve_jax.quantization.transforms.outliers import (
    hidden_outliers,
    key_outliers,
    residual_outliers,
    salient_groups,
    value_outliers,
)

DEMO = ROOT / "qserve_jax/assets/demo"
QOQ = {"qoq-g128": QOQ_G128, "qoq-per-channel": QOQ_PER_CHANNEL}
KEYS, VALUES, HIDDEN, SALIENT = 32, 32, 64, 18
"""c of the outliers."""


def ablation_recipes() -> dict[str, Recipe]:
    """The rows in the published order; each has what the ones before it have, but for the clip
    search, which groups replace. Output smoothing and GPTQ, absent there, come last."""
    w8 = Recipe(quant=QuantConfig(weight_bits=8, kv_bits=8))
    w4 = Recipe(quant=QuantConfig(group_size=-1, kv_bits=8))
    clip = w4.without(rotate=True, clip=True)
    smooth = clip.without(quant=CHANNELS.quant, smooth_keys="search")
    group = smooth.without(clip=False, quant=GROUPS.quant)
    return {
        "W8A8KV8": w8,
        "W4A8KV8 per channel": w4,
        "+ rotation": w4.without(rotate=True),
        "+ clip search": clip,
        "+ KV4": clip.without(quant=CHANNELS.quant),
        "+ SmoothAttention": smooth,
        "+ groups of 128 (no clip search)": group,
        "+ reordering": group.without(reorder=True),
        "+ output smoothing": group.without(reorder=True, smooth_outputs=0.05),
        "+ GPTQ = qoq-g128": QOQ_G128,
        "qoq-per-channel": QOQ_PER_CHANNEL,
    }


def singles(base: Recipe) -> dict[str, Recipe]:
    """Round to nearest and each transform alone; reordering is for groups, clip search for the
    rest."""
    grouped = base.quant.group_size == 128
    kind = "g128" if grouped else "per channel"
    changes = {
        "rotation, RTN": {"rotate": True},
        "SmoothAttention 0.5, RTN": {"smooth_keys": 0.5},
        "SmoothAttention search, RTN": {"smooth_keys": "search"},
        "output smoothing, RTN": {"smooth_outputs": 0.05},
        **(
            {"reordering, RTN": {"reorder": True}}
            if grouped
            else {"clip search, RTN": {"clip": True}}
        ),
        "GPTQ": {"gptq": True},
    }
    rows = {f"{name} {kind}": base.without(**change) for name, change in changes.items()}
    return {f"RTN {kind}": base} | rows


RTN = {"RTN per channel": CHANNELS, "RTN g128": GROUPS}
GPTQ = {
    "GPTQ per channel": CHANNELS.without(gptq=True),
    "GPTQ g128": GROUPS.without(gptq=True),
}
ROTATED = {
    "rotation and clip search, RTN per channel": CHANNELS.without(rotate=True, clip=True),
    **{f"rotation, {name}": recipe.without(rotate=True) for name, recipe in GPTQ.items()},
}
KV4 = Recipe(quant=dataclasses.replace(QuantConfig.preset("w4a16kv4"), weight_bits=16))
KV4_ROWS = {
    "KV4": KV4,
    "KV4, SmoothAttention 0.5": KV4.without(smooth_keys=0.5),
    "KV4, SmoothAttention search": KV4.without(smooth_keys="search"),
}


KV4_CENTERED = {"KV4": KV4, "KV4, centered": KV4.without(center_keys=True)}
CENTERED = {f"{name}-centered": recipe.without(center_keys=True) for name, recipe in QOQ.items()}


@dataclasses.dataclass(frozen=True)
class Table:
    """outliers: put in one after the other (INJECT). massive: in the model of make_massive.py.
    asks: questions too."""

    title: str
    outliers: tuple[str, ...]
    recipes: dict[str, Any]
    massive: bool = False
    asks: bool = False


TABLES = {
    "trained": Table(
        "the demo model as trained; and which sentence follows, of four",
        (),
        YARDSTICKS | RTN | QOQ,
        asks=True,
    ),
    "centered": Table(
        "the demo model as trained, without and with the mean taken off its keys before the cache",
        (),
        KV4_CENTERED | QOQ | CENTERED,
    ),
    "massive": Table("the model of make_massive.py as fitted", (), RTN | GPTQ | QOQ, massive=True),
    "all": Table(
        "(a), (b), (c) and (d) together, in the model of make_massive.py",
        ("salient", "hidden", "values", "keys", "residual"),
        YARDSTICKS | RTN | singles(GROUPS) | QOQ,
        massive=True,
    ),
    "residual": Table(
        "(b) residual outliers, the massive direction on channel 0 (all norms are folded)",
        ("residual",),
        YARDSTICKS | RTN | singles(CHANNELS) | GPTQ | ROTATED | QOQ,
        massive=True,
    ),
    "kv4": Table(
        f"(a), c = {KEYS}: 16-bit weights and activations, a 4-bit cache", ("keys",), KV4_ROWS
    ),
    "keys": Table(
        f"(a) post-RoPE keys, 2 of 32 pairs per head, c = {KEYS}",
        ("keys",),
        YARDSTICKS | singles(CHANNELS) | QOQ,
    ),
    "salient": Table(
        f"(d) the 256 salient of 768 channels spread over all groups, c = {SALIENT}",
        ("salient",),
        YARDSTICKS | singles(GROUPS) | QOQ,
    ),
    "values": Table(
        f"(c) v–o, 8 of 64 channels per head, c = {VALUES}",
        ("values",),
        YARDSTICKS | singles(CHANNELS) | QOQ,
    ),
    "hidden": Table(
        f"(c) up–down, 192 of 768 channels, c = {HIDDEN}",
        ("hidden",),
        YARDSTICKS | singles(CHANNELS) | QOQ,
    ),
}


def salient(bench: Bench, params: Any) -> Any:
    return salient_groups(params, bench.calibrator.statistics(params), SALIENT, channels=256)


def residual(bench: Bench, params: Any) -> Any:
    """On channel 0 the direction of the largest second moment of what layer 1 reads."""
    stats = bench.calibrator.statistics(params, hessians=True)
    moment = np.asarray(stats.hessian["layers/q_proj"][1], np.float64)
    return residual_outliers(params, jnp.asarray(np.linalg.eigh(moment)[1][:, -1]))


INJECT: dict[str, Callable[[Bench, Any], Any]] = {
    "salient": salient,
    "hidden": lambda bench, params: hidden_outliers(params, HIDDEN, 192),
    "values": lambda bench, params: value_outliers(params, bench.loaded.config, VALUES, 8),
    "keys": lambda bench, params: key_outliers(params, bench.loaded.config, KEYS, 2),
    "residual": residual,
}


def outlier_rows(bench: Bench, table: Table) -> list[dict[str, Any]]:
    params = bench.loaded.params
    for name in table.outliers:
        params = INJECT[name](bench, params)
    return bench.rows(params, table.recipes)


def make_benches(args: argparse.Namespace) -> tuple[Bench, Callable[[], Bench]]:
    """The demo's, and a function that gives the massive model's."""
    stories = load_stories(args.data)
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    text = join_stories(tokenizer, stories.train)
    demo = load_model(DEMO, precision="w16a16kv16", dtype="float32")
    batches = list(map(jnp.asarray, text[: args.batches * 8 * 512].reshape(-1, 8, 512)))
    tokens = join_stories(tokenizer, stories.test)[: args.tokens]
    work = Work(token_ids=tokens, seq_len=512, batch_size=4)

    @functools.cache
    def massive() -> Bench:
        if not (args.massive / "params.npz").exists():
            save_massive(args.massive, add_direction(demo, text[:TOKENS].reshape(-1, 512)))
        return Bench(massive_model(demo, load_massive(args.massive)), batches, work)

    return Bench(demo, batches, work), massive


def asking(bench: Bench, data: Path) -> Bench:
    """The bench with the questions of make_endings.py, by way of their file."""
    with tempfile.TemporaryDirectory() as folder:
        write_questions(
            path := Path(folder) / "endings.csv", make_questions(load_stories(data).test)
        )
        questions = read_questions(path)
    work = dataclasses.replace(bench.work, questions=questions, style="completion")
    return dataclasses.replace(bench, work=work)


def begin(path: Path, title: str, args: argparse.Namespace) -> dict[str, Any]:
    """What `path` has of the same texts, or a new beginning."""
    note = (
        f"{args.tokens or 'All'} held-out tokens in windows of 512, every query reading the "
        f"quantised K and V; {args.batches * 8 * 512} calibration tokens. ± is one standard error; "
        "Δ and agreement are against float in the same table, paired window by window."
    )
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        if old["note"] == note:
            return old
    return {"title": title, "note": note, "tables": {}}


def add_table(content: dict[str, Any], name: str, title: str, rows: Any, origin: Any) -> None:
    """In the order of TABLES."""
    tables = content["tables"] | {name: {"title": title, **origin, "rows": rows}}
    content["tables"] = {key: tables[key] for key in ("ablation", *TABLES) if key in tables}


def ablation(bench: Bench, args: argparse.Namespace, origin: Any) -> None:
    path = args.output / "qoq_ablation.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = begin(path, "Ablation on the demo model", args)
    rows = bench.rows(bench.loaded.params, ablation_recipes())
    add_table(content, "ablation", "in the published order", rows, origin)
    if plot_ablation(rows, picture := path.with_suffix(".png")):
        content["plot"] = picture.name
    else:
        print("no plot: install matplotlib for one")
    save(path, content)


def outliers(
    bench: Bench, massive: Callable[[], Bench], args: argparse.Namespace, origin: Any
) -> None:
    path = args.output / "qoq_outliers.json"
    content = begin(path, "Outliers, W4A8KV4", args)
    for name, table in TABLES.items():
        wanted = "outliers" in args.tables and name not in content["tables"]
        if not (wanted or name in args.tables):
            continue
        print(f"{name}: {table.title}", flush=True)
        chosen = massive() if table.massive else bench
        rows = outlier_rows(asking(chosen, args.data) if table.asks else chosen, table)
        add_table(content, name, table.title, rows, origin)
        save(path, content)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = ["ablation", "outliers", *TABLES]
    add = parser.add_argument
    add("tables", nargs="*", default=["ablation", "outliers"], help=f"of {', '.join(choices)}")
    add("--data", type=Path, required=True, help="folder with the two excerpts")
    add(
        "--massive",
        type=Path,
        default=ROOT / ".cache/massive",
        help="folder of make_massive.py's model",
    )
    add("--output", type=Path, default=ROOT / "docs/results")
    add("--tokens", type=int, default=None, help="held-out tokens, default all")
    add("--batches", type=int, default=4, help="of 8 x 512 calibration tokens")
    args = parser.parse_args()
    if unknown := set(args.tables) - set(choices):
        parser.error(f"table {min(unknown)!r} is unknown: use some of {', '.join(choices)}")
    origin = provenance()  # before results make the checkout dirty
    bench, massive = make_benches(args)
    if "ablation" in args.tables:
        ablation(bench, args, origin)
    if set(args.tables) - {"ablation"}:
        outliers(bench, massive, args, origin)


if __name__ == "__main__":
    main()
