"""The command `python -m qserve_jax.generate`: what it prints where, and what its flags do."""

import copy
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from qserve_jax import LLM, _cli, checkpoint, load_model
from qserve_jax.checkpoint.export import DTYPES
from qserve_jax.generate import build_parser, checked_arguments, engine_prompt, main
from qserve_jax.pallas_kernels import BACKENDS
from qserve_jax.quantization.config import PRECISIONS
from qserve_jax.runtime import SamplingParams, llm
from qserve_jax.runtime.prompts import encode_prompt

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "llama_mha"
FLOAT = ["--precision", "w16a16kv16", "--dtype", "float32"]
STORY = (
    ", there was a little girl named Lily. She loved to play outside in the park. One day, she "
    "saw a big, red ball."
)
STATS = re.compile(
    r"Load \d+\.\d s · compile \d+\.\d s( \(cached\))? · prompt \d+ tok, [\d.]+ tok/s, "
    r"TTFT [\d.]+ ms · generation \d+ tok, [\d.]+ tok/s \([\d.]+ ms/tok\) · "
    r"weights \d+\.\d [KM]iB W32A32 · KV32 \d+ B/tok · peak \d+\.\d [MG]iB · [\d.]+ [MGT]B/s on .+"
)


@pytest.fixture(scope="module")
def story_model(shared_data):
    return load_model(shared_data / "stories260k-hf", precision="w16a16kv16", dtype="float32")


@pytest.fixture(scope="module")
def story_llm(story_model):
    return LLM(story_model, max_num_seqs=2, seed=0)


@pytest.fixture
def run(monkeypatch, capsys, story_model):
    """Runs the command on a model that is loaded already; returns stdout and stderr."""

    def run(llm, *argv):
        monkeypatch.setattr(_cli, "load", lambda args: (story_model, 0.0))
        monkeypatch.setattr(_cli, "make_llm", lambda *args: llm)
        assert main(argv) == 0
        return capsys.readouterr()

    return run


@pytest.fixture
def greedy():
    """A prompt and the tokens that transformers makes of it."""
    with np.load(GOLDEN / "expected.npz") as arrays:
        return arrays["prompt"].tolist(), arrays["greedy"].tolist()


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_json_from_a_checkpoint_without_tokenizer(tmp_path, monkeypatch, capsys, greedy):
    """A whole run: load, prompts of two lengths, log-probabilities, statistics."""
    monkeypatch.delenv("QSERVE_JAX_CACHE", raising=False)
    ids, continuation = greedy
    record = {"prompt_token_ids": ids}
    prompts = write_lines(tmp_path / "p.jsonl", record, {"prompt_token_ids": [5]})
    argv = ["--model", str(GOLDEN), *FLOAT, "--prompts-file", prompts, "--output", "json"]
    assert main([*argv, "--max-new-tokens", "9", "--ignore-eos", "--logprobs", "2"]) == 0
    out, err = capsys.readouterr()
    first, second = map(json.loads, out.splitlines())
    assert (first["index"], first["sample"], second["index"]) == (0, 0, 1)
    assert first["prompt_token_ids"] == ids and second["prompt_token_ids"] == [5]
    assert first["token_ids"] == continuation[:9] and len(second["token_ids"]) == 9
    assert (first["text"], first["finish_reason"]) == ("", "length")
    for token, made in zip(first["token_ids"], first["logprobs"], strict=True):
        assert made["token_id"] == token and len(made["top"]) == 2
        assert made["top"][0] == [token, made["logprob"]]  # greedy: the likeliest
    stats, whole = first["stats"], first["run"]
    assert (stats["prompt_tokens"], stats["generated_tokens"]) == (len(ids), 9)
    assert 0 < stats["time_to_first_token"] < stats["total_time"]
    assert (whole["prompt_tokens"], whole["generated_tokens"]) == (len(ids) + 1, 18)
    assert whole["weight_format"] == "W32A32" and whole["compile_seconds"] > 0
    (line,) = err.splitlines()
    assert STATS.fullmatch(line)


