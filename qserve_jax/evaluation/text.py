"""From a text file to the token ids of an evaluation, by the conventions of published numbers."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

FORMATS = ("auto", "plain", "wikitext", "jsonl")


def read_text(path: str | os.PathLike[str], form: str = "auto") -> str:
    """The file as one text, a `form` of FORMATS:

    plain: as it is.
    wikitext: the lines of WikiText-2's own file as published perplexities join them: rows joined by
      "\\n\\n", where a blank line is an empty row and any other keeps its newline.
    jsonl: {"text": ...} a line, the texts joined by "\\n\\n".
    auto: jsonl where the name ends so, else plain.

    Raises ValueError where the file cannot be read, is not UTF-8, empty or not of this form.
    """
    path = Path(path)
    text = read_utf8(path)
    if form == "auto":
        form = "jsonl" if path.suffix == ".jsonl" else "plain"
    if form == "wikitext":
        lines = io.StringIO(text, newline=None)  # as a file gives them: no line ends at U+2028
        text = "\n\n".join(line if line.strip() else "" for line in lines)
    elif form == "jsonl":
        text = "\n\n".join(row_text(path, *row) for row in json_rows(path, text))
    if not text.strip():
        raise ValueError(f"{path} holds no text: give a file with some")
    return text


def read_utf8(path: Path) -> str:
    """The file's text, line ends as they are. Raises ValueError with one line."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): name a text file") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start}): convert it to UTF-8"
        ) from None


def json_rows(path: Path, text: str) -> list[tuple[int, Any]]:
    """(number, value) of each line that is not blank. Raises ValueError naming the line."""
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # no tokenizer takes half a character
            rows.append((number, row))
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise ValueError(
                f"{path}:{number} holds {half}, half a character: correct it"
            ) from None
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "cannot be parsed"
            raise ValueError(f"{path}:{number} is not JSON ({reason}): correct it") from None
    return rows


def row_text(path: Path, number: int, row: Any) -> str:
    """The text of a JSON row. Raises ValueError where there is none."""
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{path}:{number} has no "text": give {{"text": "..."}} on every line')
    return text


def encode_text(text: str, tokenizer: Any) -> np.ndarray:
    """Token ids i64[n] of the whole text at once, special tokens as the tokenizer puts them (a BOS
    in front, once)."""
    return np.asarray(tokenizer.encode(text, verbose=False), np.int64)


def full_windows(ids: np.ndarray, seq_len: int) -> np.ndarray:
    """`ids` without the last, partial window, which published WikiText-2 numbers leave out; a text
    shorter than one window stays as it is."""
    return ids[: len(ids) // seq_len * seq_len] if len(ids) >= seq_len else ids
