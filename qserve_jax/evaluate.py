"""What quantisation costs a model: `python -m qserve_jax.evaluate --model DIR --text FILE`.

stdout holds a line, or with --compare a table, or with --output json an object a row; progress,
notes and errors go to stderr. Exit codes: 0, 2 for wrong flags, 1 for any other error, 130 after
Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qserve_jax import _cli
from qserve_jax._cli import UsageError

if TYPE_CHECKING:
    from qserve_jax.checkpoint import LoadedModel
    from qserve_jax.evaluation.candidates import Candidate
    from qserve_jax.evaluation.compare import Result, Work

# Copies of those in qserve_jax.evaluation, which a test compares.
COMPARISONS = ("float", "rtn", "w4a16", "w4a4")
TEXT_FORMATS = ("auto", "plain", "wikitext", "jsonl")
ANSWER_STYLES = ("letter", "completion")
TASK_FILES = (".csv", ".jsonl")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the process's); returns the exit code."""
    return _cli.run("qserve_jax.evaluate", evaluate, argv)


def evaluate(argv: Sequence[str]) -> None:
    """Check the flags, measure, print. Raises UsageError before anything is loaded, then whatever
    loading and measuring raise."""
    parser = build_parser()
    with parser.errors_name_flags():
        args = parser.parse_args(argv)
        check_arguments(args)
        if not args.debug:
            _cli.quiet_libraries()
        inputs = read_inputs(args)
        try:
            rows, settings = run(args, *inputs)
        except RuntimeError as error:  # JaxRuntimeError is one
            if "RESOURCE_EXHAUSTED" not in str(error) or args.debug:
                raise
            message = str(error).splitlines()[0]
            raise ValueError(f"{message}: lower --batch-size or --seq-len") from None
    print_rows(args, rows, settings)  # first: a disk may be full
    if args.save is not None:
        from qserve_jax.benchmarks.provenance import provenance

        content = {"settings": settings, **provenance(), "rows": rows}
        args.save.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def build_parser() -> _cli.Parser:
    """The flags of the command."""
    parser = _cli.Parser(
        prog="python -m qserve_jax.evaluate",
        description="Perplexity of a text and answers to multiple-choice questions, quantised and "
        "in float.",
        allow_abbrev=False,
    )
    positive = _cli.whole_number(1)
    demo = importlib.resources.files("qserve_jax") / "assets" / "demo"
    # fmt: off
    add = parser.add_argument_group("what is measured").add_argument
    add("--text", type=Path, metavar="FILE", help="text whose perplexity is measured")
    add("--text-format", choices=TEXT_FORMATS, default="auto",
        help="wikitext joins lines as published WikiText-2 numbers do, jsonl takes the \"text\" of "
        "each line (default: jsonl by the file's name, else plain)")
    add("--seq-len", type=_cli.whole_number(2), metavar="N", default=2048,
        help="tokens per window, at most the model's context (default: %(default)s)")
    add("--stride", type=positive, metavar="N",
        help="tokens from window to window; fewer than --seq-len give every token context "
        "(default: windows side by side, the last, partial one left out)")
    add("--tasks", nargs="+", metavar="FILE_OR_NAME", default=[],
        help="a file of questions in MMLU's format (.csv or .jsonl), or tasks of lm-eval where it "
        "is installed")
    add("--tasks-folder", type=Path, metavar="DIR", help="lm-eval tasks of your own, as YAML")
    add("--answer-style", choices=ANSWER_STYLES, default="letter",
        help="of a file's questions: choices by their letters, as MMLU does, or as what follows "
        "the question directly (default: %(default)s)")
    add("--compare", metavar="NAME,...", default="",
        help=f"beside the model, in the same run: {', '.join(COMPARISONS)}")
    add("--reference", metavar="DIR_OR_HF_ID",
        help="the float model that --compare starts from (default: --model)")
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="DIR_OR_HF_ID", default=str(demo),
        help="checkpoint with safetensors (default: the embedded demo model)")
    add("--precision", choices=_cli.PRECISIONS,
        help="bits of weights, activations and KV cache (default: w4a8kv4, or the checkpoint's)")
    add("--group-size", type=int, choices=(-1, 128),
        help="input features per scale of 4-bit weights, -1 for one per channel (default: 128, or "
        "the checkpoint's)")
    add("--dtype", choices=_cli.DTYPES, default="bfloat16",
        help="of activations, embeddings and head (default: %(default)s)")
    add("--backend", choices=_cli.BACKENDS, default="auto",
        help="of the kernels; auto takes the fastest that can run (default: %(default)s)")
    add("--batch-size", type=positive, metavar="N", default=1,
        help="windows measured together (default: %(default)s)")
    _cli.add_device_arguments(parser.add_argument_group("devices"))
    add = parser.add_argument_group("output").add_argument
    add("--output", choices=("text", "json"), default="text", help="(default: text)")
    add("--save", type=Path, metavar="FILE", help="also write rows, device and versions as JSON")
    add("--quiet", action="store_true", help="only errors and warnings on stderr")
    add("--debug", action="store_true", help="tracebacks, and all JAX has to say")
    # fmt: on
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raises UsageError for what argparse cannot see; splits args.compare, and args.tasks into the
    file args.questions and names."""
    _cli.check_model_arguments(args)
    if args.text is None and not args.tasks:
        raise UsageError("nothing to measure: give --text FILE, --tasks FILE or both")
    if args.stride is not None and args.stride > args.seq_len:
        raise UsageError(
            f"--stride {args.stride} is more than --seq-len {args.seq_len} and would skip tokens: "
            "give at most that"
        )
    args.compare = list(dict.fromkeys(name for name in args.compare.split(",") if name))
    for name in args.compare:
        if name not in COMPARISONS:
            raise UsageError(f"--compare {name!r} is unknown: use {', '.join(COMPARISONS)}")
    if "w4a4" in args.compare and args.tensor_parallel_size > 1:
        raise UsageError("--compare w4a4 runs on one device: use --tensor-parallel-size 1")
    if args.reference is not None and not args.compare:
        raise UsageError("--reference is for --compare: name what to compare with, as float")
    if args.compare and args.reference is None and is_quantized_checkpoint(args.model):
        raise UsageError(
            f"--compare {','.join(args.compare)} needs the float model that {args.model} was "
            "quantised from: name it with --reference"
        )
    if args.save is not None and args.save.is_dir():
        raise UsageError(f"--save {args.save} is a folder: name a file in it")
    if args.save is not None and not args.save.parent.is_dir():
        raise UsageError(f"--save {args.save}: there is no folder {args.save.parent}, make it")
    target = args.save if args.save is None or args.save.exists() else args.save.parent
    if target is not None and not os.access(target, os.W_OK):
        raise UsageError(f"--save {args.save} is not writable: name another file")
    split_tasks(args)


def split_tasks(args: argparse.Namespace) -> None:
    """Sets args.questions to the file among args.tasks, or None, and leaves lm-eval's names."""
    files = [task for task in args.tasks if task.endswith(TASK_FILES)]
    if len(files) > 1:
        raise UsageError(f"--tasks names {len(files)} files: give one, or one run for each")
    args.questions = files[0] if files else None
    args.tasks = [task for task in args.tasks if task not in files]
    if not args.tasks:
        return
    from qserve_jax.evaluation import lm_eval_model

    if not lm_eval_model.is_installed():
        raise UsageError(
            f"--tasks {args.tasks[0]} is a task of lm-eval, which is not installed: pip install "
            "lm-eval, or name a .csv or .jsonl file of questions"
        )


