"""What is missed is told: goals beside measurements."""

import json
from pathlib import Path

import pytest

from scripts import goals
from scripts.goals import Goal

RESULTS = Path(goals.__file__).parents[1] / "docs" / "results"


def test_the_table_is_that_of_the_results(capsys):
    assert goals.main([]) == 0
    assert capsys.readouterr().out == (RESULTS / "goals.md").read_text()


def test_less_is_better_but_for_speeds():
    assert Goal("us", "", 10, 11).excess == pytest.approx(0.1)
    assert Goal("us", "", 10, 9).excess < 0
    assert Goal("tokens/s", "", 10, 8, more=True).excess == pytest.approx(0.2)
    assert Goal("tokens/s", "", 10, 11, more=True).excess < 0


def test_misses_are_listed_and_what_was_not_measured_counted():
    found = [Goal("a", "met", 10, 9), Goal("a", "missed", 10, 11), Goal("a", "unknown", 10, None)]
    text = goals.table(found, all_of_them=False)
    assert "| a | 1 | 1 | 1 |" in text
    assert "| a | missed | 10.0 | 11.0 | +10.0 % |" in text and "| a | met |" not in text
    assert "| a | met | 10.0 | 9.0 | -10.0 % |" in goals.table(found, all_of_them=True)


def matmul_row(us, group_size=128, m=16, **other):
    row = {"backend": "mosaic_sm90", "group_size": group_size, "m": m, "n": 4096, "k": 4096}
    return row | {"us": us, "bf16_us": None, "int8_us": None, "fp8_us": None} | other


def test_goals_of_matmuls():
    rows = [matmul_row(5.0, bf16_us=4.0, fp8_us=6.0), matmul_row(5.5, group_size=-1)]
    rows.append(matmul_row(99.0, m=512, fp8_us=9.0))  # fp8 counts to 256 tokens
    found = list(goals.matmul_goals({"rows": rows}))
    measured = [(g.kind, g.what, g.found) for g in found if g.found is not None]
    assert measured == [
        ("W4A8, Llama-3-8B, µs", "4096x4096 M=16", 5.0),
        ("W4A8, bf16 beside it, µs", "4096x4096 M=16", 5.0),
        ("W4A8, fp8 beside it, µs", "4096x4096 M=16", 5.0),
        ("W4A8 per channel, groups of 128, µs", "4096x4096 M=16 per channel", 5.5),
    ]
    wanted = next(g for g in found if g.what == "4096x4096 M=16")
    assert wanted.limit == pytest.approx(3.5 + 4096**2 * 0.515625 / 3.9e6)


def test_what_no_row_tells_is_not_measured():
    matmuls = list(goals.matmul_goals({"rows": []}))
    assert {g.found for g in matmuls} == {None} and len(matmuls) == 32 + 4 + 24
    speeds = list(goals.serving_goals({"rows": []}))
    assert {g.found for g in speeds} == {None} and len(speeds) == 6 + 4
    assert {g.found for g in goals.batching_goals({"compared": {}, "parts": {}})} == {None}
    times = list(goals.parallel_goals({"rows": []}))
    assert {g.found for g in times} == {None} and [g.limit for g in times] == [1.6, 2.6]


def attention_row(us, attends, b=1, ctx=16384):
    sizes = {"heads": 32, "kv_heads": 8, "head_dim": 128, "kv_bits": 4, "b": b, "ctx": ctx}
    more = {"backend": "mosaic_sm90", "cudnn_bf16_us": None, "rel_err": 1e-3}
    return sizes | more | {"attends": attends, "us": us}


def test_goals_of_decode_are_for_both_kinds_of_attention():
    rows = [attention_row(11.0, "quantized"), attention_row(12.0, "full")]
    report = {"rows": rows, "append": [], "prefill": []}
    found = [g for g in goals.attention_goals(report) if g.kind == "attention, Llama-3-8B, µs"]
    assert [(g.what, g.limit, g.found) for g in found] == [
        ("KV4 1 x 16384", 11.5, 11.0),
        ("KV4 1 x 16384, full", 11.5, 12.0),
    ]


