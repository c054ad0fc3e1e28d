"""The bench command: flags, files and exit codes; what it measures is tests/benchmarks."""

import json

import jax
import pytest

from qserve_jax import bench
from qserve_jax.benchmarks import plot, report, shapes

ROW = dict.fromkeys(report.ROW, 1.0) | {"backend": "mosaic_sm90", "group_size": 128}
ROW |= {"kernels": "k" * 12, "commit": "c" * 40}
FULL = {
    **{"device": "a GPU", "jax": "1", "commit": "c" * 40, "versions": {}, "baselines": []},
    "protocol": "a stopwatch",
    "ceilings": {"hbm_copy_gbps": 4e3, "bf16_tops": 8e2, "int8_tops": 1e3, "commit": "c" * 40},
    "rows": [ROW],
}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "r.json"
    report.write_report(path, FULL)
    return str(path)


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setattr(bench._cli, "enable_compilation_cache", lambda: None)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")


def test_a_report_without_results_and_a_folder(capsys, tmp_path):
    """What a run leaves that was stopped before its first row."""
    path = tmp_path / "r.json"
    report.write_report(path, FULL | {"ceilings": {}, "rows": []})
    for flags, line in (
        (["--no-run", "--save", str(path)], "has no results yet, leave --no-run out to measure"),
        (["--save", str(tmp_path)], f"--save {tmp_path} is a folder: name a file in it"),
    ):
        assert bench.main(["kernels", *flags]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and line in err


@pytest.mark.parametrize(
    "flags, line",
    [
        ([], "the following arguments are required: WHAT"),
        (["train"], "invalid choice: 'train' (choose from 'kernels', 'throughput', 'decode', 'lat"),
        (["kernels", "--shapes", "28672"], "--shapes '28672' is no shape: give NxK, as 28672x4096"),
        (["kernels", "--shapes", "64x64"], "--shapes '64x64': N must be a multiple of 64 and K"),
        (["kernels", "--tokens", "0"], "'0' is not an integer of at least 1: give one"),
        (["kernels", "--group-size", "64"], "invalid choice: 64"),
        (["kernels", "--backend", "auto"], "invalid choice: 'auto'"),
        (["kernels", "--model-shape", "gpt"], "invalid choice: 'gpt'"),
        (["kernels", "--no-run"], "--no-run shows saved results: name their --save FILE"),
        (["kernels", "--save", "/none/r.json"], "--save /none/r.json: there is no folder /none, "),
        (["kernels", "--save", __file__], "holds no results of this command: name another file"),
        (["kernels", "--no-run", "--save", "/r.json"], "there is no file /r.json, leave --no-run"),
    ],
)
def test_wrong_flags(capsys, flags, line):
    assert bench.main(flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("qserve_jax.bench: error: ") and line in err


BROKEN_ROWS = (ROW | {"us": 0.0}, ROW | {"us": "1"}, ROW | {"n": None}, {**ROW, "bf16_us": "-"})
BROKEN = [
    *({name: value} for name in ("rows", "baselines") for value in (None, {}, [1])),
    *({"ceilings": value} for value in (None, [1], {"hbm_copy_gbps": 1.0})),
    *({"rows": [row]} for row in BROKEN_ROWS),
    *({"commit": 3}, {"jax": None}, {"rows": [ROW | {"commit": None}]}),
    *({"baselines": [{"m": 1}]}, {"op": "attention"}),
]


@pytest.mark.parametrize("change", BROKEN, ids=str)
def test_a_broken_report_and_one_of_attention_are_refused(capsys, tmp_path, change):
    """Before anything is measured, so that no row is mixed into another's file."""
    path = tmp_path / "r.json"
    path.write_text(json.dumps(FULL | change))
    for flags in ([], ["--no-run"]):
        assert bench.main(["kernels", *flags, "--save", str(path)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        assert f"--save {path} holds no results of " in err and "name another file" in err
    assert json.loads(path.read_text()) == FULL | change


def test_plot_without_matplotlib(capsys, monkeypatch, saved):
    monkeypatch.setattr(plot, "can_plot", lambda: False)
    assert bench.main(["kernels", "--no-run", "--save", saved, "--plot", "p.png"]) == 2
    assert "--plot needs matplotlib: pip install 'qserve_jax[plot]'" in capsys.readouterr().err


def test_no_gpu(capsys):
    assert bench.main(["kernels"]) == 1
    assert "no kernel can run here: mosaic_sm90 needs an NVIDIA" in capsys.readouterr().err
    assert bench.main(["kernels", "--backend", "reference"]) == 1
    assert "CUPTI on an NVIDIA GPU, but JAX computes on cpu: run" in capsys.readouterr().err


@pytest.mark.parametrize("output", bench.FORMATS)
def test_saved_results_are_shown_on_any_machine(capsys, saved, output):
    assert bench.main(["kernels", "--no-run", "--save", saved, "--output", output]) == 0
    out, err = capsys.readouterr()
    assert "mosaic_sm90" in out and err == ""
    if output == "json":
        assert json.loads(out) == FULL


def test_shapes_come_once_and_in_order():
    def chosen(*flags):
        return bench.checked_shapes(bench.build_parser().parse_args(["kernels", *flags]))

    assert chosen() == shapes.MODEL_SHAPES["llama3-8b"]
    assert chosen("--shapes", "64x128", "128x128", "64x128") == ((64, 128), (128, 128))
    both = chosen("--model-shape", "llama3-8b", "llama2-7b")
    assert len(both) == 7 and both[:4] == shapes.MODEL_SHAPES["llama3-8b"]
    every = chosen("--model-shape", *bench.MODELS)
    assert len(every) == 17


def test_problems_make_the_exit_code_1(capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda *_: (FULL, ["m=1: too fast", "m=2: failed"]))
    assert bench.main(["kernels"]) == 1
    out, err = capsys.readouterr()
    assert "mosaic_sm90" in out
    assert err == "qserve_jax.bench: error: not measured: m=1: too fast; 1 more above\n"


def test_copies_of_names():
    assert bench.MODELS == tuple(shapes.MODEL_SHAPES)
    assert bench.TOKENS == shapes.TOKENS
    assert bench.FORMATS == tuple(report.FORMATS)
