"""One row per candidate: its scores, and what differs from the float model's in the same run."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from qserve_jax.evaluation.candidates import Candidate
from qserve_jax.evaluation.choices import Answers, Question, answer_questions
from qserve_jax.runtime.perplexity import Perplexity, agreement, loss_difference, perplexity


@dataclasses.dataclass(frozen=True)
class Work:
    """What every candidate is measured on; any part may be absent.

    token_ids, seq_len, stride: as in `perplexity`. questions, style: as in `answer_questions`.
    """

    token_ids: np.ndarray | None = None
    seq_len: int = 2048
    stride: int | None = None
    questions: list[Question] | None = None
    style: str = "letter"
    batch_size: int = 1
    progress: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
    """What a candidate scored. tasks: {lm-eval task: {metric: value}}."""

    name: str
    perplexity: Perplexity | None = None
    answers: Answers | None = None
    tasks: dict[str, dict[str, float]] | None = None


def measure(candidate: Candidate, tokenizer: Any, work: Work) -> Result:
    """Perplexity and answers of one candidate, as far as `work` asks for them."""
    text = answers = None
    if work.token_ids is not None:
        text = perplexity(
            candidate.model,
            candidate.params,
            work.token_ids,
            seq_len=work.seq_len,
            stride=work.stride,
            kv_bits=candidate.kv_bits,
            batch_size=work.batch_size,
            progress=work.progress,
        )
    if work.questions is not None:
        answers = answer_questions(
            candidate,
            tokenizer,
            work.questions,
            style=work.style,
            batch_size=4 * work.batch_size,
            progress=work.progress,
        )
    return Result(candidate.name, text, answers)


def make_row(result: Result, exact: Result | None) -> dict[str, Any]:
    """The result as plain numbers; with `exact`, the float model's, also what differs from it.

    loss: nats per token. ..._standard_error: NaN becomes None, where there is one window only.
    loss_change: paired, window by window. greedy_agreement: share of the text's tokens in whose
    place both have the same likeliest token. answer_agreement: share of questions answered alike.
    """
    row: dict[str, Any] = {"name": result.name}
    other = Result("") if exact is None or exact is result else exact
    if (text := result.perplexity) is not None:
        row |= {"perplexity": text.value, "perplexity_standard_error": text.standard_error}
        row |= {"loss": text.loss, "loss_standard_error": text.loss_standard_error}
        row |= {"num_tokens": text.num_tokens, "num_windows": len(text.window_tokens)}
        if other.perplexity is not None:
            row["perplexity_change_percent"] = 100 * (text.value / other.perplexity.value - 1)
            row |= _pair("loss_change", loss_difference(text, other.perplexity))
            row |= _pair("greedy_agreement", agreement(text, other.perplexity))
    if (answers := result.answers) is not None:
        row |= _pair("accuracy", answers.accuracy) | {"num_questions": len(answers.right)}
        if other.answers is not None:
            row |= _pair("answer_agreement", answers.agreement(other.answers))
    if result.tasks is not None:
        row["tasks"] = result.tasks
    return {key: None if value != value else value for key, value in row.items()}


def _pair(name: str, value: tuple[float, float]) -> dict[str, float]:
    return {name: value[0], f"{name}_standard_error": value[1]}


COLUMNS = {
    "perplexity": ("perplexity", "{:.4g} ± {}", ".2g"),
    "perplexity_change_percent": ("Δ", "{:+.2f} %", ""),
    "loss_change": ("Δ nats/token", "{:+.4f} ± {}", ".4f"),
    "greedy_agreement": ("same token as float", "{:.2%} ± {}", ".2%"),
    "accuracy": ("right answers", "{:.1%} ± {}", ".1%"),
    "answer_agreement": ("same answer as float", "{:.1%} ± {}", ".1%"),
}
"""Column heading, form of the value with its standard error, and the form of that."""


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a markdown table, aligned to be read as text; absent columns are left out."""
    columns = [key for key in COLUMNS if any(key in row for row in rows)]
    lines = [["", *(COLUMNS[key][0] for key in columns)]]
    lines += [[row["name"], *(_cell(row, key) for key in columns)] for row in rows]
    tasks = dict.fromkeys(
        (task, metric)
        for row in rows
        for task, metrics in row.get("tasks", {}).items()
        for metric in metrics
        if not metric.endswith("_stderr")
    )
    lines[0] += [f"{task} {metric}" for task, metric in tasks]
    for line, row in zip(lines[1:], rows, strict=True):
        line += [_task_cell(row.get("tasks", {}).get(task, {}), metric) for task, metric in tasks]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(_joined(line, widths) for line in lines)


def _joined(cells: list[str], widths: list[int]) -> str:
    padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
    return f"| {' | '.join(padded)} |"


def _cell(row: dict[str, Any], key: str) -> str:
    value, error = row.get(key), row.get(f"{key}_standard_error")
    if value is None:
        return ""
    _, form, error_form = COLUMNS[key]
    return form.format(value, "?" if error is None else format(error, error_form))


def _task_cell(metrics: dict[str, float], metric: str) -> str:
    if metric not in metrics:
        return ""
    error = metrics.get(f"{metric}_stderr")
    return f"{metrics[metric]:.4f}" + ("" if error is None else f" ± {error:.4f}")
