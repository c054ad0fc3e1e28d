"""The scripts that measure the engine, in the small."""

import argparse
import dataclasses
import importlib
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax import QuantConfig
from qserve_jax.benchmarks import provenance
from qserve_jax.benchmarks.dummy import dummy_model
from qserve_jax.models import CausalLM, ModelConfig
from qserve_jax.runtime.perplexity import perplexity

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TINY = ModelConfig("llama", 256, 128, 256, 2, 2, 1, 64, 512)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


def test_token_losses_are_those_of_perplexity(script):
    """With a 16-bit cache decoding is the same arithmetic as the whole text at once."""
    attends = script("attends")
    loaded = dummy_model(TINY, QuantConfig.preset("w16a16kv16"), dtype=jnp.float32)
    ids = np.random.default_rng(0).integers(0, 256, 96)
    windows = jnp.asarray(ids.reshape(2, 48), jnp.int32)
    losses = attends.token_losses(loaded.model, loaded.params, windows, 16, "full")
    expected = perplexity(CausalLM(TINY), loaded.params, ids, seq_len=48)
    np.testing.assert_allclose(losses.sum(axis=1), expected.window_losses, rtol=1e-5)


def test_rows_compare_with_the_16_bit_cache(script):
    attends = script("attends")
    exact = np.zeros((3, 7))
    worse = exact.copy()
    worse[:, 4:] = [[0.1], [0.2], [0.3]]
    rows = attends.make_rows({"KV16": exact, "KV4 full": exact, "KV4 quantized": worse})
    last = rows[-1]
    assert last["prompt_loss_change"] == 0 and last["decoded_loss_change"] == pytest.approx(0.2)
    assert last["decoded_standard_error"] == pytest.approx(0.1 / 3**0.5)
    assert last["quantized_less_full"] == pytest.approx(0.2)
    assert attends.markdown(rows).count("\n") == 4


@pytest.fixture
def check(script, monkeypatch):
    """batching_check of small pages, and of a model that is there at once."""
    module = script("batching_check")
    monkeypatch.setattr(module, "PAGE", 16)
    monkeypatch.setattr(module, "SUFFIX", 2)
    monkeypatch.setattr(module._cli, "enable_compilation_cache", lambda: None)
    return module


@pytest.mark.slow
def test_batching_check(check, tmp_path):
    loaded, settings = (
        dummy_model(TINY, QuantConfig()),
        check.Settings(16, 60, 60, 8, 0.0, 128, 0.0),
    )
    output = tmp_path / "r.json"
    parts = {part: check.measure(part, loaded, settings, output) for part in check.PARTS}
    together = check.compared(parts, output)
    assert together["equal"] == 1 and together["gaps_at_first_difference"] == []
    assert check.scheduler.WATERMARK == 0.01
    tight, roomy = parts["small pool"], parts["pages for all"]
    assert tight["preemptions"] > 0 and roomy["preemptions"] == 0
    assert tight["prefilled_again"] > 0 and roomy["prefilled_again"] == 0
    assert roomy["compiled_s"] == 0 and roomy["tokens_per_s"] > 0
    assert tight["compiled_s"] == 0 and tight["seconds"]["warm_up"] > 0
    # Tokens are compared in test_consistency.py, on the trained demo: this random model's logits
    # lie so near each other that prefill calls of other shapes (256 and 16 tokens) change some.
    found = parts["prefixes"]
    assert found["prefilled"] == [64 * 130, 130 + 63 * 2]
    parts["prefixes"] = found | {"equal": 1.0, "gaps_at_first_difference": []}
    assert parts["alone"]["requests"] == 16
    assert together["alone, pages for all"]["equal"] > 0.5
    together["of_static"] = 1.0  # sixteen requests say nothing of speed
    assert check.failures(parts, together) == []


