"""What one token stands for, by itself: its bytes, for log-probabilities."""

from __future__ import annotations

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


def shown(token: int, data: bytes | None) -> str:
    """A token as text; what is no text by itself is shown as OpenAI does, bytes:\\xe4."""
    if data is None:
        return f"token_id:{token}"
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
