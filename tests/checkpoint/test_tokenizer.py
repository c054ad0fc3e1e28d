"""The tokenizer of a checkpoint and its chat template; no cost where there is none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qserve_jax.checkpoint import CheckpointError
from qserve_jax.checkpoint.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture
def folder(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "world": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return tmp_path


def write_tokenizer_config(folder, **fields):
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", **fields}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def test_no_tokenizer_files(tmp_path):
    assert load_tokenizer(tmp_path) is None


def test_tokens_and_text(folder):
    write_tokenizer_config(folder)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("hello world nobody") == [1, 2, 0]
    assert tokenizer.decode([2, 1]) == "world hello"


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja"])
def test_chat_template(folder, where):
    if where == "tokenizer_config.json":
        write_tokenizer_config(folder, chat_template=TEMPLATE)
    else:
        write_tokenizer_config(folder)
        (folder / where).write_text(TEMPLATE)
    messages = [{"role": "user", "content": "hello"}]
    text = load_tokenizer(folder).apply_chat_template(messages, tokenize=False)
    assert text == "<user>hello<assistant>"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged(folder, name):
    write_tokenizer_config(folder)
    (folder / name).write_text("{")
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(folder)
    message = str(caught.value)
    assert str(folder) in message and "work with token ids" in message and "\n" not in message


def test_loading_without_tokenizer_imports_no_transformers():
    code = f"""
import sys
from qserve_jax.checkpoint import load_model
load_model({str(GOLDEN / "llama_mha")!r}, precision="w16a16kv16")
print(*sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.split())
    assert "flax" in loaded
    assert loaded.isdisjoint({"transformers", "tokenizers", "torch", "huggingface_hub"})


def test_nothing_is_said_about_torch(folder):
    write_tokenizer_config(folder)
    code = f"""
from pathlib import Path
from qserve_jax.checkpoint.tokenizer import load_tokenizer
print(load_tokenizer(Path({str(folder)!r})).encode("hello"))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("[1]\n", "")