def good_parts():
    good = {"as_many_as_asked": True, "pages_free": True, "compiled_s": 0.0, "preemptions": 0}
    good |= {"tokens_per_s": 100.0, "seconds": {"running": 1.0}}
    runs = {name: dict(good) for name in ("pages for all", "small pool", "equal lengths")}
    runs["small pool"] |= {"preemptions": 17, "tokens_per_s": 85.0}
    found = {"times_fewer": 20.0, "gaps_at_first_difference": [], "seconds": {"running": 1.0}}
    few = {"requests": 1, "seconds": {"running": 1.0}}
    return runs | {"prefixes": found, "alone": few}


@pytest.mark.parametrize(
    ("part", "changes", "line"),
    [
        ("small pool", {"as_many_as_asked": False}, "small pool: requests have more or fewer"),
        ("small pool", {"pages_free": False}, "small pool: pages were not given back"),
        ("small pool", {"preemptions": 0}, "small pool: 0 preemptions"),
        ("pages for all", {"preemptions": 3}, "pages for all: 3 preemptions"),
        ("equal lengths", {"compiled_s": 1.5}, "equal lengths: compiled for 1.50 s after"),
        ("together", {"of_static": 0.849}, "0.85 of the static run's tokens/s, less than 0.85"),
        ("together", {"equal": None}, "the tokens are not beside the file: measure the first two"),
        ("prefixes", {"times_fewer": 19.0}, "19.0 times fewer prefilled tokens, less than 20"),
        (
            "prefixes",
            {"gaps_at_first_difference": [0.1, 0.25]},
            "prefixes: shared, 2 requests have other tokens; the two best logits are up to 0.250 ",
        ),
    ],
)
def test_the_batching_check_can_fail(check, part, changes, line):
    parts, together = good_parts(), {"of_static": 0.85, "equal": 1.0}
    assert check.failures(parts, together) == []
    (together if part == "together" else parts[part]).update(changes)
    together = {name: value for name, value in together.items() if value is not None}
    (wrong,) = check.failures(parts, together)
    assert wrong.startswith(line)


def test_differences(check):
    def outputs(*rows):
        found = []
        for tokens, gap in rows:
            top = [argparse.Namespace(top=((0, -1.0), (1, -1.0 - gap)))] * len(tokens)
            found.append(argparse.Namespace(token_ids=tokens, logprobs=top))
        return check.as_arrays(found)

    a = outputs(([1, 2, 3], 0.25), ([4], 1.0), ([1, 2], 0.125))
    b = outputs(([1, 2, 3], 0.5), ([9], 0.5), ([1, 9], 0.5))
    expected = {"equal": pytest.approx(1 / 3), "gaps_at_first_difference": [0.125, 1.0]}
    assert check.differences(a, b) == expected


def test_a_batching_check_that_was_cut_off_goes_on(check, monkeypatch, tmp_path, capsys):
    """Parts are written one by one, what is there is not measured again, and other settings or
    another commit are refused before anything is loaded."""
    output, measured, dies_at = tmp_path / "r.json", [], ["equal lengths"]

    def measure(part, loaded, settings, path):
        assert settings.requests == 9 and path == output
        if part in dies_at:
            raise KeyboardInterrupt
        measured.append(part)
        tokens = {"tokens": np.arange(4), "gaps": np.ones(4), "lengths": np.array([4])}
        np.savez(check.tokens_file(path, part), **tokens)
        return good_parts()[part]

    def main(*flags):
        line = ["x", "--model", "m", "--requests", "9", "--output", str(output), *flags]
        monkeypatch.setattr(sys, "argv", line)
        check.main()
        return json.loads(output.read_text())

    monkeypatch.setattr(check, "measure", measure)
    monkeypatch.setattr(check, "load", lambda args: None)
    with pytest.raises(KeyboardInterrupt):
        main()
    assert list(json.loads(output.read_text())["parts"]) == ["pages for all", "small pool", "alone"]
    dies_at.clear()
    assert "of_static" not in main("--parts", "prefixes")["compared"]
    assert "not measured yet: equal lengths" in capsys.readouterr().out
    report = main()
    assert measured == ["pages for all", "small pool", "alone", "prefixes", "equal lengths"]
    same = {"equal": 1, "gaps_at_first_difference": []}
    together = same | {"alone, pages for all": same, "alone, small pool": same, "of_static": 0.85}
    assert report["compared"] == together and report["failures"] == []
    assert "equal lengths: running 1.0 s" in capsys.readouterr().err
    monkeypatch.setattr(check, "load", None)
    with pytest.raises(SystemExit, match="r.json differs in settings: name another file"):
        main("--pool", "0.1")
    assert main() == report  # which loads nothing
    output.write_text("[]")
    with pytest.raises(SystemExit, match="is no report of this script: name another file"):
        main()
    output = tmp_path / "none" / "r.json"
    with pytest.raises(SystemExit):
        main()
    assert "name a file in a folder that is there" in capsys.readouterr().err