def test_text_of_one_sample_is_all_of_stdout(run, story_llm):
    argv = ["--prompt", "Once upon a time", "--stop", " She wanted"]
    for flag in ("--stream", "--no-stream"):
        out, err = run(story_llm, *argv, flag)
        assert out == STORY + "\n"
        (line,) = err.splitlines()
        assert STATS.fullmatch(line)


def test_only_the_engine_tells_of_a_long_text(story_llm, caplog):
    """The tokenizer's own warning is not shown; a chat's tokens are those of transformers."""
    tokenizer = copy.copy(story_llm.tokenizer)
    tokenizer.model_max_length = 4
    tokenizer.chat_template = "{% for m in messages %}{{ bos_token + m.content }}{% endfor %}"
    messages, size = [{"role": "user", "content": "Once upon a time"}], len(tokenizer)
    assert len(encode_prompt("Once upon a time", tokenizer, size)) > 4
    ids = encode_prompt(messages, tokenizer, size)
    assert not caplog.records
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert ids == expected["input_ids"] and ids.count(tokenizer.bos_token_id) == 1
    assert "longer than the specified maximum" in caplog.text  # it would have been seen
    for prompt in ("a\udcff", [{"role": "user", "content": "a\udcff"}]):
        with pytest.raises(ValueError, match=r"'.*a\\udcff' is not UTF-8 text"):
            encode_prompt(prompt, tokenizer, size)


def test_text_is_streamed_in_pieces(run, story_llm, monkeypatch):
    class Stdout(io.StringIO):
        def flush(self):
            flushed.append(self.getvalue())

    flushed = []
    monkeypatch.setattr(sys, "stdout", Stdout())
    run(story_llm, "--prompt", "Once upon a time", "--max-tokens", "24")
    pieces = sorted(set(flushed), key=len)
    assert len(pieces) > 3 and all(pieces[-1].startswith(piece) for piece in pieces)


def test_more_tokens_than_fit_are_told(run, story_llm):
    most, prompt = story_llm.max_model_len, "Once upon a time"
    _, err = run(story_llm, "--prompt", prompt, "--max-tokens", str(most), "--stop", ".")
    words = f"note: --max-tokens {most}: completions end where prompt and completion are {most}"
    assert words in err
    _, err = run(story_llm, "--prompt", prompt, "--max-tokens", "8")
    assert "note: --max-tokens" not in err


def test_text_of_several_prompts_has_headers(run, story_llm):
    argv = ["--prompt", "Once upon a time", "--prompt", "The cat", "--stop", ".", "--quiet"]
    out, err = run(story_llm, *argv)
    first, header, _ = out.partition("==> prompt 1, sample 0 <==\n")
    assert header and first == f"==> prompt 0, sample 0 <==\n{STORY.partition('.')[0]}\n"
    assert err == ""


def test_prompt_from_stdin(run, story_llm, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"Once upon a time\n"), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", stdin)
    out, _ = run(story_llm, "--prompt", "-", "--stop", " She wanted")
    assert out == STORY + "\n"


