"""Serving benchmarks on the CPU, with a tiny random model and with the demo."""

import argparse
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax import LLM, QuantConfig, SamplingParams, bench
from qserve_jax.benchmarks import model_shapes, plot, serving, serving_command, serving_report
from qserve_jax.benchmarks.dummy import dummy_model
from qserve_jax.models import ModelConfig, param_shapes
from qserve_jax.models.sharding import tensor_mesh
from qserve_jax.quantization.packing import dequantize_weight
from qserve_jax.quantization.qtensor import is_quantized, nbytes
from qserve_jax.runtime import device_memory

TINY = ModelConfig("llama", 256, 128, 256, 2, 2, 1, 64, 512)


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    monkeypatch.setitem(model_shapes.MODEL_CONFIGS, "llama3-8b", TINY)
    monkeypatch.setattr(bench._cli, "enable_compilation_cache", lambda: None)


def run(*flags, what="throughput"):
    small = "--dummy-weights --model-shape llama3-8b --input-len 24 --output-len 6 --batch 4"
    return bench.main([what, *small.split(), "--page-size", "16", "--quiet", *flags])


def test_models_are_those_of_the_flags():
    assert tuple(model_shapes.MODEL_CONFIGS) == serving_command.MODELS


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama2-7b", 6.74),
        ("llama2-13b", 13.02),
        ("llama3-70b", 70.55),
        ("mistral-7b", 7.24),
        ("yi-34b", 34.39),
        ("qwen2.5-7b", 7.62),
        ("qwen2.5-72b", 72.71),
        ("qwen1.5-72b", 72.29),
    ],
)
def test_sizes_are_the_published_ones(name, billions):
    """Parameters as the model cards give them; llama3-8b is 8.03, which the fixture replaces."""
    shapes = param_shapes(model_shapes.MODEL_CONFIGS[name])
    leaves = jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple))
    assert sum(map(np.prod, leaves)) / 1e9 == pytest.approx(billions, abs=0.006)


@pytest.mark.parametrize(
    ("precision", "group_size"), [("w4a8kv4", 128), ("w4a8kv4", -1), ("w8a8kv8", -1)]
)
def test_dummy_weights_are_as_large_as_trained_ones(precision, group_size):
    model = dummy_model(TINY, QuantConfig.preset(precision, group_size=group_size))
    kernels = [x for x in jax.tree.leaves(model.params, is_leaf=is_quantized) if is_quantized(x)]
    assert len(kernels) == 7
    for kernel in kernels:
        w = dequantize_weight(kernel)
        k = w.shape[-1]
        assert float(jnp.std(w)) * k**0.5 == pytest.approx(1, rel=0.1)
        assert abs(float(jnp.mean(w))) * k**0.5 < 0.12
    logits = np.asarray(model.model.apply({"params": model.params}, jnp.arange(9)[None]))
    assert np.isfinite(logits).all() and len(np.unique(np.argmax(logits, axis=-1))) > 3


def test_throughput_of_two_precisions_and_a_second_run_that_measures_nothing(tmp_path, capsys):
    path = tmp_path / "r.json"
    flags = ["--precisions", "w4a8kv4", "w16a16kv16", "--save", str(path), "--output", "json"]
    assert run(*flags) == 0
    report = json.loads(path.read_text())
    assert report == json.loads(capsys.readouterr().out)
    assert {"device", "jax", "commit", "rows"} <= report.keys()
    small, large = report["rows"]
    for row in (small, large):
        case = ("llama3-8b", 4, 24, 6, 1)
        assert tuple(row[n] for n in ("model", "batch", "input", "output", "gpus")) == case
        assert row["tokens_per_s"] == pytest.approx(24 / row["seconds"])
        assert 0 < row["ttft_ms"] < 1e3 * row["seconds"]
        assert 0 < row["tpot_ms"] * 5 + row["ttft_ms"] <= 1e3 * row["seconds"] + 1
        assert 0 < row["prefill_wait_s"] + row["decode_wait_s"] <= row["seconds"] * 1.01
        assert row["decode_steps"] == 5 and row["compiled_s"] == 0
    assert (small["precision"], small["group_size"]) == ("w4a8kv4", 128)
    assert (large["precision"], large["group_size"]) == ("w16a16kv16", None)
    assert (small["kv_bytes_per_token"], large["kv_bytes_per_token"]) == (2 * 72, 2 * 256)
    assert small["weights_gib"] < large["weights_gib"]
    before = path.read_text()
    assert run(*flags) == 0 and path.read_text() == before
    assert run(*flags[:2], *flags[3:], "--num-pages", "9") == 0  # another pool is another case
    *rows, other = json.loads(path.read_text())["rows"]
    assert rows == report["rows"] and other["num_pages"] == 9