def test_where_a_step_goes(script):
    """Two steps of two layers: what runs once in a loop over the layers is not of a layer."""
    profile_step = script("profile_step")
    layer = [("w4a8_matmul_g128", 10.0), ("rms_norm_quantize", 1.0)]
    kernels = [*layer, *layer, ("loop_add_fusion", 0.5), ("gemm_fusion", 7.5)] * 2
    found = profile_step.summary(kernels, 100e-6, 2, 2)
    assert found["step_ms"] == 0.05 and found["kernel_ms"] == pytest.approx(0.030)
    assert found["gaps"] == pytest.approx(0.4)
    expected = {"matmul": 0.020, "small": 0.002, "head and rest": 0.008}
    assert found["groups_ms"] == pytest.approx(expected)
    assert (found["launches_per_layer"], found["launches_per_step"]) == (2, 6)
    assert profile_step.summary(kernels, 50e-6, 2, 2)["gaps"] is None
    assert found["kernels"][0] == {"name": "w4a8_matmul_g128", "per_step": 2, "us": 10}


def test_a_decoding_can_be_launched_again(script):
    """As the profile does: what a call takes, it gives back."""
    profile_step = script("profile_step")
    loaded = dummy_model(TINY, QuantConfig())
    work = profile_step.Workload(2, 40, 3, {"page_size": 16})
    d = profile_step.make_decoding(loaded, work)
    assert profile_step.timed(lambda: profile_step.launch(d.run, d)) > 0
    _, (state, out) = profile_step.launch(d.run, d)
    assert out.tokens.shape == (2, 3) and (out.tokens >= 0).all()
    assert state.context_lens.tolist() == [43, 43]


def test_a_recorded_call_is_timed_by_its_neighbours(script, monkeypatch):
    profile_step = script("profile_step")
    calls, times = [], iter([0.1, 0.3])
    monkeypatch.setattr(profile_step, "WARM_SECONDS", 0)
    monkeypatch.setattr(profile_step, "timed", lambda call: (call(), next(times))[1])
    monkeypatch.setattr(profile_step, "record", lambda call: [call(), ("kernel", 1.0)][1:])
    kernels, seconds = profile_step.recorded(lambda: calls.append(1))
    assert kernels == [("kernel", 1.0)] and seconds == pytest.approx(0.2) and len(calls) == 3


def test_load_time(script):
    load_time = script("load_time")
    found = load_time.load(str(SCRIPTS.parent / "qserve_jax" / "assets" / "demo"))
    assert found["load_seconds"] > 0 and found["bytes"] > 1e6