def test_goals_of_prefill_are_for_both_and_a_row_that_does_not_say_is_full():
    row = {"backend": "mosaic_sm90", "us": 105.0, "cudnn_bf16_us": 100.0}

    def found(*rows):
        report = {"rows": [], "append": [], "prefill": list(rows)}
        return [(g.what, g.found) for g in goals.attention_goals(report)]

    names = [f"mosaic_sm90, {attends}" for attends in ("quantized", "full")]
    assert found(row) == list(zip(names, (None, 105.0), strict=True))
    both = [row | {"attends": "quantized", "us": 130.0}, row | {"attends": "full"}]
    assert found(*both) == list(zip(names, (130.0, 105.0), strict=True))
    assert found(row | {"cudnn_bf16_us": None}) == list(zip(names, (None, None), strict=True))


def test_several_gpus_are_compared_with_one():
    row = {"bench": "decode", "model": "llama3-70b", "precision": "w4a8kv4", "batch": 64}
    one, two = (row | {"gpus": n, "sums": None, "tokens_per_s": 100.0 * n**0.5} for n in (1, 2))
    slower = two | {"sums": "nccl", "tokens_per_s": 1.0}
    of_two, of_four = goals.parallel_goals({"rows": [one, two, slower]})
    assert of_two.found == pytest.approx(2**0.5) and of_two.excess > 0
    assert of_four.found is None


def test_goals_of_the_engine_can_be_missed():
    shape = {"batch": 256, "model": "llama3-8b", "gpus": 1, "input": 1024, "output": 512}
    ours = shape | {"bench": "throughput", "precision": "w4a8kv4", "tokens_per_s": 20000.0}
    ours |= {"weights_gib": 5.5, "kv_bytes_per_token": 34817, "peak_gib": 25.0}
    other = ours | {"precision": "w16a16kv16", "peak_gib": 54.0}
    found = [g for g in goals.serving_goals({"rows": [ours, other]}) if "memory" in g.kind]
    assert [g.found for g in found] == [5.5, 34817, 25.0, 54 / 25]
    step = {"batch": 1, "gaps": 0.09, "launches_per_layer": 11, "compile_s": 26.0}
    found += goals.step_goals({"rows": [step]})
    parts = {"prefixes": {"times_fewer": 19.0, "equal": 0.5}, "small pool": {"preemptions": 0}}
    batching = {"compared": {"of_static": 0.8}, "parts": parts, "failures": ["3 pages lost"]}
    found += goals.batching_goals(batching)
    first = {"process_seconds": 31.0, "compile_seconds": 61.0}
    both = {"nothing compiled before": first, "all compiled before": first}
    found += goals.first_token_goals(both)
    assert len(found) == 14 and all(g.excess > 0 for g in found)
    unclear = next(iter(goals.step_goals({"rows": [step | {"gaps": -0.1}]})))
    assert unclear.found is None  # kernels took longer than the step beside them


def test_the_time_of_as_many_bytes():
    known = [(100, 4.0), (200, 6.0), (400, 9.0)]
    assert [goals._time_of(known, x) for x in (50, 100, 150, 800)] == [4.0, 4.0, 5.0, 18.0]


def test_no_results_is_one_line(tmp_path, capsys):
    assert goals.main(["--results", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "measure it with qserve_jax.bench" in error


def test_every_goal_of_attention_can_be_missed():
    report = json.loads((RESULTS / "h200_paged_attention.json").read_text())
    for row in [*report["rows"], *report["append"], *report["prefill"]]:
        row["us"], row["rel_err"] = row["us"] * 10, 1.0
    for row in report["rows"]:  # but what the others are compared with
        if goals._heads(row) == goals.LLAMA_HEADS and row["backend"] == "mosaic_sm90":
            row["us"] /= 10
    known = [g for g in goals.attention_goals(report) if g.found is not None]
    kinds = {g.kind for g in known if g.excess > 0}
    assert kinds >= {g.kind for g in known} - {
        "attention, Llama-3-8B, µs",
        "attention, 1.2 of cuDNN's, µs",
    }
