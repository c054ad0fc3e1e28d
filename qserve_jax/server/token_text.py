"""What one token stands for, by itself: its bytes, for log-probabilities; how much text at most."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's byte fallback

TokenBytes = Callable[[int], bytes | None]


def byte_of_character() -> dict[str, int]:
    """How byte-level BPE writes bytes in its vocabulary (GPT-2): printable Latin-1 characters stand
    for themselves, all other bytes for the characters from U+0100 on, in order."""
    itself = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in itself]
    table = {chr(byte): byte for byte in itself}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def token_bytes(tokenizer: Any | None) -> TokenBytes:
    """A function from token id to its bytes, None where they are not known."""
    known: dict[int, bytes | None] = {}  # as many as the vocabulary has
    byte_of = byte_of_character()

    def find(token: int) -> bytes | None:
        if tokenizer is None:
            return None
        piece = tokenizer.convert_ids_to_tokens(token) or ""
        if byte := _BYTE_TOKEN.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        # Of two, the second: decoders strip a space that begins a text.
        once, twice = (tokenizer.decode([token] * n, skip_special_tokens=False) for n in (1, 2))
        text = twice[len(once) :]
        if _REPLACEMENT not in once + text:
            return text.encode()
        if all(character in byte_of for character in piece):
            return bytes(byte_of[character] for character in piece)
        return None

    def lookup(token: int) -> bytes | None:
        if token not in known:
            known[token] = find(token)
        return known[token]

    return lookup


SHORTENING = {"NFC": 4, "Prepend": 1}
"""Characters that become one: Unicode composes no more than four code points."""
KEEPING = ("ByteLevel", "Metaspace", "Digits")


def most_characters(tokenizer: Any | None) -> int | None:
    """No token stands for more characters of a text than this, so that a text has at least
    len(text) / most_characters tokens; None where that is not known.

    It is known of byte-pair encodings that have a token for every byte, hence no unknown text of
    any length, and whose other parts throw nothing away.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    spec = json.loads(backend.to_str())
    added, vocabulary = spec["added_tokens"], spec["model"].get("vocab", ())
    normalizers, splitters = (_parts(spec[name]) for name in ("normalizer", "pre_tokenizer"))
    if any(token["lstrip"] or token["rstrip"] for token in added):  # with all spaces beside it
        return None
    if spec["model"]["type"] != "BPE" or not all(map(_keeps_text, splitters)):
        return None
    pieces = byte_of_character()
    if "ByteLevel" not in [part["type"] for part in splitters]:
        pieces = [f"<0x{byte:02X}>" for byte in range(256 * spec["model"]["byte_fallback"])]
    if not pieces or not all(piece in vocabulary for piece in pieces):
        return None
    factor, longest = 1, max(map(len, vocabulary))
    for part in normalizers:
        shortening = SHORTENING.get(part["type"], _replaces_by_as_much(part))
        if not shortening:
            return None
        factor *= shortening
    for text in (token["content"] for token in added):  # found before and after normalising
        normalized = backend.normalizer.normalize_str(text) if normalizers else ""
        longest = max(longest, len(text), len(normalized))
    return factor * longest


def _parts(spec: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer."""
    if spec is None:
        return []
    steps = spec.get("normalizers", spec.get("pretokenizers"))
    return [spec] if steps is None else [part for step in steps for part in _parts(step)]


def _keeps_text(part: dict[str, Any]) -> bool:
    split = part["type"] == "Split" and part["behavior"] != "Removed"
    return split or part["type"] in KEEPING


def _replaces_by_as_much(part: dict[str, Any]) -> bool:
    found = part.get("pattern", {}).get("String")
    return part["type"] == "Replace" and bool(found) and len(found) <= len(part["content"])


def shown(token: int, data: bytes | None) -> str:
    """A token as text; what is no text by itself is shown as OpenAI does, bytes:\\xe4."""
    if data is None:
        return f"token_id:{token}"
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