def is_quantized_checkpoint(path: str) -> bool:
    """Whether a local directory's config.json says that it is quantised."""
    try:
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # a hub id, or what loading will complain of
    return isinstance(config, dict) and bool(config.get("quantization_config"))


def read_inputs(args: argparse.Namespace) -> tuple[str | None, list[Any] | None]:
    """The text and the questions. Raises UsageError where a file is not usable."""
    from qserve_jax.evaluation.choices import read_questions
    from qserve_jax.evaluation.text import read_text

    flag = "--text"
    try:
        text = None if args.text is None else read_text(args.text, args.text_format)
        flag = "--tasks"
        questions = None if args.questions is None else read_questions(args.questions)
    except ValueError as error:
        raise UsageError(f"{flag} {error}") from None
    return text, questions


def run(
    args: argparse.Namespace, text: str | None, questions: list[Any] | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measure the model and what it is compared with: (rows, settings for --save)."""
    from qserve_jax.evaluation.candidates import measured
    from qserve_jax.evaluation.compare import make_row

    args.mesh = _cli.start_devices(args)
    _cli.enable_compilation_cache()
    loaded = load(args, args.model, args.precision, args.group_size)
    if loaded.tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer to read text with: add its files")
    work = make_work(args, loaded, text, questions)
    tokenizer, config = loaded.tokenizer, loaded.quant_config
    results = [score(args, measured(loaded), loaded, work)]
    del loaded  # its memory is the next one's
    if args.compare:
        reference = load(args, args.reference or args.model, "w16a16kv16", None)
        for candidate in comparisons(args, reference, config):
            results.append(score(args, candidate, reference, work, tokenizer))
    exact = next((result for result in results if result.name == "float"), None)
    settings = {
        "model": args.model,
        "text": None if args.text is None else str(args.text),
        "seq_len": work.seq_len,
        "stride": work.stride,
        "dtype": args.dtype,
        "questions": args.questions,
        "answer_style": args.answer_style,
    }
    return [make_row(result, exact) for result in results], settings


def load(
    args: argparse.Namespace, path: str, precision: str | None, group_size: int | None
) -> LoadedModel:
    """`load_model` with the flags that were given."""
    from qserve_jax.checkpoint import load_model

    asked = {"precision": precision, "group_size": group_size}
    return load_model(
        path,
        dtype=args.dtype,
        backend=None if args.backend == "auto" else args.backend,
        progress=shows_progress(args),
        mesh=args.mesh,
        **{name: value for name, value in asked.items() if value is not None},
    )


def shows_progress(args: argparse.Namespace) -> bool:
    return not args.quiet and sys.stderr.isatty()


def make_work(
    args: argparse.Namespace, loaded: LoadedModel, text: str | None, questions: list[Any] | None
) -> Work:
    """What to measure, with windows that fit the model, which stderr tells where they are cut."""
    from qserve_jax.evaluation.compare import Work
    from qserve_jax.evaluation.text import encode_text, full_windows

    seq_len = min(args.seq_len, loaded.config.context_length)
    if text is not None and seq_len < args.seq_len:
        _note(args, f"--seq-len {args.seq_len} is more than the model's context: using {seq_len}")
    if args.stride is not None and args.stride > seq_len:
        raise ValueError(f"--stride {args.stride} is more than the model's context of {seq_len}")
    ids = None if text is None else encode_text(text, loaded.tokenizer)
    if ids is not None and args.stride is None:
        ids = full_windows(ids, seq_len)
    style, progress = args.answer_style, shows_progress(args)
    return Work(ids, seq_len, args.stride, questions, style, args.batch_size, progress)


def comparisons(
    args: argparse.Namespace, reference: LoadedModel, config: Any
) -> Iterator[Candidate]:
    """The rows beside the model, one at a time: each holds the weights anew."""
    from qserve_jax.evaluation.candidates import comparison

    for name in args.compare:
        if name == "rtn" and args.reference is None:
            _note(args, "the model is quantised by round to nearest on load: no further row rtn")
        elif name == "float" and config.precision == "w16a16kv16" and args.reference is None:
            _note(args, "the model is the float one: no further row float")
        else:
            yield comparison(name, reference, config)


def score(
    args: argparse.Namespace,
    candidate: Candidate,
    loaded: LoadedModel,
    work: Work,
    tokenizer: Any = None,
) -> Result:
    """The candidate's result, lm-eval's tasks included."""
    import dataclasses

    from qserve_jax.evaluation.compare import measure
    from qserve_jax.evaluation.lm_eval_model import run_tasks

    result = measure(candidate, tokenizer or loaded.tokenizer, work)
    if not args.tasks:
        return result
    tasks = run_tasks(
        candidate,
        loaded,
        args.tasks,
        include_path=args.tasks_folder,
        batch_size=4 * args.batch_size,
    )
    return dataclasses.replace(result, tasks=tasks)


def _note(args: argparse.Namespace, message: str) -> None:
    if not args.quiet:
        print(f"note: {message}", file=sys.stderr)


def print_rows(
    args: argparse.Namespace, rows: list[dict[str, Any]], settings: dict[str, Any]
) -> None:
    """The rows on stdout, and what they were measured on."""
    from qserve_jax.evaluation.compare import table

    if args.output == "json":
        for row in rows:
            print(json.dumps(settings | row, ensure_ascii=False, allow_nan=False))
        return
    first = rows[0]
    if len(rows) > 1 or first.get("tasks"):
        print(table(rows))
    else:
        if "perplexity" in first:
            error = first["perplexity_standard_error"]
            shown = "?" if error is None else f"{error:.2g}"
            print(f"Perplexity {first['perplexity']:.4g} ± {shown} ({first['name']})")
        if "accuracy" in first:
            print(f"Right answers {first['accuracy']:.1%} ({first['name']})")
    if "num_tokens" in first:
        count, length = first["num_windows"], settings["seq_len"]
        windows = f"{count} windows of {length}" if count > 1 else f"one window of at most {length}"
        spread = "± is one standard error" + (", which takes two windows" if count == 1 else "")
        _note(args, f"{first['num_tokens']} tokens scored, in {windows}; {spread}")


if __name__ == "__main__":
    sys.exit(main())
