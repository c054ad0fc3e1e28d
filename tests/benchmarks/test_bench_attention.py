"""The attention sweep with a clock that is told the time: rows, guards, resumption, tables."""

import functools
import json
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax import bench as command
from qserve_jax._cli import UsageError
from qserve_jax.benchmarks import attention, attention_report
from qserve_jax.benchmarks.attention_cases import (
    BATCHES,
    CONTEXTS,
    HEADS,
    Case,
    decode_cases,
    make_paged,
)
from qserve_jax.benchmarks.attention_error import (
    attend_row,
    dequantized,
    sampled_rows,
    worst_error,
)
from qserve_jax.benchmarks.ceilings import NAMES
from qserve_jax.benchmarks.matmul import Bench
from qserve_jax.pallas_kernels import paged_attention
from qserve_jax.pallas_kernels.paged_attention import longest_first, mosaic_decode
from qserve_jax.pallas_kernels.paged_attention.reference import read_pages
from qserve_jax.quantization.qtensor import KVCache

SMALL = (4, 2, 64)
START = {
    "device": "a GPU",
    "jax": "1",
    "commit": "c" * 40,
    "ceilings": dict.fromkeys(NAMES, 4000.0) | {"hbm_read_max_gbps": 4400.0, "commit": "c" * 40},
    "baselines": [],
    "rows": [],
}
ROW = ("backend", "kv_bits", "b", "ctx", "heads", "kv_heads", "head_dim", "us", "cudnn_bf16_us")


class FakeClock:
    """Makes two calls, so that donated operands must come back, and says that each took `us`."""

    def __init__(self, us=10.0):
        self.us, self.calls = us, 0

    def __call__(self, call, wait=jax.block_until_ready):
        wait([call(0), call(1)])
        self.calls += 1
        return [self.us] * 3


CASES = (*decode_cases((SMALL,), (4,), (2,), (70,)), Case(*SMALL, 8, (3, 65, 64)))


@pytest.fixture(autouse=True)
def nothing_kept():
    make_paged.cache_clear()


def run(clock, monkeypatch, start=None, baseline="xla", cases=CASES, others=True):
    monkeypatch.setattr(attention, "BASELINE", baseline)
    sizes: dict = dict.fromkeys(("append_batches", "prompts", "chunks"), ())
    if others:
        sizes = {"append_batches": (3,), "prompts": ((2, 5),), "chunks": ((6, 70),)}
    sweep = attention.Sweep(cases, ("reference",), (4,), SMALL, **sizes)
    saved, said = [], []
    start = start or attention.attention_report(json.loads(json.dumps(START)))
    bench = Bench(clock, start, lambda r: saved.append(json.dumps(r)), said.append, "attention")
    attention.run_sweep(sweep, bench)
    return bench, saved, said


