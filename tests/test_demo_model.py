"""The embedded demo model: its size in memory, and what quantisation costs it."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

import qserve_jax
from qserve_jax.checkpoint import load_model
from qserve_jax.models import CausalLM
from qserve_jax.quantization import QuantConfig, quantization_report, quantize_params
from qserve_jax.quantization.qtensor import is_quantized, nbytes
from qserve_jax.runtime import cache_bytes_per_token, init_cache
from scripts.tinystories import held_out, join_stories, load_stories

DEMO = Path(qserve_jax.__file__).parent / "assets" / "demo"
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results" / "demo_perplexity.json"


def test_files_are_small_enough_to_ship():
    assert sum(file.stat().st_size for file in DEMO.iterdir()) <= 14e6


def test_quantised_leaves_take_at_most_0_30_of_bfloat16():
    quantized = load_model(DEMO, precision="w4a8kv4", group_size=128)
    containers = [
        leaf
        for leaf in jax.tree.leaves(quantized.params, is_leaf=is_quantized)
        if is_quantized(leaf)
    ]
    weights = sum(2 * leaf.codes.size for leaf in containers)
    assert len(containers) == 7 and weights == 6 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 768)
    assert nbytes(containers) <= 0.30 * 2 * weights


def test_report_counts_the_bytes_that_quantised_leaves_take():
    exact = load_model(DEMO, precision="w16a16kv16")
    report = quantization_report(exact.params, QuantConfig())
    assert report.bytes_before == nbytes(exact.params)
    assert report.bytes_after == nbytes(load_model(DEMO).params)


@pytest.mark.parametrize(("kv_bits", "per_head"), [(4, 72), (8, 136), (16, 256)])
def test_cache_bytes_per_token_follow_the_formula(kv_bits, per_head):
    config = load_model(DEMO).config
    cache = init_cache(config, num_pages=3, page_size=64, kv_bits=kv_bits, dtype=jnp.bfloat16)
    expected = config.num_layers * config.num_kv_heads * per_head
    assert cache_bytes_per_token(config, kv_bits) == expected
    assert nbytes(cache) == 3 * 64 * expected


def test_4_bits_cost_at_most_3_percent_of_held_out_perplexity(shared_data):
    """A third of the held-out stories of the README's table, which holds the rest."""
    stories = load_stories(shared_data / "tinystories").test[::3]
    exact = load_model(DEMO, precision="w16a16kv16", dtype="float32")
    tokens = join_stories(Tokenizer.from_file(str(DEMO / "tokenizer.json")), stories)
    params = quantize_params(exact.params, QuantConfig())
    loss = held_out(exact.model, exact.params, tokens).loss
    quantized_loss = held_out(CausalLM(exact.config), params, tokens, kv_bits=4).loss
    assert 2.0 < loss < 2.4
    assert 0 < quantized_loss - loss < np.log(1.03)


def test_the_readmes_table_is_that_of_its_script():
    rows = json.loads(RESULTS.read_text())["rows"]
    readme = (ROOT / "README.md").read_text()
    for row in rows:  # the columns that the script prints
        change = f"{row['loss_change']:+.4f} ± {row['loss_change_standard_error']:.4f}"
        cells = [row["precision"], f"{row['perplexity']:.3f} ± {row['standard_error']:.3f}"]
        cells += ["", ""] if row is rows[0] else [f"{row['change_percent']:+.2f} %", change]
        assert f"| {' | '.join(cells)} |" in readme
    perplexity = {row["precision"]: row["perplexity"] for row in rows}
    assert perplexity["W4A8KV4 g128"] <= 1.03 * perplexity["float"]


def test_the_readmes_speeds_are_those_of_the_script():
    """They were measured on two cores: at least 50 tokens/s for one sequence and 250 for 32."""
    result = json.loads((RESULTS.parent / "demo_speed_cpu.json").read_text())
    readme = (ROOT / "README.md").read_text()
    for row in result["rows"]:
        name = {"w4a8kv4": "w4a8kv4 g128", "w16a16kv16": "w16a16kv16 (bfloat16)"}[row["precision"]]
        speed, step = f"{row['tokens_per_s']:.0f}", f"{row['ms_per_step']:.1f}"
        assert f"| {name} | {row['batch']} | {speed} | {step} |" in readme
        assert row["tokens_per_s"] >= {1: 50, 32: 250}[row["batch"]]
    starts = result["seconds_to_first_text"]
    assert f"after {starts['first_run']:.1f} s" in readme
    assert f"cache after {starts['second_run']:.1f} s" in readme and starts["second_run"] < 10
    assert result["cpu_cores"] == 2 and not result["commit"].endswith("-dirty")