def test_rows_say_how_much_memory_there_was(monkeypatch, capsys):
    """Of the device that lets JAX use least; processors do not say."""
    flags = ("--batch", "1", "--output-len", "1", "--output", "json")
    assert run(*flags, what="decode") == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["memory_limit_gib"] is None
    limits = [{"bytes_limit": n * 2**30, "peak_bytes_in_use": 1} for n in (126, 90)]
    devices = [argparse.Namespace(memory_stats=lambda found=found: found) for found in limits]
    monkeypatch.setattr(device_memory.jax, "local_devices", lambda: devices)
    assert serving.limit_bytes() == 90 * 2**30
    monkeypatch.setattr(serving, "held_bytes", lambda _: 0)
    loaded = dummy_model(TINY, QuantConfig())
    assert serving.memory(loaded.model, loaded.params, 0, 4)["memory_limit_gib"] == 90


def test_rows_of_other_xla_flags_are_other_cases(tmp_path, monkeypatch, capsys):
    path, told = tmp_path / "r.json", []
    for flags in ("", "", "--xla_cpu_enable_fast_min_max=false"):
        monkeypatch.setenv("XLA_FLAGS", flags)
        assert run("--batch", "1", "--output-len", "1", "--save", str(path), what="decode") == 0
        told.append([row["xla_flags"] for row in json.loads(path.read_text())["rows"]])
    assert told == [[None], [None], [None, "--xla_cpu_enable_fast_min_max=false"]]


def test_decode_and_its_table(capsys):
    assert run("--batch", "1", "4", what="decode") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| bench | model | precision |") and len(lines) == 4
    assert lines[2].startswith("| decode | llama3-8b | w4a8kv4 | 128 | 1 | 1 | 24 | 6 | - | ")


def test_decode_steps_start_from_a_full_cache():
    """The measured loop makes all its tokens, over as many cached ones as was asked."""
    loaded = dummy_model(TINY, QuantConfig())
    row = serving.decode(loaded, serving.Workload(2, 40, 5, {"page_size": 16}), repeats=1)
    assert row["tokens_per_s"] == pytest.approx(10 / row["seconds"])
    assert row["cache_gib"] * 2**30 == 2 * 3 * 16 * row["kv_bytes_per_token"]
    assert row["weights_gib"] * 2**30 == pytest.approx(nbytes(loaded.params))


def test_what_is_decoded_is_as_random_as_text():
    """No two sequences are alike, and every token of theirs is in the cache: what a GPU computes
    over zeros takes it less power."""
    work = serving.Workload(4, 40, 3, {"page_size": 16})
    d = serving.make_decoding(dummy_model(TINY, QuantConfig()), work)
    prompts = work.prompts(256, 0)
    assert d.state.tokens.tolist() == [prompt[-1] for prompt in prompts]
    pages = np.asarray(d.cache.pages).reshape(2, 4, 3, -1)  # layers, sequences, pages
    assert len({page.tobytes() for page in pages.reshape(24, -1)}) == 24
    _, _, out = d.run(d.params, d.cache, d.state, d.steps)
    assert len({tuple(row) for row in np.asarray(out.tokens).tolist()}) == 4


def test_bytes_of_shared_models_are_those_of_one_device(monkeypatch, capsys):
    """It has half of every kernel, of the embedding, the head and each page, and all of the norms
    and of the channel scales of o and down."""
    shared = dataclasses.replace(TINY, num_heads=4, num_kv_heads=2)
    monkeypatch.setitem(model_shapes.MODEL_CONFIGS, "llama3-8b", shared)

    def row(gpus, what):
        flags = ("--tensor-parallel-size", str(gpus), "--output-len", "2", "--output", "json")
        assert run(*flags, what=what) == 0
        (row,) = json.loads(capsys.readouterr().out)["rows"]
        assert row["gpus"] == gpus and f" 128 | {gpus} | 4 |" in serving_report.markdown([row])
        return row

    one, whole = row(1, "decode"), (2 * 2 + 1) * 128 * 2 + 2 * 2 * 128 * 4
    for two in row(2, "decode"), row(2, "throughput"):
        bytes_of_one, bytes_of_two = (r["weights_gib"] * 2**30 for r in (one, two))
        assert bytes_of_two == pytest.approx((bytes_of_one - whole) / 2 + whole, abs=0.5)
        assert two["kv_bytes_per_token"] == one["kv_bytes_per_token"] / 2 == 2 * 72
        pages = two["cache_gib"] * 2**30 / (16 * 2 * 72)
        assert pages == {"decode": 8, "throughput": 9}[two["bench"]]