@pytest.mark.parametrize("backend", ["mosaic_sm90", "mosaic_mma"])
@pytest.mark.parametrize("lengths", [(16384,), tuple(range(64, 4160, 64))])
def test_a_row_s_config_is_what_the_kernel_takes(backend, lengths, monkeypatch):
    case, chosen = Case(32, 8, 128, 4, lengths), []
    right = mosaic_decode.choose_config

    def choose(*args, **kwargs):
        chosen.append(right(*args, **kwargs))
        return chosen[-1]

    monkeypatch.setattr(mosaic_decode, "choose_config", choose)
    q = jax.ShapeDtypeStruct((case.batch, 32, 128), jnp.bfloat16)
    words = jax.ShapeDtypeStruct((9, 8, 64 * 136 // 4), jnp.int32)
    table = jax.ShapeDtypeStruct((case.batch, max(case.pages)), jnp.int32)
    lens = jax.ShapeDtypeStruct((case.batch,), jnp.int32)

    def run(q, words, table, lens):
        order = longest_first(lens) if case.batch > 1 else None
        options = {"attends": "quantized", "order": order, "backend": backend}
        return paged_attention(q, KVCache(words, 4, 128), table, lens, **options)

    jax.jit(run).trace(q, words, table, lens).lower(lowering_platforms=("cuda",))
    assert [vars(config) for config in chosen] == [attention._config(case, backend)]


def test_rows_and_resumption(small_cache, monkeypatch):
    bench, saved, _ = run(FakeClock(), monkeypatch)
    report = bench.report
    assert not bench.problems
    shown = [(r["kv_bits"], r.get("ctx", r.get("lengths")), r["attends"]) for r in report["rows"]]
    assert shown == [
        *[(4, 70, "quantized"), (4, 70, "full")],
        (8, [3, 65, 64], "quantized"),
    ]
    row = report["rows"][0]
    assert set(ROW) <= set(row) and (row["us"], row["cudnn_bf16_us"]) == (10.0, 10.0)
    assert row["gbps"] == pytest.approx(2 * 70 * 2 * (2 * 32 + 8) / 10 / 1e3)
    for row in report["rows"]:
        assert 1e-4 < row["rel_err"] < 2.5e-3  # rounding to bf16
    assert [len(report[name]) for name in attention.LISTS] == [1, 2, 2]
    for name in ("prefill", "chunked_prefill"):
        assert [row["attends"] for row in report[name]] == ["quantized", "full"]
    for row in (report["prefill"][0], *report["chunked_prefill"]):
        assert 1e-4 < row["rel_err"] < 2.5e-3
    assert len(report["baselines"]) == 4 and len(saved) == 8
    clock = FakeClock()
    again, _, _ = run(clock, monkeypatch, json.loads(saved[-1]))
    assert clock.calls == 0 and again.report == report
    old = json.loads(saved[-1]) | {"commit": "d" * 40}
    for row in (old["rows"][1], *old["append"], *old["prefill"], *old["chunked_prefill"]):
        row["kernels"] = "of old"
    clock = FakeClock(20.0)
    again, _, _ = run(clock, monkeypatch, old)
    assert clock.calls == 6 and again.report["baselines"] == report["baselines"]  # cuDNN's stay
    found = [(r["us"], r["cudnn_bf16_us"], r["commit"][0]) for r in again.report["rows"]]
    assert found == [(10.0, 10.0, "c"), (10.0, 10.0, "c"), (20.0, 10.0, "d")]
    for name in ("prefill", "chunked_prefill"):
        assert [(r["us"], r["cudnn_bf16_us"]) for r in again.report[name]] == [(20.0, 10.0)] * 2
    assert "commit cccccccccccc, dddddddddddd\n" in attention_report.table(again.report)
    text = attention_report.table(report)
    assert "| reference | 4 | quantized | 4 | 2 | 64 | 2 | 70 | 10.0 |" in text
    assert "kernels" not in text and "commit" not in text[20:]
    assert "chunked prefill" in text and "| 3-65 |" in text
    assert len(attention_report.comma_separated(report).splitlines()) == 4
    ((panel, drawn),) = attention_report.curves(report).items()
    assert (panel, list(drawn)) == ("reference, KV4", ["4/2/64"])
    assert attention_report.is_attention(report)


def test_rows_that_do_not_say_what_they_attend_to_are_kept(small_cache, monkeypatch):
    """Of fresh prompts they are "full", of chunks "quantized"; what they lack is measured."""
    bench, _, _ = run(FakeClock(), monkeypatch)
    old = json.loads(json.dumps(bench.report))
    for name, attends in (("prefill", "full"), ("chunked_prefill", "quantized")):
        old[name] = [row for row in old[name] if row.pop("attends") == attends]
    clock = FakeClock(20.0)
    again, _, _ = run(clock, monkeypatch, old)
    assert clock.calls == 2
    for name, times in (("prefill", [20.0, 10.0]), ("chunked_prefill", [10.0, 20.0])):
        rows = sorted(again.report[name], key=lambda row: attention.ATTENDS.index(row["attends"]))
        assert [row["us"] for row in rows] == times
    text = attention_report.table(again.report)
    assert "| full |" in text.split("chunked prefill")[0].split("prefill")[-1]
    assert "| - |" in text  # of a column that one row lacks: no error of what is cuDNN's


def test_the_error_of_a_chunk_is_of_what_it_attends_to():
    case = Case(*SMALL, 4, (70,))
    paged = make_paged(case, layers=2)
    q = jax.random.normal(jax.random.key(0), (1, 6, 4, 64))
    new = jax.random.normal(jax.random.key(1), (2, 1, 6, 2, 64))
    options = {"layer": 1, "backend": "reference"}
    for attends, tokens in (("quantized", None), ("full", [*new])):
        more = {"new_k": new[0], "new_v": new[1]} if tokens else {}
        attend = jax.jit(functools.partial(paged_attention, attends=attends, **options))
        lens = (paged.lens, jnp.full(1, 6))
        out = attend(q, paged.cache, paged.table, lens[0], query_lens=lens[1], **more)
        other = None if tokens else [*new]
        assert attention._chunk_error(case, paged, q, out, tokens) < 1e-5
        assert attention._chunk_error(case, paged, q, out, other) > 0.01


def test_a_case_that_fails_ends_no_other(small_cache, monkeypatch):
    """cuDNN is not here; a time is too short to be one; there is no memory."""
    ragged = CASES[1:]
    bench, _, _ = run(FakeClock(), monkeypatch, None, "cudnn", ragged, False)
    assert bench.report["rows"][0]["cudnn_bf16_us"] is None
    assert len(bench.problems) == 1 and "cuDNN is not detected" in bench.problems[0]
    bench, _, _ = run(FakeClock(1e-6), monkeypatch, None, "cudnn", ragged, False)
    assert not bench.report["rows"] and "above the 4400 GB/s of memory" in bench.problems[-1]

    monkeypatch.setattr(attention, "worst_error", lambda *_: float("nan"))
    bench, _, _ = run(FakeClock(), monkeypatch, None, "xla", ragged, False)
    assert not bench.report["rows"]
    assert bench.problems[-1].endswith("an error of nan is above 0.0025: rejected as wrong")

    def fail(*_, **__) -> Any:
        raise MemoryError("no room")

    vars(fail)["cache_clear"] = lambda: None
    monkeypatch.setattr(attention, "make_paged", fail)
    bench, _, _ = run(FakeClock(), monkeypatch)
    assert len(bench.problems) == 3 + 5 and all("no room" in line for line in bench.problems)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_error_is_of_the_cache_that_is_read(bits):
    """float64 against the reference's own dequantisation; a wrong page does not pass."""
    case = Case(*SMALL, bits, (130, 1, 64))
    paged = make_paged(case, layers=2)
    k, _ = jax.jit(read_pages)(paged.cache, paged.table[:1], layer=1)
    own, _ = dequantized(case, np.asarray(paged.cache.pages[1, paged.table[0, :3]])[:, 1])
    np.testing.assert_allclose(own, k[0, :, 1], rtol=0, atol=2e-6)
    q = jax.random.normal(jax.random.key(0), (3, 4, 64))
    options = {"attends": "quantized", "backend": "reference"}
    attend = jax.jit(functools.partial(paged_attention, layer=1, **options))
    attend_new = jax.jit(functools.partial(paged_attention, layer=1, backend="reference"))
    out = attend(q, paged.cache, paged.table, paged.lens)
    assert worst_error(case, paged, 1, q, out) < 1e-5
    assert worst_error(case, paged, 0, q, out) > 0.1
    new = jax.random.normal(jax.random.key(1), (2, 3, 2, 64))
    out_full = attend_new(q, paged.cache, paged.table, paged.lens, new_k=new[0], new_v=new[1])
    assert worst_error(case, paged, 1, q, out_full, [*new]) < 1e-5
    assert worst_error(case, paged, 1, q, out_full) > 0.01
    assert np.isnan(worst_error(case, paged, 1, q, out.at[0, 0, 0].set(jnp.nan)))


def test_the_rows_that_are_checked():
    """The longest and the shortest, wherever they are, and some of all others."""
    uneven = tuple([500] * 20 + [9] + [500] * 30 + [4000] + [500] * 12)
    rows = sampled_rows(uneven)
    assert {0, 20, 51, 63} <= set(rows) and len(rows) == 16
    assert max(np.diff(rows)) <= 5
    assert sampled_rows((1024,) * 256)[:3] == [0, 20, 39] and len(sampled_rows((1024,) * 256)) == 14
    assert sampled_rows((16384,) * 64) == [0, 21, 42, 63]
    assert sampled_rows((131072,)) == [0] and sampled_rows((7, 5, 9)) == [0, 1, 2]


def test_an_error_in_a_row_between_is_found():
    case = Case(*SMALL, 8, (70,) * 40)
    paged = make_paged(case, layers=2)
    q = jax.random.normal(jax.random.key(0), (40, 4, 64))
    out = np.stack([attend_row(case, paged, 1, row, np.asarray(q[row])) for row in range(40)])
    assert worst_error(case, paged, 1, q, jnp.asarray(out)) < 1e-6
    out[sampled_rows(case.lengths)[7]] *= 1.01
    assert worst_error(case, paged, 1, q, jnp.asarray(out)) == pytest.approx(0.01, rel=1e-3)


def test_the_sweep_is_the_issue_s():
    cases = decode_cases(HEADS, (4, 8, 16), BATCHES, CONTEXTS)
    assert len(cases) == 6 * 3 * (5 * 3 + 3 + 1)
    assert all(c.batch <= 64 for c in cases if max(c.lengths) == 16384)
    ragged = [c for c in cases if len(set(c.lengths)) > 1]
    assert all(c.batch == 64 and 256 <= min(c.lengths) and max(c.lengths) <= 4096 for c in ragged)
    assert statistics.mean(ragged[0].lengths) == pytest.approx(2176, rel=0.15)
    assert (command.BATCHES, command.CONTEXTS) == (BATCHES, CONTEXTS)


def cases_of(flags):
    arguments = f"kernels --op attention {flags}".split()
    return command.attention_cases(command.build_parser().parse_args(arguments))


def test_without_flags_the_other_models_are_measured_where_they_differ():
    cases = cases_of("")
    llama = [c for c in cases if (c.heads, c.kv_heads, c.head_dim) == HEADS[0]]
    assert llama == decode_cases(HEADS[:1], (4, 8, 16), BATCHES, CONTEXTS)
    assert len(cases) == len(set(cases)) == 3 * 19 + 5 * (5 * 2 + 1 + 2 * 2)
    for shape in HEADS[1:]:
        mine = [c.place for c in cases if (c.heads, c.kv_heads, c.head_dim) == shape]
        eight = [(c["b"], c["ctx"]) for c in mine if c["kv_bits"] == 8]
        assert eight == [(16, 1024), (16, 4096), (256, 1024), (256, 4096)]
        four = [(c["b"], c.get("ctx")) for c in mine if c["kv_bits"] == 4]
        assert four == [(b, n) for b in BATCHES for n in (1024, 4096)] + [(64, None)]


def test_a_flag_asks_for_all_combinations():
    assert cases_of("--kv-bits 4 8 16") == decode_cases(HEADS, (4, 8, 16), BATCHES, CONTEXTS)
    shape = (14, 2, 64)
    found = cases_of("--heads 14/2/64 --batch 1 16 --kv-bits 8 8")
    assert found == decode_cases((shape,), (8,), (1, 16), CONTEXTS) and len(found) == 8
    assert cases_of("--context 64") == decode_cases(HEADS, (4, 8, 16), BATCHES, (64,))
    asked = cases_of("--heads 32/8/128 --kv-bits 4 --batch 128 --context 16384")
    assert [case.lengths for case in asked] == [(16384,) * 128]


def test_flags(capsys, tmp_path):
    with pytest.raises(UsageError, match="--heads '32/7/128': KV heads must divide"):
        command.bench(["kernels", "--op", "attention", "--heads", "32/7/128"])
    with pytest.raises(UsageError, match="give query heads/KV heads/head_dim, as 32/8/128"):
        command.bench(["kernels", "--op", "attention", "--heads", "32x8"])
    path = tmp_path / "saved.json"
    path.write_text(json.dumps(START))
    shown = ["kernels", "--op", "attention", "--no-run", "--save", str(path)]
    with pytest.raises(UsageError, match="holds no results of --op attention: name another"):
        command.bench(shown)
    path.write_text(json.dumps(attention.attention_report(START)))
    command.bench(shown)
    assert "a GPU, jax 1, commit cccccccccccc" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, line",
    [
        (f"--op attention --batch {10**30}", f"'{10**30}' is not an integer in 1..65536: give one"),
        (f"--op attention --context {10**30}", "is not an integer in 1..1048576: give one"),
        ("--op attention --shapes 5x5", "--shapes is of --op matmul, not of --op attention: leave"),
        (
            "--op attention --only-ours",
            "--only-ours is of --op matmul, not of --op attention: leave",
        ),
        ("--op attention --tokens 5", "--tokens is of --op matmul, not of --op attention: leave"),
        ("--kv-bits 4", "--kv-bits is of --op attention, not of --op matmul: leave it out"),
    ],
)
def test_flags_that_are_too_much(flags, line, capsys):
    assert command.main(["kernels", *flags.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and line in err


SIZES = {"heads": 32, "kv_heads": 8, "head_dim": 128}
HERE = {"backend": "mosaic_sm90", **SIZES, "us": 10.0, "kernels": "k", "commit": "c"}
DECODE = HERE | {"kv_bits": 4, "b": 1, "ctx": 64, "attends": "full", "gbps": 1.0, "rel_err": None}
SAVED = attention.attention_report(START) | {
    "rows": [DECODE | {"cudnn_bf16_us": None}],
    "append": [HERE | {"kv_bits": 4, "b": 1}],
    "prefill": [HERE | {"b": 8, "tokens": 64, "cudnn_bf16_us": 9.0, "tflops": 1.0}],
    "chunked_prefill": [
        HERE
        | {"kv_bits": 4, "chunk": 64, "ctx": 128, "cudnn_bf16_us": 9.0, "tflops": 1.0}
        | {"rel_err": 1e-3}
    ],
    "baselines": [{"b": 1, "ctx": 64, **SIZES, "cudnn_bf16_us": None}],
}
GONE = object()
DAMAGES: list[Any] = [
    *(("rows", name, GONE) for name in ("us", "gbps", "cudnn_bf16_us", "ctx", "heads", "b")),
    *(("rows", name, "1") for name in ("us", "gbps", "ctx", "rel_err", "cudnn_bf16_us")),
    *(("rows", "us", value) for value in (0, -1.0, None, float("nan"))),
    *(("append", "us", GONE), ("prefill", "tflops", "x"), ("chunked_prefill", "chunk", None)),
    ("baselines", "cudnn_bf16_us", GONE),
    *((name, None, value) for name in ("append", "prefill") for value in (GONE, None, {})),
    *(("ceilings", None, value) for value in ({"a": 1.0}, START["ceilings"] | {"int8_tops": "x"})),
]


@pytest.mark.parametrize("part, column, value", DAMAGES)
def test_a_damaged_report_is_refused(part, column, value, capsys, tmp_path):
    """And the whole one shown, as what is measured is (`test_rows_and_resumption`)."""
    assert attention_report.is_attention(SAVED) and attention_report.table(SAVED)
    made = json.loads(json.dumps(SAVED))
    place, name = (made, part) if column is None else (made[part][0], column)
    place[name] = value
    if value is GONE:
        del place[name]
    path = tmp_path / "saved.json"
    path.write_text(json.dumps(made))
    assert command.main(["kernels", "--op", "attention", "--no-run", "--save", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "results of" in err and "name another" in err
