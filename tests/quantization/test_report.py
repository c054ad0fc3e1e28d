"""The report says what quantize_params does, and the bytes it leaves."""

import json

import jax
import jax.numpy as jnp
import pytest

from qserve_jax.quantization import (
    FLAX_RULES,
    MAXTEXT_RULES,
    QuantConfig,
    Rule,
    quantization_report,
    quantize_kernel,
    quantize_params,
)
from qserve_jax.quantization.qtensor import is_quantized, nbytes


def tree():
    def leaf(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    return {
        "layers": {
            "q_proj": {"kernel": leaf(2, 256, 64), "bias": leaf(2, 64)},
            "down_proj": {"kernel": leaf(2, 172, 64)},
            "odd": {"kernel": leaf(7, 4, dtype=jnp.float32)},
            "kept": {"kernel": leaf(128, 4)},
        },
        "embed": {"embedding": leaf(10, 64)},
        "norm": {"kernel": leaf(64)},
    }


RULES = (Rule("kept", skip=True), Rule("(^|/)kernel$"))
CONFIGS = [
    QuantConfig(),
    QuantConfig(group_size=-1),
    QuantConfig(weight_bits=8),
    QuantConfig(weight_bits=16, act_bits=16),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.filterwarnings("ignore:.*cannot be quantised as asked")
def test_bytes_and_schemes_are_those_of_quantize_params(config):
    report = quantization_report(tree(), config, rules=RULES)
    quantized = jax.eval_shape(lambda p: quantize_params(p, config, rules=RULES), tree())
    leaves = jax.tree.leaves(quantized, is_leaf=is_quantized)
    assert [row.bytes_after for row in report.rows] == [nbytes(leaf) for leaf in leaves]
    assert [row.changed for row in report.rows] == [is_quantized(leaf) for leaf in leaves]
    assert report.bytes_after == nbytes(quantized)
    assert report.bytes_before == nbytes(tree())


def test_rows_say_how_and_why():
    rows = {row.path: row for row in quantization_report(tree(), rules=RULES).rows}
    said = {path: (row.scheme, row.reason) for path, row in rows.items()}
    assert said == {
        "layers/q_proj/kernel": ("w4 per-group", ""),
        "layers/q_proj/bias": ("float", "no rule matches"),
        "layers/down_proj/kernel": (
            "w4 per-channel",
            "K=172 is not a multiple of group_size=128",
        ),
        "layers/odd/kernel": ("float", "K=7 is odd, 4-bit codes need pairs"),
        "layers/kept/kernel": ("float", "the rule skips it"),
        "embed/embedding": ("float", "no rule matches"),
        "norm/kernel": ("float", "1 axes, fewer than the rule needs"),
    }
    axes = {path: row.axes for path, row in rows.items() if row.axes}
    assert axes == {
        "layers/q_proj/kernel": "stack 2 · K 256 · N 64",
        "layers/down_proj/kernel": "stack 2 · K 172 · N 64",
    }
    q_proj = rows["layers/q_proj/kernel"]
    assert (q_proj.shape, q_proj.bytes_before) == ((2, 256, 64), 2 * 256 * 64 * 2)
    # codes, channel scales, group scales and offsets
    assert q_proj.bytes_after == 2 * 64 * (128 + 4 + 2 + 2)


def test_table_is_aligned_and_complete():
    report = quantization_report(tree(), rules=RULES)
    title, header, *lines = str(report).splitlines()
    assert title == "w4a8kv4, group_size 128: 2 of 7 leaves quantised"
    assert len(lines) == len(report.rows) + 2  # two totals
    axes, scheme = header.index("axes"), header.index("scheme")
    for row, line in zip(report.rows, lines, strict=False):
        assert line.startswith(row.path) and line[axes:].startswith(row.axes)
        assert line[scheme:].startswith(row.scheme)
        assert line.endswith(row.reason) and f"{row.bytes_after:,}" in line
    total, quantised = lines[-2:]
    assert f"{report.bytes_before:,}" in total and f"{report.bytes_after:,}" in total
    before = sum(row.bytes_before for row in report.rows if row.changed)
    assert f"{before:,}" in quantised


def test_axes_are_those_of_the_rule():
    out = {"out": {"kernel": jax.ShapeDtypeStruct((2, 5, 64, 6), jnp.float32)}}
    maxtext, flax = (quantization_report(out, rules=r).rows[0] for r in (MAXTEXT_RULES, FLAX_RULES))
    assert maxtext.axes == "stack 5 · K 2x64 · N 6"
    assert flax.axes == "stack 2 · K 5x64 · N 6"
    row = quantization_report({"w": jnp.ones((8, 128))}, rules=[Rule("w", (-1,), (-2,))]).rows[0]
    assert row.axes == "K 128 · N 8"


def test_a_doubtful_leaf_says_so():
    query = {"query": {"kernel": jax.ShapeDtypeStruct((256, 2, 64), jnp.float32)}}
    row = quantization_report(query, QuantConfig(group_size=-1)).rows[0]
    assert row.axes == "stack 256 · K 2 · N 64"
    assert row.reason.startswith("3 axes taken as a stack of [K, N]: pass rules=FLAX_RULES")


def test_to_dict_goes_through_json():
    report = quantization_report(tree(), rules=RULES)
    loaded = json.loads(json.dumps(report.to_dict()))
    assert loaded["bytes_after"] == report.bytes_after
    bits = {"weight_bits": 4, "group_size": 128, "act_bits": 8, "kv_bits": 4}
    assert loaded["config"] == bits | {"scale_dtype": "float32", "round_level_one": False}
    assert loaded["rows"][0]["path"] == report.rows[0].path
    assert len(loaded["rows"]) == 7


def test_arrays_scalars_and_containers_are_rows_too():
    done = quantize_kernel(jnp.ones((128, 4)))
    report = quantization_report({"a": {"kernel": jnp.ones((128, 4))}, "b": done, "c": 1.0})
    a, b, c = report.rows
    assert (a.scheme, b.scheme, c.scheme) == ("w4 per-group", "W4PerGroup", "float")
    assert b.bytes_before == b.bytes_after == nbytes(done) and b.reason == "already quantised"
    assert a.bytes_after == nbytes(done) and not b.changed


def test_an_empty_tree_has_an_empty_report():
    assert "0 of 0 leaves" in str(quantization_report({}))


def test_it_refuses_what_quantize_params_refuses():
    params = {"kernel": jnp.ones((2, 2), int)}
    with pytest.raises(ValueError, match="dtype int32"):
        quantization_report(params)
