"""Bad input ends with its exit code and one line that names the value, the limit and the cure."""

import io
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qserve_jax.generate import main

GOLDEN = Path(__file__).parent / "golden" / "llama_mha"
FLOAT = ("--precision", "w16a16kv16", "--dtype", "float32")


def error_line(capsys, argv, code):
    """Runs the command; returns what follows the prefix of its one line on stderr."""
    assert main([str(word) for word in argv]) == code
    out, err = capsys.readouterr()
    prefix = "qserve_jax.generate: error: "
    assert out == "" and err.startswith(prefix) and err.count("\n") == 1 and err.endswith("\n")
    return err.removeprefix(prefix)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--max-tokens -5", ["--max-tokens -5", ">= 1", "use 1"]),
        ("--max-tokens x", ["--max-tokens", "'x'", "int"]),
        ("--temperature -0.5", ["--temperature -0.5", ">= 0", "use 0"]),
        ("--temperature nan", ["--temperature nan", ">= 0", "use 0"]),
        ("--top-p 0", ["--top-p 0.0", "(0, 1]", "use 1"]),
        ("--top-p 1.5", ["--top-p 1.5", "(0, 1]", "use 1"]),
        ("--top-k -2", ["--top-k -2", ">= -1", "use 0"]),
        ("--min-p 2", ["--min-p 2.0", "[0, 1]", "use 0"]),
        ("--repetition-penalty 0", ["--repetition-penalty 0.0", "> 0", "use 1"]),
        ("--presence-penalty 3", ["--presence-penalty 3.0", "[-2, 2]", "use 0"]),
        ("--num-samples 2", ["--num-samples 2", "temperature > 0", "or --num-samples 1"]),
        ("--num-samples 20000 --temperature 1", ["--num-samples 20000", "[1, 16384]"]),
        ("--logprobs 21 --output json", ["--logprobs 21", "[0, 20]"]),
        ("--logprobs 2", ["--logprobs 2", "--output json"]),
        ("--stop-token-ids -1", ["--stop-token-ids", "-1", ">= 0"]),
        ("--precision w3a8kv4", ["--precision", "'w3a8kv4'", "w4a8kv4", "w16a16kv16"]),
        ("--group-size 64", ["--group-size", "64", "-1, 128"]),
        ("--backend cuda", ["--backend", "'cuda'", "auto", "reference"]),
        ("--backend mosaic_sm90", ["mosaic_sm90", "JAX computes on cpu", "auto or reference"]),
        ("--dtype int8", ["--dtype", "'int8'", "bfloat16"]),
        ("--max-model-len 1", ["--max-model-len", "'1'", "at least 2"]),
        ("--page-size 0", ["--page-size", "'0'", "at least 1"]),
        ("--num-pages -3", ["--num-pages", "'-3'", "at least 1"]),
        ("--max-num-seqs 0", ["--max-num-seqs", "'0'", "at least 1"]),
        ("--seed -1", ["--seed", "'-1'", "0..9223372036854775807"]),
        ("--tensor-parallel-size 64", ["--tensor-parallel-size 64", "4 cpu", "at most 4"]),
        ("--stream --output json", ["--stream", "json", "leave it out"]),
        ("--stream --prompt b", ["--stream", "2", "leave it out"]),
        ("--prompt - --prompt -", ["--prompt -", "once"]),
        ("--system-prompt b --no-chat-template", ["--system-prompt", "--no-chat-template"]),
        ("--stop a\udcff", ["--stop ", "'a\\udcff'", "UTF-8", "correct"]),
        ("--system-prompt \udcff", ["--system-prompt '\\udcff'", "UTF-8", "correct"]),
        ("--prompt \udcff", ["--prompt 2 of 2: ", "'\\udcff'", "UTF-8", "remove"]),
        ("--temp 1", ["unrecognized arguments", "--temp", "--help"]),
    ],
)
def test_flag(capsys, argv, words):
    line = error_line(capsys, ["--prompt", "a", "--model", "/nowhere", *argv.split()], 2)
    assert [word for word in words if word not in line] == []