def test_tensor_parallel_cases_and_table(script, monkeypatch, tmp_path):
    """A case is a process of `bench decode` with its XLA flags; its ratio is to one GPU's row."""
    module = script("tensor_parallel")
    ran = []

    def run(command, env, timeout, stdout):
        ran.append((command, env["XLA_FLAGS"], env["QSERVE_JAX_SUMS"]))
        if len(ran) == 2:
            raise module.subprocess.TimeoutExpired(command, timeout)
        return argparse.Namespace(returncode=0)

    monkeypatch.setattr(module.subprocess, "run", run)
    monkeypatch.setenv("XLA_FLAGS", "--xla_a")
    args = argparse.Namespace(batch=64, output=tmp_path / "f", input_len=9, output_len=2)
    args.model = None
    assert module.measure(module.CASES[8], args, 5.0) is None
    assert module.measure(module.CASES[0], args, 5.0) == "not done after 5 s"
    assert ran[0][1:] == (f"--xla_a {module.TRITON}", "nccl")
    assert ran[1][1:] == ("--xla_a", "auto")
    bench = serving_command_parser().parse_args(ran[0][0][3:])
    assert (bench.model_shape, bench.tensor_parallel_size, bench.batch) == ("llama3-70b", 2, [64])
    row = {"model": "m", "precision": "p", "gpus": 1, "xla_flags": None, "batch": 64, "input": 9}
    row |= {"output": 2, "tokens_per_s": 100.0, "tpot_ms": 1.0, "weights_gib": 2.0}
    two = {"gpus": 2, "tokens_per_s": 170.0, "xla_flags": "--xla_gpu_x", "all_reduce": None}
    rows = [row, row | two]
    rows.append(row | {"precision": "q", "gpus": 2, "tokens_per_s": None, "problem": "too big"})
    rows += [rows.pop(0)]
    lines = module.table(rows).splitlines()
    cells = lines[2].split(" | ")
    assert cells[3:5] == ["kernel", "x"] and cells[9:12] == ["85", "1.70", "-"]
    assert lines[3].split(" | ")[9:12] == ["100", "1.00", "-"]
    assert lines[4] == "m q on 2: too big"


def test_tensor_parallel_table_of_what_was_measured(script):
    """On two H200: the numbers that docs/tensor_parallel.md cites."""
    file = SCRIPTS.parent / "docs" / "results" / "h200_tensor_parallel.json"
    module = script("tensor_parallel")
    _, _, *lines = module.table(json.loads(file.read_text())["rows"]).splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert [row[:4] + row[8:12] for row in cells] == [
        ["llama3-70b", "w4a8kv4", "1", "-", "4292", "4292", "1.00", "-"],
        ["llama3-70b", "w4a8kv4", "2", "kernel", "6559", "3279", "1.53", "-"],
        ["llama3-70b", "w4a8kv4", "2", "NCCL", "5111", "2555", "1.19", "-"],
        ["qwen2.5-72b", "w4a8kv4", "1", "-", "4198", "4198", "1.00", "3.81"],
        ["qwen2.5-72b", "w16a16kv16", "2", "kernel", "2204", "1102", "-", "1.00"],
    ]


def test_a_tensor_parallel_case_runs(script, monkeypatch, tmp_path, capsys):
    """In small, on CPU devices: what the script makes of `bench decode`'s own row."""
    module, file = script("tensor_parallel"), tmp_path / "rows.json"
    indices = [i for i, case in enumerate(module.CASES) if case[1:3] == ("w16a16kv16", 2)][:1]
    indices += [i for i, case in enumerate(module.CASES) if case[2] == 4][:1]
    demo = SCRIPTS.parent / "qserve_jax" / "assets" / "demo"
    flags = f"--output {file} --model {demo} --batch 2 --input-len 32 --output-len 4 --cases"
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    monkeypatch.setattr(sys, "argv", ["tensor_parallel", *flags.split(), *map(str, indices)])
    module.main()
    measured, left_out, *table = capsys.readouterr().out.splitlines()
    assert " measured " in measured and left_out.endswith("left out: 2 devices")
    (row,) = json.loads(file.read_text())["rows"]
    rate = row["tokens_per_s"]
    cells = table[2].strip("| ").split(" | ")
    assert cells[:4] == ["demo", "w16a16kv16", "2", "NCCL"] and len(table) == 3
    assert cells[8:12] == [f"{rate:.0f}", f"{rate / 2:.0f}", "-", "1.00"]


def serving_command_parser():
    """Of `bench`, without its `python -m`."""
    from qserve_jax import bench

    return bench.build_parser()


