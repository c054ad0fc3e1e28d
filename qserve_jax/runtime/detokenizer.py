"""Text of a growing sequence of token ids, piece by piece, with stop strings."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # how tokenizers decode bytes that are not UTF-8
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's byte fallback
_CLEANS_BPE = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
_LONGEST_WINDOW = 16
_SHORTEST_WINDOW = 8  # more than the tokens that one character can span


class IncrementalDetokenizer:
    """Turns token ids into text that is safe to show, each piece as early as it is final.

    Invariant: the pieces of `add` and `finish`, joined, are `text`, and that is
    `tokenizer.decode(ids, skip_special_tokens=...)` cut at the first stop string; the sequence
    stops at the first token whose decoded prefix holds one.

    Held back are: a character whose bytes are not all there; a run of byte tokens until another
    token ends it (one bad byte makes every character of its run U+FFFD); and text that could be
    the beginning of a stop string. Stop strings are recognised at once even so.

    Made for byte-level BPE and SentencePiece decoders, where a token never changes text further
    back than that. A token costs O(1), amortised: only a window of the last tokens is decoded, and
    a run of byte tokens only once.

    tokenizer: a Hugging Face tokenizer, or None, for which the text is empty.
    stop: non-empty strings. Raises ValueError for any without a tokenizer.
    """

    def __init__(
        self,
        tokenizer: Any | None,
        *,
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
    ):
        if stop and tokenizer is None:
            raise ValueError(
                f"stop={tuple(stop)!r} needs a tokenizer, got None: use stop_token_ids"
            )
        self.stopped: str | None = None  # the stop string that ended the text
        self._tokenizer = tokenizer
        self._decode_ids = decoder_of(tokenizer)
        self._skip_special_tokens = skip_special_tokens
        self._stop = tuple(stop)
        self._stop_bytes = tuple(string.encode() for string in stop)
        self._include_stop = include_stop_str_in_output
        self._window: list[int] = []  # the last tokens
        self._known = 0  # characters of the window's text that are final
        self._run = bytearray()  # held text and the bytes of the byte tokens just seen
        self._held = ""  # final text that may begin a stop string
        self._shown: list[str] = []
        self._finished = False

    @property
    def text(self) -> str:
        """All text shown so far; after a stop or `finish`, the final text."""
        return "".join(self._shown)

    def add(self, token_id: int) -> str:
        """Takes the next token and returns the text that it makes final, often "".

        Raises ValueError after a stop string or `finish`.
        """
        if self._finished:
            raise ValueError(f"token {token_id} comes after the end: use a new detokenizer")
        # Skipped tokens do not end a run of bytes. Two, because decoders strip one leading space.
        if self._tokenizer is None or not self._decode([token_id, token_id]):
            return ""
        self._window.append(token_id)
        if byte := _BYTE_TOKEN.fullmatch(self._tokenizer.convert_ids_to_tokens(token_id)):
            return self._add_byte(int(byte[1], 16))
        self._run.clear()
        return self._show(self._settle())

    def add_all(self, ids: list[int]) -> str:
        """Takes the tokens of a whole text, in place of `add` one by one, and returns the text.

        Raises ValueError where stop strings are to be found, or tokens have been added.
        """
        if self._stop or self._shown or self._window:
            raise ValueError("add_all is for a whole text without stop strings: use add")
        return self._show(self._decode(ids))

    def finish(self) -> str:
        """Ends the sequence and returns what was held back."""
        if self._finished:
            return ""
        self._finished = True
        return self._show(self._unsettled(), final=True)

    def _decode(self, ids: list[int]) -> str:
        return self._decode_ids(ids, skip_special_tokens=self._skip_special_tokens)

    def _unsettled(self) -> str:
        return self._decode(self._window)[self._known :]

    def _add_byte(self, value: int) -> str:
        """Looks for stop strings only, in bytes: the text is known when the run ends.

        A match can be wrong (in a bad run characters are lost), so it is confirmed by decoding.
        """
        if not self._run:
            self._run += self._held.encode()
        self._run.append(value)
        if self._run.endswith(self._stop_bytes):
            text = self._unsettled()
            if _first_stop(self._held + text, self._stop):
                return self._show(text)
        return ""

    def _settle(self) -> str:
        """The window's new final text: all but a last character that may be incomplete."""
        text = self._decode(self._window)
        end = max(self._known, len(text) - text.endswith(_REPLACEMENT))
        piece, self._known = text[self._known : end], end
        if len(self._window) > _LONGEST_WINDOW:
            self._shorten(len(text) - end)
        return piece

    def _shorten(self, unsettled: int) -> None:
        """Forgets old tokens. The rest decodes to the same last `unsettled` characters, and to some
        settled ones before, which decoders may treat differently at the beginning of a text.
        """
        self._window = self._window[-_SHORTEST_WINDOW:]
        self._known = len(self._decode(self._window)) - unsettled

    def _show(self, piece: str, *, final: bool = False) -> str:
        """Moves final text to the output, up to a stop string or what may begin one."""
        pending = self._held + piece
        if match := _first_stop(pending, self._stop):
            start, self.stopped = match
            self._finished = True
            end = start + len(self.stopped) * self._include_stop
            pending, self._held = pending[:end], ""
        else:
            end = len(pending) - (0 if final else _partial_stop(pending, self._stop))
            pending, self._held = pending[:end], pending[end:]
        self._shown.append(pending)
        return pending


def decoder_of(tokenizer: Any | None) -> Callable[..., str]:
    """`tokenizer.decode`, or what that calls in the end, where it adds nothing but time: most of
    what text costs the host. It adds something where spaces are cleaned up, or a class or its owner
    has put another method in its place."""
    if tokenizer is None:
        return lambda ids, skip_special_tokens: ""
    usual = getattr(sys.modules.get("transformers"), "PreTrainedTokenizerFast", None)
    if usual is None or not isinstance(tokenizer, usual):
        return tokenizer.decode
    changed = any(
        getattr(getattr(tokenizer, name), "__func__", None) is not getattr(usual, name)
        for name in ("decode", "_decode")
    )
    backend = tokenizer.backend_tokenizer
    cleans = tokenizer.clean_up_tokenization_spaces
    if type(backend.model).__name__ == "BPE":  # Llama 3 asks for it; transformers 5 knows better
        cleans = cleans and getattr(tokenizer, _CLEANS_BPE, True)
    return tokenizer.decode if changed or cleans else backend.decode


def _first_stop(text: str, stop: tuple[str, ...]) -> tuple[int, str] | None:
    """Where the earliest stop string starts and which it is; the first listed wins a tie."""
    found = [(start, string) for string in stop if (start := text.find(string)) >= 0]
    return min(found, key=lambda match: match[0], default=None)


def _partial_stop(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of the text that begins a stop string."""
    lengths = (
        length
        for string in stop
        for length in range(min(len(string) - 1, len(text)), 0, -1)
        if text.endswith(string[:length])
    )
    return max(lengths, default=0)