def test_no_prompt(capsys):
    line = error_line(capsys, [], 2)
    assert "no prompt" in line and "--prompt TEXT" in line and "--prompts-file" in line


def test_empty_prompt(capsys):
    assert "--prompt: prompt '' is empty" in error_line(capsys, ["--prompt", ""], 2)


def test_stdin_that_is_not_utf8(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    line = error_line(capsys, ["--prompt", "-"], 2)
    assert "--prompt -: stdin is not text" in line and "0xff" in line and "give UTF-8" in line


def test_missing_prompts_file(capsys, tmp_path):
    line = error_line(capsys, ["--prompts-file", tmp_path / "none.jsonl"], 2)
    assert str(tmp_path / "none.jsonl") in line and "No such file" in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "a"}\n\n{"prompt": \n', ["line 3 is not JSON", '{"prompt": ...}']),
        ('{"prompt": "a"}\n"b"\n', ["line 2 is", '"b"', "as its one key"]),
        ('{"text": "a"}', ["line 1", '{"text": "a"}', "prompt_token_ids or messages"]),
        ('{"prompt": "a", "id": 3}', ["line 1", '"id": 3', "one key"]),
        ('{"prompt": ""}', ["line 1", "prompt ''", "is empty"]),
        ('{"prompt": 3}', ["line 1", "prompt 3 must be a string"]),
        ('{"prompt_token_ids": []}', ["line 1", "prompt_token_ids []", "is empty"]),
        ('{"prompt_token_ids": [1, -1]}', ["[1, -1]", "a list of integers from 0"]),
        ('{"prompt_token_ids": [true]}', ["[True]", "a list of integers from 0"]),
        ('{"messages": [{"role": "user"}]}', ["line 1", "'user'", '"content"']),
        ('{"prompt": "\\ud800"}', ["line 1", "'\\ud800'", "UTF-8", "remove"]),
        (
            '{"messages": [{"role": "user", "content": "\\ud800"}]}',
            ["line 1", "UTF-8", "remove"],
        ),
        ('{"prompt": "a"}\n' + "[" * 10**5, ["line 2 is not JSON", "recursion"]),
        (f'{{"prompt_token_ids": [{"9" * 5000}]}}', ["line 1 is not JSON", "4300 digits"]),
        ("\n \n", ["holds no prompt", "one a line"]),
    ],
)
def test_prompts_file(capsys, tmp_path, text, words):
    (tmp_path / "p.jsonl").write_text(text)
    line = error_line(capsys, ["--prompts-file", tmp_path / "p.jsonl"], 2)
    assert str(tmp_path / "p.jsonl") in line
    assert [word for word in words if word not in line] == []


def test_line_of_a_prompt_that_is_too_long(fails, prompts):
    prompts.write_text('{"prompt_token_ids": [3]}\n' + prompts.read_text())
    line = fails(GOLDEN, "--max-model-len", "32")
    assert line.startswith(f"{prompts} line 2: prompt has 37 tokens")


@pytest.mark.parametrize("flags", [("--no-chat-template",), ("--system-prompt", "b")])
def test_messages_and_flags_that_contradict_them(capsys, tmp_path, flags):
    (tmp_path / "p.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}')
    assert flags[0] in error_line(capsys, ["--prompts-file", tmp_path / "p.jsonl", *flags], 2)


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt_token_ids": list(range(3, 40))}))
    return tmp_path / "p.jsonl"


@pytest.fixture
def fails(capsys, prompts):
    """Runs a prompt of 37 token ids through a checkpoint; returns the error."""

    def fails(model, *flags, code=1):
        argv = ["--model", model, *FLOAT, "--prompts-file", prompts, "--output", "json", *flags]
        return error_line(capsys, argv, code)

    return fails


@pytest.fixture
def checkpoint(tmp_path):
    return Path(shutil.copytree(GOLDEN, tmp_path / "model"))


def edit_config(checkpoint, **changes):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | changes))


def edit_weights(checkpoint, edit):
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def test_missing_directory(fails, tmp_path):
    line = fails(tmp_path / "nowhere")
    assert f"no such directory: {tmp_path / 'nowhere'}" in line and "pass" in line


