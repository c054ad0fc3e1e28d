"""Prompts as JSON lines. Imports no JAX: commands check their flags with it first."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from qserve_jax.runtime.prompts import is_utf8

Record = dict[str, Any]
"""A prompt as a line of a file spells it: one of PROMPT_KEYS and its value, which `LLM.generate`
takes as it is."""

PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")


def read_prompts_file(path: str | os.PathLike[str]) -> list[tuple[str, Record]]:
    """A JSON-lines file's prompts, each after its place (FILE line 3); blank lines are skipped.

    Raises ValueError, naming the line, for anything that is not a non-empty prompt.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = list(file)  # not str.splitlines, which splits at more than line ends
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts file {path} cannot be read ({error}): give UTF-8 text") from None
    places = [(f"{path} line {number}", line) for number, line in enumerate(lines, start=1)]
    records = [(where, _parse(where, line)) for where, line in places if line.strip()]
    if not records:
        raise ValueError(f"prompts file {path} holds no prompt: give one a line")
    return records


def _parse(where: str, line: str) -> Record:
    form = f'write {{"{PROMPT_KEYS[0]}": ...}}, or {" or ".join(PROMPT_KEYS[1:])} as its one key'
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # a number of 5000 digits; too many brackets
        raise ValueError(f"{where} is not JSON ({getattr(error, 'msg', error)}): {form}") from None
    if not isinstance(record, dict) or len(record) != 1 or not record.keys() <= {*PROMPT_KEYS}:
        raise ValueError(f"{where} is {line.strip():.60}: {form}")
    check_record(where, record)
    return record


def check_record(where: str, record: Record) -> None:
    """Raises ValueError, beginning with `where`, if a prompt is empty, not of its key's kind or not
    text that UTF-8 can encode."""
    ((key, value),) = record.items()
    if value in ("", []):
        raise ValueError(f"{where}: {key} {value!r} is empty, give at least one token")
    good, kind = {
        "prompt": (isinstance(value, str), "a string"),
        "prompt_token_ids": (_is_list_of(_is_token_id, value), "a list of integers from 0"),
        "messages": (_is_list_of(_is_message, value), 'a list of {"role": ..., "content": TEXT}'),
    }[key]
    if not good:
        raise ValueError(f"{where}: {key} {value!r:.60} must be {kind}")
    if not is_utf8(json.dumps(value, ensure_ascii=False)):
        raise ValueError(f"{where}: {key} {value!r:.60} is not UTF-8 text: remove lone surrogates")


def _is_list_of(kind: Callable[[object], bool], value: object) -> bool:
    return isinstance(value, list) and all(map(kind, value))


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_message(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    return all(isinstance(value.get(key), str) for key in ("role", "content"))
