"""`python -m qserve_jax.quantize`: a calibrated checkpoint, and bad input in one line."""

import json
import shutil
from pathlib import Path

import pytest

from qserve_jax import quantize
from qserve_jax.layerwise import plot
from qserve_jax.quantization.recipes import RECIPES

DEMO = Path(quantize.__file__).parent / "assets" / "demo"


def run(capsys, *argv):
    code = quantize.main([str(word) for word in argv])
    return code, *capsys.readouterr()


def test_flags_know_the_recipes():
    assert set(quantize.NAMED) == set(RECIPES)


@pytest.mark.parametrize(
    ("flags", "weights", "group_size", "kv_bits"),
    [
        ("--recipe qoq", "gptq", 128, 4),
        ("--recipe qoq --group-size -1 --kv-bits 8", "gptq clip", -1, 8),
        ("--recipe qoq-per-channel-no-clipping", "gptq", -1, 4),
        ("--recipe rtn --group-size -1", "", -1, 4),
        ("--recipe qoq --precision w8a8kv8", "", 128, 8),
        ("--precision w4a16kv4 --kv-bits 4 --scale-dtype float16", "gptq", 128, 4),
    ],
)
def test_flags_make_a_recipe(flags, weights, group_size, kv_bits):
    argv = ["--model", "M", "--output", "O", *flags.split()]
    recipe = quantize.make_recipe(quantize.build_parser().parse_args(argv))
    assert [name for name in ("gptq", "clip") if getattr(recipe, name)] == weights.split()
    assert (recipe.quant.group_size, recipe.quant.kv_bits) == (group_size, kv_bits)
    assert recipe.quant.act_bits == (16 if "a16" in flags else 8)
    assert recipe.quant.scale_dtype == ("float16" if "float16" in flags else "float32")


@pytest.fixture
def texts(tmp_path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "empty.txt").write_text(" \n")
    (folder / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    (folder / "short.txt").write_text("Once upon a time there was a little fox. " * 20)
    (folder / "short.jsonl").write_text('{"text": "Once upon a time"}\n' * 40)
    (folder / "bad.jsonl").write_text('{"text": "Once"}\n{"prompt": "x"}\n')
    return folder


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ("--calib-file empty.txt", 2, "empty.txt holds no text: give a file with some"),
        ("--calib-file latin.txt", 2, "latin.txt is not UTF-8 text (byte 1): convert it to UTF-8"),
        ("--calib-file none.txt", 2, "cannot be read (No such file or directory): name a text"),
        ("--calib-file bad.jsonl", 2, 'bad.jsonl:2 has no "text": give {"text": "..."}'),
        (
            "--calib-file short.txt --seq-len 64",
            1,
            "tokens, fewer than --num-samples 128 windows of --seq-len 64 need: give a longer "
            "text, or --num-samples 3",
        ),
        ("--calib-file short.jsonl", 1, "or --num-samples 1 of --seq-len 239"),
        ("--recipe rtn --calib-file short.txt", 2, "--recipe rtn is not calibrated: leave"),
        ("--recipe qoq-per-channel --group-size 128", 2, "--recipe qoq-per-channel is for -1"),
        ("--precision w4a8kv4 --kv-bits 8", 2, "--kv-bits 8 contradicts --precision w4a8kv4"),
        ("--recipe qoc", 2, "invalid choice: 'qoc'"),
        ("--plot none/errors.png", 2, "there is no folder none, make it"),
        ("--plot .", 2, "--plot . is a folder: name a file in it"),
        ("--plot errors.jpgg", 2, "'errors.jpgg' is no picture: end it in .png, .svg or .pdf"),
        (
            "--recipe rtn --output latin.txt/out",
            1,
            "out.partial cannot be made (Not a directory): c",
        ),
    ],
)
def test_bad_input_is_one_line(capsys, texts, tmp_path, monkeypatch, flags, code, message):
    monkeypatch.chdir(texts)
    monkeypatch.setattr(plot, "can_plot", lambda: True)
    got, out, err = run(capsys, "--model", DEMO, "--output", tmp_path / "out", *flags.split())
    assert (got, out) == (code, "") and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_what_cannot_be_quantised(capsys, tmp_path, monkeypatch):
    output = tmp_path / "out"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(DEMO / name, bare)
    monkeypatch.setattr(plot, "can_plot", lambda: False)
    for argv, code, message in (
        (("--model", tmp_path / "none", "--output", output), 1, "no such directory"),
        (("--model", bare, "--output", output), 1, "has no tokenizer to read text with"),
        (("--model", DEMO, "--output", tmp_path / "full"), 2, "exists already"),
        (("--model", DEMO, "--output", output, "--plot", "x.png"), 2, "--plot needs matplotlib"),
    ):
        got, out, err = run(capsys, *argv)
        assert (got, out) == (code, "") and message in err and err.count("\n") == 1, err


def test_rtn_of_the_demo_model(capsys, tmp_path):
    output = tmp_path / "out"
    argv = ("--model", DEMO, "--output", output, "--recipe", "rtn", "--report", "json")
    code, out, err = run(capsys, *argv)
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["bytes_before"] == (DEMO / "model.safetensors").stat().st_size
    assert report["bytes_after"] == sum(f.stat().st_size for f in output.glob("*.safetensors"))
    assert report["peak_bytes"] > report["bytes_after"] and report["seconds"] > 0
    kept = json.loads((output / "quantization_report.json").read_text())
    assert kept == {"settings": report["settings"], "parts": report["parts"]}
    assert (output / "tokenizer.json").is_file()
    config = json.loads((output / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "qserve_jax"


@pytest.mark.slow
def test_qoq_of_the_demo_model_generates(capsys, tmp_path):
    """The whole of it: the shipped text, a checkpoint, and a story."""
    from qserve_jax import generate

    output = tmp_path / "out"
    argv = ("--model", DEMO, "--output", output, "--num-samples", 8, "--seq-len", 2000)
    code, out, err = run(capsys, *argv)
    assert (code, out) == (0, "")
    lines = err.splitlines()
    assert lines[0].startswith("note: --seq-len 2000 is more than the model's context: using 1024")
    assert lines[1].startswith("note: calibrating on 8 x 1024 tokens of children's stories")
    assert lines[2].startswith("qoq: ") and "squared error of the layers' outputs" in lines[3]
    assert " s, at most " in lines[4]
    words = ["--model", output, "--prompt", "Once upon a time", "--max-tokens", 8, "--quiet"]
    assert generate.main([str(word) for word in words]) == 0
    assert capsys.readouterr().out.startswith(", there was a")


def test_curves_of_the_plot():
    part = {"projections": {"q_proj": {"weight_error": 0.5, "output_error": 0.1}}}
    rounded = {"projections": {"q_proj": {"weight_error": 0.5}}}
    parts = [{"part": "x"}, {"layer": 0, "output_error": 0.2, **part}, {"layer": 1, **rounded}]
    curves = plot.error_curves({"parts": parts})
    assert curves == {"whole layer": [(0, 0.2)], "q_proj": [(0, 0.1), (1, 0.5)]}


def test_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    part = {"output_error": 0.2, "projections": {"q_proj": {"weight_error": 0.5}}}
    report = {"settings": {"recipe": {"gptq": False}}, "parts": [{"layer": 0, **part}]}
    plot.plot_errors(report, tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