def test_truncated_safetensors(fails, checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    line = fails(checkpoint)
    assert str(file) in line and "truncated" in line


def test_corrupt_safetensors(fails, checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(b"\xff" * 500)
    line = fails(checkpoint)
    assert str(file) in line and "corrupt" in line


def test_wrong_shapes(fails, checkpoint):
    def edit(tensors):
        tensors["model.norm.weight"] = np.ones(31, np.float32)
        tensors["lm_head.weight"] = np.ones((96, 16), np.float32)

    edit_weights(checkpoint, edit)
    line = fails(checkpoint)
    for word in ("model.norm.weight", "31", "32", "lm_head.weight", "96", "16"):
        assert word in line


def test_nan_weights(fails, checkpoint):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(checkpoint, lambda tensors: tensors[name].__setitem__((3, 4), np.nan))
    line = fails(checkpoint)
    assert name in line and "NaN" in line


def test_unknown_model_type(fails, checkpoint):
    edit_config(checkpoint, model_type="mamba")
    line = fails(checkpoint)
    assert "'mamba'" in line and "llama, mistral, qwen2, qwen3" in line


def test_unsupported_rope(fails, checkpoint):
    edit_config(checkpoint, rope_scaling={"rope_type": "longrope", "factor": 2.0})
    line = fails(checkpoint)
    assert "longrope" in line and "yarn" in line


def test_prompt_longer_than_the_context(fails):
    line = fails(GOLDEN, "--max-model-len", "32")
    assert "37 tokens" in line and "the context holds 32" in line and "at most 31" in line


def test_context_longer_than_the_model(fails):
    line = fails(GOLDEN, "--max-model-len", "4096")
    assert "--max-model-len 4096" in line and "2..128" in line


def test_page_pool_too_small(fails):
    line = fails(GOLDEN, "--page-size", "16", "--num-pages", "2", "--max-tokens", "8")
    assert "3 pages of 16 tokens" in line and "the pool has 2" in line
    assert "raise --num-pages or lower --max-tokens" in line


def test_token_id_outside_the_vocabulary(fails, prompts):
    prompts.write_text('{"prompt_token_ids": [3, 96]}')
    assert f"{prompts} line 1: token id 96 is outside the vocabulary 0..95" in fails(GOLDEN)


def test_stop_token_id_outside_the_vocabulary(fails):
    line = fails(GOLDEN, "--stop-token-ids", "96")
    assert "--stop-token-ids has token id 96, but vocab_size=96" in line


def test_stop_string_without_tokenizer(fails):
    assert "--stop ('.',) needs a tokenizer" in fails(GOLDEN, "--stop", ".")


def test_text_output_without_tokenizer(fails):
    line = fails(GOLDEN, "--output", "text")
    assert str(GOLDEN) in line and "--output json" in line


def test_text_prompt_without_tokenizer(fails):
    line = fails(GOLDEN, "--prompt", "a")
    assert f"{GOLDEN} has no tokenizer" in line and '{"prompt_token_ids": [...]}' in line


def test_unknown_backend_in_the_environment(fails, monkeypatch):
    monkeypatch.setenv("QSERVE_JAX_BACKEND", "cuda")
    line = fails(GOLDEN)
    assert "'cuda'" in line and "reference" in line


def test_unwritable_cache_folder_only_warns(tmp_path, monkeypatch, capsys, prompts):
    cache = jax.config.jax_compilation_cache_dir
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "cache"  # not writable for root either
    monkeypatch.setenv("QSERVE_JAX_CACHE", str(folder))
    argv = ["--model", GOLDEN, *FLOAT, "--prompts-file", prompts, "--output", "json", "--quiet"]
    try:
        assert main([str(word) for word in [*argv, "--max-tokens", "2", "--ignore-eos"]]) == 0
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)
    out, err = capsys.readouterr()
    assert len(json.loads(out)["token_ids"]) == 2
    assert err.startswith("warning: ") and str(folder) in err and err.count("\n") == 1
