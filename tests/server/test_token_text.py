"""How much text a token stands for at most: tokenizers as they are, and texts made to break it."""

import json
import types
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

import qserve_jax

pytest.importorskip("starlette", reason="needs the extra serve")
token_text = pytest.importorskip("qserve_jax.server.token_text")

DEMO = Path(qserve_jax.__file__).parent / "assets" / "demo" / "tokenizer.json"
BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}
PIECES = ["▁", "a", "b", "aa", "▁a", "bb", "aaaa", "▁aaaa", "bbbb", "é", "</s>"]
MERGES = [["a", "a"], ["▁", "a"], ["b", "b"], ["aa", "aa"], ["▁", "aaaa"], ["bb", "bb"]]
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


def byte_level(**parts) -> Any:
    """GPT-2's, Llama 3's and Qwen's way: the demo's, with other parts."""
    return json.loads(DEMO.read_text()) | parts


def fallback(**parts) -> Any:
    """Llama 2's way, in small."""
    model = {"type": "BPE", "unk_token": "</s>", "fuse_unk": True, "byte_fallback": True}
    model |= {"vocab": BYTES | {p: 256 + i for i, p in enumerate(PIECES)}, "merges": MERGES}
    prepend = {"type": "Prepend", "prepend": "▁"}
    steps = {"type": "Sequence", "normalizers": [prepend, REPLACE]}
    return byte_level(model=model, added_tokens=[], normalizer=steps, pre_tokenizer=None) | parts


def added(content="<|wide|>", **flags):
    token = {"id": 3000, "content": content, "special": True, "normalized": False}
    token |= {"single_word": False, "lstrip": False, "rstrip": False}
    return [token | flags]


def model(spec, **parts):
    return spec | {"model": spec["model"] | parts}


def splitter(**parts):
    """Qwen's two steps."""
    split = {"type": "Split", "pattern": {"Regex": "a+"}, "behavior": "Isolated", "invert": False}
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps = [split | parts, plain | {"use_regex": False}]
    return {"type": "Sequence", "pretokenizers": steps}


TEXTS = ["a" * 400, "b" * 400, " " * 400, " aaaa" * 80, "\n\t" * 200, "é€🙂\x00" * 100]
TEXTS += ["e\u0301" * 200, "\u1f82" * 100, "\u03b1\u0313\u0300\u0345" * 100, "字" * 400]
TEXTS += ["<|endoftext|>" * 30, "<|wide|>" * 50, " <|wide|> " * 40, "\u1100\u1161\u11a8" * 130]
KNOWN = {
    "byte level": byte_level(),
    "composing": byte_level(normalizer={"type": "NFC"}),
    "in two steps": byte_level(pre_tokenizer=splitter()),
    "long added": byte_level(added_tokens=added("a" * 100)),
    "normalized added": fallback(added_tokens=added("  ", normalized=True)),
    "fallback": fallback(),
    "metaspace": fallback(
        normalizer=None,
        pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"},
    ),
}
UNKNOWN = {
    "removing": byte_level(pre_tokenizer=splitter(behavior="Removed")),
    "strips": byte_level(normalizer={"type": "Strip", "strip_left": True, "strip_right": True}),
    "replaces by less": fallback(normalizer=REPLACE | {"pattern": {"String": "   "}}),
    "replaces any": fallback(normalizer=REPLACE | {"pattern": {"Regex": " +"}}),
    "lstrip": byte_level(added_tokens=added(lstrip=True)),
    "rstrip": byte_level(added_tokens=added(rstrip=True)),
    "fuses unknown": model(fallback(), byte_fallback=False),
    "a byte is missing": model(fallback(), vocab={p: i for i, p in enumerate(PIECES)}),
    "words": fallback(model={"type": "WordLevel", "vocab": {"</s>": 0}, "unk_token": "</s>"}),
}


def tokenizer(spec):
    return types.SimpleNamespace(backend_tokenizer=Tokenizer.from_str(json.dumps(spec)))


@pytest.mark.parametrize("name", KNOWN)
def test_no_text_has_fewer_tokens_than_the_bound(name):
    spec = tokenizer(KNOWN[name])
    most = token_text.most_characters(spec)
    assert most is not None
    wide = 0.0
    for text in TEXTS:
        ids = spec.backend_tokenizer.encode(text, add_special_tokens=False).ids
        wide = max(wide, len(text) / len(ids))
        assert len(text) <= most * len(ids), text
    assert wide > 2


@pytest.mark.parametrize("name", UNKNOWN)
def test_tokenizers_that_swallow_text_have_none(name):
    assert token_text.most_characters(tokenizer(UNKNOWN[name])) is None


def test_the_longest_piece_is_the_bound():
    assert token_text.most_characters(tokenizer(byte_level())) == len("<|endoftext|>")
    assert token_text.most_characters(tokenizer(fallback())) == len("<0x00>")
    assert token_text.most_characters(tokenizer(KNOWN["long added"])) == 100
    assert token_text.most_characters(tokenizer(KNOWN["composing"])) == 4 * len("<|endoftext|>")
    assert token_text.most_characters(None) is None
    assert token_text.most_characters(object()) is None
