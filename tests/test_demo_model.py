"""The embedded demo model: its size in memory, and what quantisation costs it."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import qserve_jax
from qserve_jax.checkpoint import load_model
from qserve_jax.quantization import QuantConfig, quantization_report
from qserve_jax.quantization.qtensor import is_quantized, nbytes
from qserve_jax.runtime import cache_bytes_per_token, init_cache

DEMO = Path(qserve_jax.__file__).parent / "assets" / "demo"
RESULTS = Path(__file__).parent.parent / "docs" / "results" / "demo_perplexity.json"


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


def test_published_table_keeps_its_promise():
    """The README's numbers: 4-bit groups lose at most 3 % of float's perplexity."""
    rows = {row["precision"]: row for row in json.loads(RESULTS.read_text())["rows"]}
    assert rows["W4A8KV4 g128"]["perplexity"] <= 1.03 * rows["float"]["perplexity"]