@pytest.mark.slow
def test_a_second_process_compiles_nothing(script, tmp_path):
    first_token = script("first_token")
    loaded = dummy_model(dataclasses.replace(TINY, max_position_embeddings=2048), QuantConfig())
    model = tmp_path / "tiny"
    first_token.save_native(model, loaded.params, loaded.config, loaded.quant_config)
    cold, warm = (first_token.generate(model, 256, str(tmp_path / "cache")) for _ in range(2))
    assert not cold["compile_cached"] and warm["compile_cached"]
    for found in (cold, warm):
        assert sum(found[name] for name in first_token.TOLD[:2]) < found["process_seconds"]


@pytest.mark.parametrize(
    "given, flags, expected",
    [(None, "", None), (None, "--a=1", "--a=1"), ("--b=2", "", "--b=2"), ("--b", "--a", "--b --a")],
)
def test_gpu_tests_get_no_blank_flags(script, monkeypatch, tmp_path, given, flags, expected):
    """XLA takes a blank for the name of a file, and ends the process."""
    gpu_tests, seen = script("gpu_tests"), []
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    if given is not None:
        monkeypatch.setenv("XLA_FLAGS", given)
    run = lambda command, cwd, env: seen.append(env.get("XLA_FLAGS")) or 0  # noqa: E731
    monkeypatch.setattr(gpu_tests.subprocess, "call", run)
    assert gpu_tests.run_tests("gpu", ["tests"], flags, 2, tmp_path / "0.xml") == 0
    assert seen == [expected]


def test_gpu_tests_that_did_not_run_keep_their_commit(script, monkeypatch, tmp_path):
    gpu_tests = script("gpu_tests")
    result = tmp_path / "found.json"
    result.write_text(
        '{"files": {"tests.a": {"passed": 9, "commit": "old"}, "tests.b": {"passed": 1}}}'
    )
    told = '<properties><property name="seconds" value="{}"/></properties>'
    cases = told.format(1.5), told.format(0.5) + "<failure/>"
    report = "".join(f'<testcase classname="tests.a">{case}</testcase>' for case in cases)
    report = f"<s>{report}</s>"

    def run(expression, tests, flags, processes, xml):
        assert (expression, tests) == ("gpu", ["tests/a.py"])
        xml.write_text(report)
        return 1

    monkeypatch.setattr(gpu_tests, "run_tests", run)
    monkeypatch.setattr(gpu_tests.jax, "default_backend", lambda: "gpu")
    found = {"device": "X", "commit": "new"}
    monkeypatch.setattr(gpu_tests, "provenance", lambda: found)
    monkeypatch.setattr(sys, "argv", ["gpu_tests", "tests/a.py", "--output", str(result)])
    assert gpu_tests.main() == 1
    kernels = {op: provenance.kernels(op) for op in ("matmul", "attention")}
    a = {"passed": 1, "failure": 1, "most seconds": 1.5, "commit": "new", "kernels": kernels}
    assert json.loads(result.read_text()) == {
        **found,
        "files": {"tests.a": a, "tests.b": {"passed": 1}},
    }


def test_first_token_writes_after_each_process(script, monkeypatch, tmp_path):
    first_token, ran = script("first_token"), []

    def generate(*_):
        if ran:
            raise KeyboardInterrupt
        ran.append(1)
        return {"load_seconds": 1.0}

    monkeypatch.setattr(first_token, "generate", generate)
    monkeypatch.setattr(first_token, "write_checkpoint", lambda *_: None)
    save = tmp_path / "r.json"
    flags = ["x", "--folder", str(tmp_path), "--save", str(save)]
    monkeypatch.setattr(sys, "argv", flags)
    with pytest.raises(KeyboardInterrupt):
        first_token.main()
    report = json.loads(save.read_text())
    assert report["nothing compiled before"] == {"load_seconds": 1.0}
    assert {"device", "commit", "model_shape"} <= report.keys()
    monkeypatch.setattr(sys, "argv", [*flags[:-1], str(tmp_path / "none" / "r.json")])
    with pytest.raises(SystemExit):
        first_token.main()
