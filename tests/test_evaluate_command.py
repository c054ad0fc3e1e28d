"""The evaluate command: flags, files, tables and exit codes, on the demo model."""

import json
import math
import re

import pytest

from qserve_jax import evaluate
from qserve_jax.evaluation import candidates, choices, lm_eval_model, text

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big dog. The dog was very sad because it lost its ball. Lily helped the "
    "dog to find the ball. They played together all day. The end.\n\n"
)
QUESTION = {
    "question": "Once upon a time, there was a little",
    "choices": ["girl", "of", "is", "so"],
}


@pytest.fixture
def story(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text(12 * STORY)
    return str(path)


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(json.dumps(QUESTION | {"answer": i}) for i in (0, 0, 1)))
    return str(path)


def test_copies_of_names():
    assert evaluate.COMPARISONS == candidates.COMPARISONS
    assert evaluate.TEXT_FORMATS == text.FORMATS
    assert evaluate.ANSWER_STYLES == choices.ANSWER_STYLES


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ([], "nothing to measure: give --text FILE, --tasks FILE or both"),
        (["--text", "/none"], "--text /none cannot be read (No such file or directory): name a"),
        (["--tasks", "/none.csv"], "--tasks /none.csv cannot be read"),
        (["--tasks", "a.csv", "b.jsonl"], "--tasks names 2 files: give one, or one run for each"),
        (["--text", "/x", "--seq-len", "1"], "'1' is not an integer of at least 2: give one"),
        (["--text", "/x", "--stride", "4096"], "--stride 4096 is more than --seq-len 2048"),
        (["--text", "/x", "--compare", "float,awq"], "--compare 'awq' is unknown: use float, rtn"),
        (["--text", "/x", "--reference", "DIR"], "--reference is for --compare: name what"),
        (["--text", "/x", "--save", "/no/x.json"], "--save /no/x.json: there is no folder /no, "),
        (["--text", "/x", "--save", "/"], "--save / is a folder: name a file in it"),
        (["--text", "/x", "--precision", "w2a2kv2"], "invalid choice: 'w2a2kv2'"),
    ],
)
def test_wrong_flags(capsys, flags, line):
    assert evaluate.main(flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("qserve_jax.evaluate: error: ") and line in err


def test_save_is_tried_before_the_work(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.os, "access", lambda path, mode: path != tmp_path)  # root may all
    assert evaluate.main(["--text", "/x", "--save", str(tmp_path / "x.json")]) == 2
    assert "x.json is not writable: name another file" in capsys.readouterr().err


def test_rows_are_printed_where_they_cannot_be_saved(capsys, story, tmp_path, monkeypatch):
    def full(self, text):
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(evaluate.Path, "write_text", full)
    assert evaluate.main(["--text", story, "--seq-len", "64", "--save", str(tmp_path / "x")]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("Perplexity ") and "No space left on device" in err


def test_tasks_by_name_need_lm_eval(capsys, monkeypatch):
    monkeypatch.setattr(lm_eval_model, "is_installed", lambda: False)
    assert evaluate.main(["--tasks", "arc_easy"]) == 2
    err = capsys.readouterr().err
    assert "--tasks arc_easy is a task of lm-eval, which is not installed: pip install" in err


def test_quantised_checkpoint_needs_a_reference(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "qoq"}}')
    flags = ["--text", "/x", "--model", str(tmp_path), "--compare", "float"]
    assert evaluate.main(flags) == 2
    assert f"needs the float model that {tmp_path} was quantised from" in capsys.readouterr().err


def test_one_line(capsys, story):
    assert evaluate.main(["--text", story, "--seq-len", "128"]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"Perplexity [\d.]+ ± [\d.]+ \(W4A8KV4 g128\)\n", out)
    ((tokens, windows),) = re.findall(r"note: (\d+) tokens scored, in (\d+) windows", err)
    tokens, windows = int(tokens), int(windows)
    assert tokens == windows * 127  # the partial window is left out, a window's first not scored


def test_a_text_of_one_window(capsys, tmp_path):
    (tmp_path / "short.txt").write_text("Once upon a time there was a dog. " * 4)
    assert evaluate.main(["--text", str(tmp_path / "short.txt"), "--seq-len", "128"]) == 0
    out, err = capsys.readouterr()
    assert "± ?" in out
    assert "in one window of at most 128; ± is one standard error, which takes two windows" in err


def test_context_bounds_the_windows(capsys, story):
    assert evaluate.main(["--text", story, "--precision", "w16a16kv16"]) == 0
    out, err = capsys.readouterr()
    assert "(float)" in out and "± ?" in out  # one window has no standard error
    assert "note: --seq-len 2048 is more than the model's context: using 1024\n" in err


def test_compare_text_and_questions(capsys, story, questions, tmp_path):
    saved = tmp_path / "saved.json"
    flags = ["--text", story, "--seq-len", "64", "--stride", "48", "--tasks", questions]
    flags += ["--answer-style", "completion", "--compare", "float,rtn,w4a16,w4a4"]
    flags += ["--save", str(saved), "--output", "json"]
    assert evaluate.main(flags) == 0
    out, err = capsys.readouterr()
    rows = {row["name"]: row for row in map(json.loads, out.splitlines())}
    names = ["W4A8KV4 g128", "float", "W4A16KV16 g128, fake", "W4A4KV4 g128, fake"]
    assert list(rows) == names
    assert "note: the model is quantised by round to nearest on load: no further row rtn" in err
    exact = rows["float"]
    assert "loss_change" not in exact and exact["accuracy"] == pytest.approx(2 / 3)
    for name in (names[0], *names[2:]):
        row = rows[name]
        assert row["loss_change"] == pytest.approx(row["loss"] - exact["loss"])
        change = row["perplexity"] / exact["perplexity"] - 1
        assert row["perplexity_change_percent"] == pytest.approx(100 * change)
        assert 0.5 < row["greedy_agreement"] < 1 and row["answer_agreement"] == 1
        assert row["num_tokens"] == exact["num_tokens"]
    assert len({row["loss"] for row in rows.values()}) == 4
    content = json.loads(saved.read_text())
    assert [row["name"] for row in content["rows"]] == names
    assert content["settings"]["seq_len"] == 64 and "jax" in content["versions"]
    assert content["rows"][0].items() <= rows[names[0]].items()


def test_reference(capsys, story):
    """A float model beside itself as the reference: no difference at all."""
    flags = ["--text", story, "--seq-len", "256", "--precision", "w16a16kv16", "--output", "json"]
    demo = evaluate.build_parser().get_default("model")
    assert evaluate.main([*flags, "--reference", demo, "--compare", "float"]) == 0
    own, reference = map(json.loads, capsys.readouterr().out.splitlines())
    assert own["loss"] == reference["loss"] and math.isfinite(own["loss"])


def test_table(capsys, story):
    flags = ["--text", story, "--seq-len", "256", "--compare", "float"]
    assert evaluate.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 4
    cells = [cell.strip() for cell in lines[0].split("|")[1:-1]]
    assert cells == ["", "perplexity", "Δ", "Δ nats/token", "same token as float"]
    assert re.search(r"\| W4A8KV4 g128 \| [\d.]+ ± [\d.]+ +\| [+-][\d.]+ % \| [+-]0", lines[2])