def test_stdin_is_utf8_in_any_locale(monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO("café\n".encode()), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", stdin)
    _, _, records = checked("--prompt", "-")
    assert records == [{"prompt": "café"}]


def test_samples_follow_the_seed(capsys, tmp_path, monkeypatch):
    loaded = load_model(GOLDEN, precision="w16a16kv16", dtype="float32")
    monkeypatch.setattr(_cli, "load", lambda args: (loaded, 0.0))
    prompts = write_lines(tmp_path / "p.jsonl", {"prompt_token_ids": [5, 6]})
    argv = ["--prompts-file", prompts, "--output", "json", "--num-samples", "2"]
    argv += ["--temperature", "1", "--max-tokens", "8", "--ignore-eos"]

    def tokens(*flags):
        assert main([*argv, *flags]) == 0
        lines = capsys.readouterr().out.splitlines()
        samples = [json.loads(line) for line in lines]
        assert [(s["index"], s["sample"]) for s in samples] == [(0, 0), (0, 1)]
        return [s["token_ids"] for s in samples]

    first = tokens()
    assert first[0] != first[1] and tokens() == first
    assert tokens("--seed", "0") == first
    assert tokens("--seed", "1") != first


def test_cache_is_as_large_as_the_prompts_need(tmp_path, monkeypatch):
    def fake(loaded, **kwargs):
        raise Captured(loaded, kwargs)

    loaded = load_model(GOLDEN, precision="w16a16kv16", dtype="float32")
    monkeypatch.setattr(_cli, "load", lambda args: (loaded, 0.0))
    monkeypatch.setattr(llm, "LLM", fake)
    ids = [{"prompt_token_ids": [5] * count} for count in (3, 20)]
    argv = ["--prompts-file", write_lines(tmp_path / "p.jsonl", *ids), "--output", "json"]

    def max_model_len(*flags):
        with pytest.raises(Captured) as caught:
            main([*argv, "--debug", *flags])
        return caught.value.args[1]["max_model_len"]

    assert max_model_len("--max-tokens", "10") == 32  # 20 + 10, rounded up
    assert max_model_len() == 128  # the context: 20 + 256 are more
    assert max_model_len("--max-model-len", "25", "--max-tokens", "10") == 25
    assert max_model_len("--max-model-len", "500", "--max-tokens", "10") == 500  # LLM refuses it


class Captured(Exception):
    """Carries what the LLM was made with."""


def test_model_flags_reach_the_engine(monkeypatch):
    loaded = []

    def fake_load(*args, **kwargs):
        loaded.append((args, kwargs))
        tokenizer = SimpleNamespace(chat_template=None, encode=lambda *_, **__: [3] * 90)
        config = SimpleNamespace(context_length=500, vocab_size=9)
        quant = SimpleNamespace(weight_bits=4)
        return SimpleNamespace(
            model=SimpleNamespace(act_bits=8, backend="reference", mesh=None),
            config=config,
            tokenizer=tokenizer,
            params={"layers": {}},
            format="float",
            quant_config=quant,
        )

    def fake_llm(_, **kwargs):
        raise Captured(kwargs)

    monkeypatch.setattr(checkpoint, "load_model", fake_load)
    monkeypatch.setattr(llm, "LLM", fake_llm)
    argv = "--prompt a --debug --model m --precision w4a8kv8 --group-size -1 --dtype float16"
    argv += " --backend reference --attends quantized --max-model-len 96 --page-size 32"
    argv += " --num-pages 7 --seed 4 --max-num-batched-tokens 64 --no-prefix-caching"
    argv += " --lm-head-bits 8"
    with pytest.raises(Captured) as caught:
        main(argv.split())
    ((args, kwargs),) = loaded
    assert args == ("m",)
    assert kwargs == {
        "precision": "w4a8kv8",
        "group_size": -1,
        "dtype": "float16",
        "backend": "reference",
        "progress": False,
        "mesh": None,
    }
    assert caught.value.args[0] == {
        "max_model_len": 96,
        "page_size": 32,
        "num_pages": 7,
        "max_num_seqs": 1,  # no more places than samples
        "seed": 4,
        "attends": "quantized",
        "max_num_batched_tokens": 64,
        "enable_prefix_caching": False,
        "lm_head_bits": 8,
        "backend": "reference",
    }


def checked(*argv):
    """The flags, the SamplingParams and the prompts that a command line stands for."""
    args = build_parser().parse_args(argv)
    params, records = checked_arguments(args)
    return args, params, [record for _, record in records]


def test_sampling_flags():
    argv = "--prompt a --output json --max-tokens 7 --temperature 0.5 --top-p 0.9 --top-k 5"
    argv += " --min-p 0.1 --repetition-penalty 1.2 --presence-penalty 0.3 --frequency-penalty -0.4"
    argv += " --stop x y --stop z --stop-token-ids 3 4 --ignore-eos --num-samples 3 --logprobs 2"
    _, params, _ = checked(*argv.split())
    assert params == SamplingParams(
        n=3,
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=-0.4,
        stop=("x", "y", "z"),
        stop_token_ids=(3, 4),
        ignore_eos=True,
        logprobs=2,
    )


def test_defaults_are_greedy():
    args, params, _ = checked("--prompt", "a")
    assert params == SamplingParams() and params.temperature == 0 and params.max_tokens == 256
    assert args.stream and args.precision is None and args.group_size is None
    assert Path(args.model).parts[-3:] == ("qserve_jax", "assets", "demo")


def test_prompts_file_forms(tmp_path):
    records = [
        {"prompt": "a\u2028b"},  # not the end of a line
        {"prompt_token_ids": [1, 2]},
        {"messages": [{"role": "user", "content": "hi"}]},
    ]
    path = tmp_path / "p.jsonl"
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n\n".join(lines), encoding="utf-8-sig")  # with a byte order mark
    args, _, got = checked("--prompt", "first", "--prompts-file", str(path))
    assert got == [{"prompt": "first"}, *records] and not args.stream
    chat = SimpleNamespace(chat_template="{{ messages }}")
    assert [engine_prompt(record, chat, args) for record in records] == [
        [{"role": "user", "content": "a\u2028b"}],
        [1, 2],
        [{"role": "user", "content": "hi"}],
    ]


def test_chat_template():
    chat, plain = SimpleNamespace(chat_template="x"), SimpleNamespace(chat_template=None)
    user, system = {"role": "user", "content": "a"}, {"role": "system", "content": "be brief"}

    def prompt(tokenizer, *argv):
        args, _, (record,) = checked("--prompt", "a", *argv)
        return engine_prompt(record, tokenizer, args)

    assert prompt(chat) == [user]
    assert prompt(chat, "--system-prompt", "be brief") == [system, user]
    assert prompt(chat, "--no-chat-template") == prompt(plain) == "a"
    with pytest.raises(
        ValueError, match="'be brief' needs a chat template, .* put it into --prompt"
    ):
        prompt(plain, "--system-prompt", "be brief")


def test_choices_are_those_of_the_library():
    """The command line has copies, because it answers wrong flags without importing JAX."""
    assert _cli.PRECISIONS == PRECISIONS
    assert _cli.BACKENDS == ("auto", *BACKENDS)
    assert _cli.DTYPES == DTYPES


def run_python(*argv, **env):
    return subprocess.run(
        [sys.executable, *argv],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def test_wrong_flags_and_help_need_no_jax():
    code = """
import sys
from qserve_jax.generate import main
assert main(["--prompt", "a", "--temperature", "-1"]) == 2
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
print("jax" in sys.modules, file=sys.stderr)
"""
    result = run_python("-c", code)
    error, jax_imported = result.stderr.splitlines()
    assert error.startswith("qserve_jax.generate: error: --temperature -1.0 must be")
    assert jax_imported == "False"
    assert "--repetition-penalty" in result.stdout


def test_interrupt_of_an_import_is_quiet():
    """Before `run`, which is what catches it otherwise."""
    code = """
import os, runpy, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "qserve_jax.runtime.sampling_params":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
runpy.run_module("qserve_jax.generate", run_name="__main__")
"""
    result = run_python("-c", code)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


def test_second_run_finds_compiled_programs(tmp_path):
    """As users run it: quantised, one clean line per message, a cache of its own."""
    prompts = write_lines(tmp_path / "p.jsonl", {"prompt_token_ids": [5, 6]})
    argv = ["-m", "qserve_jax.generate", "--model", str(GOLDEN), "--prompts-file", prompts]
    argv += ["--output", "json", "--max-tokens", "3", "--ignore-eos"]
    runs = [run_python(*argv, QSERVE_JAX_CACHE=str(tmp_path / "cache")) for _ in range(2)]
    assert [r.returncode for r in runs] == [0, 0], runs[0].stderr
    assert any((tmp_path / "cache").iterdir())
    messages = [r.stderr.splitlines() for r in runs]
    for warning, note, line in messages:  # K = 32 and 48 have no groups of 128
        assert warning.startswith("warning: 7 leaves cannot be quantised as asked: ")
        assert "round-to-nearest" in note
        assert re.search(r"weights \d+\.\d KiB W4A8 per-channel · KV4 ", line)
    assert " (cached) · " not in messages[0][2] and " (cached) · " in messages[1][2]
    outputs = [json.loads(r.stdout) for r in runs]
    assert outputs[0]["token_ids"] == outputs[1]["token_ids"]
