"""`python -m qserve_jax.convert`: formats into each other, and bad input in one line."""

import filecmp
import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from qserve_jax import convert
from qserve_jax.checkpoint.qserve_format import S2_ORDERS

ROOT = Path(__file__).resolve().parent
GOLDEN = ROOT / "golden" / "yi"
DEMO = ROOT.parent / "qserve_jax" / "assets" / "demo"


def run(capsys, *argv):
    code = convert.main([str(word) for word in argv])
    return code, *capsys.readouterr()


def test_flags_know_the_orders():
    assert tuple(S2_ORDERS) == convert.S2_ORDERS


def test_round_through_all_formats_changes_no_byte(tmp_path, capsys):
    steps = [
        ("first", "qserve"),
        ("n", "native"),
        ("o", "orbax"),
        ("n2", "native"),
        ("q", "qserve"),
    ]
    source = DEMO
    for name, target in steps:
        output = tmp_path / name
        argv = ("--model", source, "--output", output, "--to", target, "--report", "json")
        code, out, err = run(capsys, *argv)
        assert (code, err) == (0, "")
        report = json.loads(out)
        assert report["to"] == target and report["precision"] == "w4a8kv4"
        assert report.get("largest_scale_error", 0) == 0
        assert (output / "tokenizer.json").is_file() and not (tmp_path / f"{name}.partial").exists()
        source = output
    weights = "model.safetensors"
    assert filecmp.cmp(tmp_path / "first" / weights, tmp_path / "q" / weights, shallow=False)
    assert filecmp.cmp(tmp_path / "n" / weights, tmp_path / "n2" / weights, shallow=False)
    embedding = load_file(tmp_path / "q" / weights)["model.embed_tokens.weight"]
    original = load_file(DEMO / weights)["model.embed_tokens.weight"]
    np.testing.assert_array_equal(embedding, original.astype(np.float16))


def test_text_report(tmp_path, capsys):
    argv = ("--model", DEMO, "--output", tmp_path / "n", "--to", "native", "--group-size", -1)
    code, out, err = run(capsys, *argv)
    assert (code, out) == (0, "")
    assert err.startswith("float -> native, w4a8kv4: ") and "by round-to-nearest" in err


@pytest.mark.parametrize(("precision", "told"), [("w4a8kv8", True), ("w4a8kv4", False)])
def test_bits_that_the_format_does_not_hold_are_told(tmp_path, capsys, precision, told):
    argv = ("--model", DEMO, "--output", tmp_path / "q", "--to", "qserve", "--precision", precision)
    code, out, err = run(capsys, *argv)
    assert (code, out) == (0, "") and (f"load it with --precision {precision}" in err) == told


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--model, --output, --to"),
        (["--model", "m", "--output", "{tmp}/x", "--to", "gguf"], "invalid choice: 'gguf'"),
        (["--model", "m", "--output", "{tmp}", "--to", "native"], "--output: .* exists already"),
        (["--model", "m", "--output", "{tmp}/x", "--to", "native", "--s2-order", "y"], "invalid"),
    ],
)
def test_wrong_flags_are_one_line_and_2(tmp_path, capsys, argv, words):
    (tmp_path / "file").touch()
    code, out, err = run(capsys, *(word.replace("{tmp}", str(tmp_path)) for word in argv))
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert re.search(words, err)


def test_bad_input_is_one_line_and_1(tmp_path, capsys):
    output = tmp_path / "x"
    argv = ("--output", output, "--to", "native", "--model")
    code, out, err = run(capsys, *argv, tmp_path / "none")
    assert (code, out) == (1, "") and "no such directory" in err and err.count("\n") == 1
    # K=24 is no multiple of the tile
    argv = ("--output", output, "--to", "qserve", "--group-size", -1, "--model", GOLDEN)
    code, out, err = run(capsys, *argv)
    assert (code, out) == (1, "") and "needs N a multiple of 32" in err.splitlines()[-1]
    assert "Traceback" not in err and not list(tmp_path.iterdir())
