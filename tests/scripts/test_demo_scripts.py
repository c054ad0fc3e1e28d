"""The split of the stories, their tokenizer, and (slow) both demo scripts from end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scripts import tinystories
from scripts.tinystories import (
    drop_near_duplicates,
    join_stories,
    load_stories,
    save_tokenizer,
    split_v1,
    split_v2,
    train_tokenizer,
)

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)
WORDS = ["".join(RNG.choice(list("abcdefghijklmnopqrstuvwxyzé"), 7)) for _ in range(700)]


def make_story(rng, num_words=70):
    return " ".join(rng.choice(WORDS, num_words)).capitalize() + "."


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Made-up excerpts: 60 stories in V2 (7 is the beginning of held-out 20) and 30 in V1."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(1)
    v2 = [make_story(rng) for _ in range(60)]
    v2[7] = v2[20][:200]
    v1 = [make_story(rng) for _ in range(30)]
    v1[3] = "And then. " + v2[30]
    end = "\n<|endoftext|>\n"
    (folder / tinystories.V2).write_text(end.join([*v2, "cut of"]), encoding="utf-8")
    (folder / tinystories.V1).write_text("\n".join(v1) + "\n", encoding="utf-8")
    return folder, v1, v2


def test_split_holds_out_whole_stories_and_drops_their_copies(data):
    folder, v1, v2 = data
    stories = load_stories(folder)
    assert stories.test == [v2[0], v2[20], v2[40]]
    assert stories.validation == [v2[10], v2[30], v2[50]]
    kept = [s for i, s in enumerate(v2) if i % 10 and i != 7]
    assert stories.train == kept + [s for i, s in enumerate(v1) if i != 3]
    assert load_stories(folder) == stories


def test_missing_data_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} has no {tinystories.V1}: give the folder"):
        load_stories(tmp_path)


def test_end_marks_close_stories():
    assert split_v2("\nA.\n\nB.\n<|endoftext|>\n\nC. \n<|endoftext|>\nD, cut") == ["A.\n\nB.", "C."]


def test_single_newlines_separate_stories_and_pieces_are_dropped():
    long, other = "A long story. " * 30, "Another one. " * 30
    text = f"{long}\n\nIts second paragraph.\nA piece.\n{other}\n{'â€œHi!â€ ' * 60}\n"
    assert split_v1(text) == [f"{long}\n\nIts second paragraph.", other.strip()]


def test_near_duplicates_are_counted_in_shingles_of_the_shorter():
    words = [f"w{i}" for i in range(104)]  # 100 shingles
    story = " ".join(words)
    other = lambda n: " ".join([*words[: n + 4], *(f"x{i}" for i in range(200))])  # noqa: E731
    assert drop_near_duplicates([story], [other(20)]) == [story]
    assert drop_near_duplicates([story], [other(21)]) == []
    assert drop_near_duplicates(["Once upon a time."], [story]) == ["Once upon a time."]


def test_tokenizer_decodes_exactly_and_starts_texts_with_the_end_mark(data, tmp_path):
    auto_tokenizer = pytest.importorskip("transformers").AutoTokenizer
    stories = load_stories(data[0]).train
    tokenizer = train_tokenizer(stories, 400)
    save_tokenizer(tokenizer, tmp_path, 64)
    loaded = auto_tokenizer.from_pretrained(tmp_path)
    text = f"{stories[0]}\n\n  日本 ☃ , it's\t. "
    ids = loaded(text)["input_ids"]
    assert (ids[0], loaded.bos_token_id, loaded.eos_token_id) == (0, 0, 0)
    assert loaded.decode(ids, skip_special_tokens=True) == text
    joined = join_stories(tokenizer, stories[:2])
    assert joined.dtype == np.int32 and joined[0] == joined[-1] == 0
    assert loaded.decode(joined) == "<|endoftext|>".join(["", *stories[:2], ""])
    with pytest.raises(ValueError, match="tokens instead of 99999: train on more text"):
        train_tokenizer(stories, 99999)


@pytest.mark.slow
def test_scripts_make_a_model_and_its_table(data, tmp_path):
    def run(script, *flags):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, str(ROOT / "scripts" / script), "--data", str(data[0]), *flags]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)

    model, table = tmp_path / "model", tmp_path / "table.json"
    shape = ("--steps", "5", "--batch-size", "2", "--eval-every", "3", "--seq-len", "32")
    output = run("train_demo.py", "--output", str(model), *shape).stdout
    assert "step 3/5" in output and "step 5/5" in output and "w4a8kv4" in output
    assert (model / "model.safetensors").stat().st_size < 14e6
    assert "CDLA-Sharing-1.0" in (model / "README.md").read_text()
    output = run("demo_table.py", "--model", str(model), "--output", str(table)).stdout
    rows = json.loads(table.read_text())["rows"]
    assert output.count("\n| ") == len(rows) == 5
    # The card and the first row measure the same weights on the same stories.
    assert f"{rows[0]['loss']:.4f} ±" in (model / "README.md").read_text()
