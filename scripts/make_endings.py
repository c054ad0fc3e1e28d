"""Multiple-choice questions from the held-out stories, in MMLU's format: which sentence follows?

Each story is cut before its last sentence and before the one in its middle. The question is what
comes before the cut (its last WORDS words); the choices are the sentence that follows, and those
that follow in three other stories at the same kind of cut. Writes FILE.csv for
`python -m qserve_jax.evaluate --tasks FILE.csv --answer-style completion`.
"""

from __future__ import annotations

import argparse
import csv
import re
from pathlib import Path

import numpy as np
from tinystories import load_stories

from qserve_jax.evaluation.choices import LETTERS, Question

WORDS = 25


def make_questions(stories: list[str], seed: int = 0) -> list[Question]:
    """Two questions a story; a story of fewer than four sentences gives none."""
    rng = np.random.default_rng(seed)
    cut = [s for s in map(sentences, stories) if len(s) >= 4]
    questions = []
    for where in (lambda s: len(s) - 1, lambda s: len(s) // 2):
        follows = [s[where(s)] for s in cut]
        for i, story in enumerate(cut):
            before = " ".join(" ".join(story[: where(story)]).split()[-WORDS:])
            wrong = rng.choice(sorted(set(follows) - {follows[i]}), 3, replace=False).tolist()
            answer = int(rng.integers(4))
            choices = [*wrong[:answer], follows[i], *wrong[answer:]]
            questions.append(Question(before, tuple(choices), answer))
    return questions


def sentences(story: str) -> list[str]:
    """Split at the white space behind . ! ? and a closing quotation mark, before a capital."""
    return re.split(r"(?:(?<=[.!?])|(?<=[.!?][\"”]))\s+(?=[\"“A-Z])", story.strip())


def write_questions(path: Path, questions: list[Question]) -> None:
    """MMLU's own form: question, four choices, the letter of the answer."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for q in questions:
            writer.writerow([q.question, *q.choices, LETTERS[q.answer]])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the two excerpts")
    parser.add_argument("--output", type=Path, required=True, help="the .csv file to write")
    args = parser.parse_args()
    write_questions(args.output, make_questions(load_stories(args.data).test))


if __name__ == "__main__":
    main()
