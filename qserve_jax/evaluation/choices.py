"""Multiple-choice questions of a local file in MMLU's format, answered by log-likelihood."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from qserve_jax.evaluation.candidates import Candidate
from qserve_jax.evaluation.likelihood import encode_pair, log_likelihoods
from qserve_jax.evaluation.text import json_rows, read_utf8

LETTERS = ("A", "B", "C", "D")
ANSWER_STYLES = ("letter", "completion")


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, four choices and the index of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int


@dataclasses.dataclass(frozen=True)
class Answers:
    """The index of the choice taken for each question, i64[n], and the right ones."""

    chosen: np.ndarray
    right: np.ndarray

    @property
    def accuracy(self) -> tuple[float, float]:
        """(share of right answers, its standard error)."""
        return _share(self.chosen == self.right)

    def agreement(self, other: Answers) -> tuple[float, float]:
        """(share of questions that both answer alike, its standard error)."""
        return _share(self.chosen == other.chosen)


def _share(hits: np.ndarray) -> tuple[float, float]:
    share, n = float(hits.mean()), len(hits)
    return share, math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else math.nan


def read_questions(path: str | os.PathLike[str]) -> list[Question]:
    """The questions of a file: .csv as MMLU's own (question, four choices, the letter of the
    answer; a line of headings may come first), or .jsonl, with a question a line, as
    {"question": ..., "choices": [four texts], "answer": 0..3 or "A".."D"}, or with the choices
    under "A" to "D".

    Raises ValueError naming the line that is not so.
    """
    path = Path(path)
    text = read_utf8(path)
    rows = _csv_rows(path, text) if path.suffix == ".csv" else json_rows(path, text)
    questions = [_question(f"{path}:{number}", row) for number, row in rows]
    if not questions:
        raise ValueError(f"{path} holds no questions: give at least one")
    return questions


def _csv_rows(path: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        for cells in reader:
            if not cells:
                continue
            if len(cells) != 6:
                raise ValueError(
                    f"{path}:{reader.line_num} has {len(cells)} columns: "
                    "give question, A, B, C, D, answer"
                )
            if rows or cells[5].strip().lower() != "answer":
                names = ("question", *LETTERS, "answer")
                rows.append((reader.line_num, dict(zip(names, cells, strict=True))))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num} is not CSV ({error}): correct it") from None
    return rows


def _question(place: str, row: Any) -> Question:
    if not isinstance(row, dict):
        raise ValueError(f"{place} is not an object: give question, choices and answer")
    choices = row.get("choices", [row.get(letter) for letter in LETTERS])
    texts = [row.get("question"), *choices] if isinstance(choices, list) else []
    if len(texts) != 5 or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{place} needs a question and four choices that are texts: give them")
    answer = row.get("answer")
    answer = answer.strip() if isinstance(answer, str) else answer
    if isinstance(answer, bool) or answer not in (0, 1, 2, 3, *LETTERS):
        raise ValueError(f"{place} has the answer {answer!r:.40}: give A, B, C or D, or 0 to 3")
    right = LETTERS.index(answer) if isinstance(answer, str) else int(answer)
    return Question(texts[0], tuple(texts[1:]), right)


def prompt(question: Question, style: str) -> tuple[str, list[str]]:
    """(context, continuations). "letter": the choices are listed and their letters compared, as
    MMLU does; "completion": each choice is compared as what follows the question directly."""
    if style == "completion":
        return question.question.strip(), [f" {choice.strip()}" for choice in question.choices]
    pairs = zip(LETTERS, question.choices, strict=True)
    listed = "\n".join(f"{letter}. {choice.strip()}" for letter, choice in pairs)
    return f"{question.question.strip()}\n{listed}\nAnswer:", [f" {x}" for x in LETTERS]


def answer_questions(
    candidate: Candidate,
    tokenizer: Any,
    questions: list[Question],
    *,
    style: str = "letter",
    batch_size: int = 8,
    progress: bool = False,
) -> Answers:
    """The likeliest choice of every question, without examples before it ("zero-shot").

    style: see `prompt`; log-likelihoods of completions are divided by their UTF-8 bytes (lm-eval's
    acc_norm), or short choices would win.
    """
    pairs, sizes = [], []
    for question in questions:
        context, continuations = prompt(question, style)
        pairs += [encode_pair(tokenizer, context, text) for text in continuations]
        sizes += [len(text.encode()) for text in continuations]
    scores, _ = log_likelihoods(candidate, pairs, batch_size=batch_size, progress=progress)
    scores = (scores / sizes if style == "completion" else scores).reshape(len(questions), -1)
    return Answers(scores.argmax(axis=1), np.array([question.answer for question in questions]))