@pytest.mark.parametrize("ranks", [1, 2])
def test_decoding_is_compiled_once(ranks):
    config = dataclasses.replace(TINY, num_heads=4, num_kv_heads=2)
    loaded = dummy_model(config, QuantConfig(), mesh=tensor_mesh(ranks))
    d = serving.make_decoding(loaded, serving.Workload(2, 4, 3, {"page_size": 16}))
    cache, state = d.cache, d.state
    for _ in range(2):
        cache, state, _ = d.run(d.params, cache, state, d.steps)
    assert d.run._cache_size() == 1  # pyright: ignore


def test_latency(capsys):
    flags = ["--rate", "200", "--num-requests", "12", "--output", "json"]
    assert run(*flags, what="latency") == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["rate"], row["num_requests"]) == (200.0, 12)
    assert row["tokens_per_s"] == pytest.approx(72 / row["seconds"])
    for name in ("ttft", "tpot"):
        low, middle, high = (row[f"{name}_p{q}_ms"] for q in (50, 90, 99))
        assert 0 < low <= middle <= high < 1e3 * row["seconds"]
    assert row["compiled_s"] == 0 and "problem" not in row


def test_a_row_that_compiled_says_so(monkeypatch, capsys):
    monkeypatch.setattr(serving, "warm_up", lambda *_: None)
    assert run("--num-pages", "41") == 0  # of a cache that no other test has
    problem = capsys.readouterr().out.splitlines()[-1]
    assert problem.startswith("compiled for ") and problem.endswith("it is faster than that")


def test_what_does_not_fit_is_a_row(monkeypatch, capsys):
    def out_of_memory(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GiB\nmore")

    monkeypatch.setattr(serving, "decode", out_of_memory)
    assert run("--output", "csv", what="decode") == 0
    header, row = capsys.readouterr().out.splitlines()
    cells = dict(zip(header.split(","), row.split(","), strict=True))
    assert cells["tokens_per_s"] == ""
    assert cells["problem"] == "does not fit: RESOURCE_EXHAUSTED: 9 GiB"


def test_weights_that_do_not_fit_are_rows_too(monkeypatch, capsys):
    """And the next precision is measured."""
    load = serving_command.load

    def loads(args, precision):
        if precision == "w16a16kv16":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 145 GiB")
        return load(args, precision)

    monkeypatch.setattr(serving_command, "load", loads)
    flags = ["--precisions", "w16a16kv16", "w4a8kv4", "--batch", "1", "2", "--output", "json"]
    assert run(*flags, what="decode") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["batch"] for row in rows] == [1, 2, 1, 2]
    for row in rows[:2]:
        assert (row["precision"], row["group_size"]) == ("w16a16kv16", None)
        assert row["tokens_per_s"] is None
        assert row["problem"] == "does not fit: RESOURCE_EXHAUSTED: 145 GiB"
    assert all(row["tokens_per_s"] > 0 for row in rows[2:])


def test_places_are_given_away_at_once_and_a_call_is_always_on_its_way(monkeypatch):
    """40 requests of random lengths in 8 places: few decode steps with an idle place; and the host
    looks at a decode call only after it has launched the next one, while there is one."""
    llm = LLM(dummy_model(TINY, QuantConfig()), max_num_seqs=8, num_pages=64, page_size=16)
    lengths = np.random.default_rng(0).integers(1, 40, 40).tolist()
    process, alone = llm.engine._process, []

    def watched(call):
        more = any(s.steps_left > 0 for s in llm.engine.scheduler.running)
        alone.append(more and not llm.engine._calls)
        process(call)

    monkeypatch.setattr(llm.engine, "_process", watched)
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in lengths]
    outputs = llm.generate([[i] * 5 for i in range(40)], params)
    assert [len(o.token_ids) for o in outputs] == lengths
    assert llm.stats.decode_steps <= 1.25 * sum(lengths) / 8 + 20
    assert not any(alone) and len(alone) > 40


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--dummy-weights"], "--dummy-weights and --model-shape go together"),
        (["--model-shape", "llama3-8b"], "--dummy-weights and --model-shape go together"),
        (["--batch", "0"], "'0' is not an integer of at least 1: give one"),
        (["--precision", "w4a8kv4", "--precisions", "w4a8kv8"], "contradict each other"),
        (["--save", "/none/r.json"], "--save /none/r.json: there is no folder /none, make it"),
        (["--save", __file__], "holds no results of this command: name another file"),
        (["--save", "/"], "--save / is a folder: name a file in it"),
        (["--plot", "/none/p.png"], "--plot /none/p.png: there is no folder /none, make it"),
        (["--rate", "1"], "unrecognized arguments: --rate (see"),
    ],
)
def test_wrong_flags(capsys, flags, line):
    assert bench.main(["throughput", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and line in err


@pytest.mark.parametrize("what", serving_command.PROTOCOLS)
def test_requests_longer_than_the_context(capsys, what):
    assert run("--output-len", "500", what=what) == 1
    message = "--input-len 24 and --output-len 500 are more than the model's context of 512: lower"
    assert message in capsys.readouterr().err


def test_latency_is_of_one_process(capsys):
    flags = ["--coordinator-address", "a:1", "--num-processes", "2", "--process-id", "0"]
    assert run(*flags, what="latency") == 2
    assert "(a:1) but bench latency runs in one process" in capsys.readouterr().err


def test_errors_of_the_library_name_flags(capsys):
    flags = ["--precision", "w4a8kv4", "--tensor-parallel-size", "4"]
    assert bench.main(["decode", *flags]) == 1
    error = capsys.readouterr().err
    assert "bench: error: --tensor-parallel-size 4 does not divide 4 query and 2 KV heads" in error
    assert error.endswith("use 1 or 2, or quantise with --group-size -1\n")


def test_the_longest_request_is_that_of_the_flag(capsys):
    assert run("--max-model-len", "20") == 1
    assert "prompt has 24 tokens but the context holds 20" in capsys.readouterr().err


def test_rows_of_another_commit_are_measured_again(tmp_path, capsys):
    path = tmp_path / "r.json"
    assert run("--batch", "1", "2", "--save", str(path), what="decode") == 0
    first = json.loads(path.read_text())
    here = first["commit"]
    assert [(row["batch"], row["commit"]) for row in first["rows"]] == [(1, here), (2, here)]
    for row in first["rows"]:
        row |= {"commit": "old", "tokens_per_s": -1.0}
    path.write_text(json.dumps(first))
    assert run("--batch", "2", "--save", str(path), what="decode") == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["batch"], row["commit"]) for row in rows] == [(1, "old"), (2, here)]
    assert [row["tokens_per_s"] > 0 for row in rows] == [False, True]
    assert run("--batch", "2", "--save", str(path), what="decode") == 0
    assert json.loads(path.read_text())["rows"] == rows


def test_results_of_another_machine_do_not_mix(tmp_path, capsys):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(serving_report.empty_report() | {"device": "another"}))
    assert run("--save", str(path)) == 2
    assert "is of device 'another', this is 'cpu': name another file" in capsys.readouterr().err


def test_curves(tmp_path):
    base = {"model": "m", "precision": "p", "tokens_per_s": 5.0}
    rows = [
        {**base, "bench": "throughput", "batch": 64},
        {**base, "bench": "throughput", "batch": 1, "tokens_per_s": 2.0},
        {**base, "bench": "throughput", "batch": 512, "tokens_per_s": None},
        {**base, "bench": "latency", "rate": 2.0, "ttft_p50_ms": 7.0},
    ]
    assert serving_report.curves(rows) == {
        "throughput": {"m p": [(1, 2.0), (64, 5.0)]},
        "latency": {"m p": [(2.0, 7.0)]},
    }
    if plot.can_plot():
        serving_report.plot({"device": "x", "rows": rows}, tmp_path / "p.png")
        assert (tmp_path / "p.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="there is no row to plot"):
        serving_report.plot({"device": "x", "rows": rows[2:3]}, tmp_path / "q.png")
