"""Quantise a checkpoint: `python -m qserve_jax.quantize --model DIR --output DIR [--recipe qoq]`.

A float Hugging Face directory becomes a native checkpoint, layer by layer; what a stopped run has
finished is kept in OUTPUT.partial, and the same command goes on with it. Exit codes: 0, 2 for wrong
flags, 1 for any other error, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qserve_jax import _cli
from qserve_jax._cli import UsageError

if TYPE_CHECKING:
    import numpy as np

    from qserve_jax.layerwise import CheckpointSource
    from qserve_jax.quantization.recipes import Recipe

# A copy of quantization.recipes.RECIPES, which a test compares; the first two go by --group-size.
NAMED = (
    *("qoq-g128", "qoq-per-channel", "rtn", "rtn-per-channel"),
    *(f"qoq-g128-no-{part}" for part in ("rotation", "smooth-attention", "output-smoothing")),
    *("qoq-g128-no-gptq", "qoq-g128-no-reordering", "qoq-g128-centered"),
    *(f"qoq-per-channel-no-{part}" for part in ("rotation", "smooth-attention")),
    *(f"qoq-per-channel-no-{part}" for part in ("output-smoothing", "gptq", "clipping")),
    "qoq-per-channel-centered",
)
BY_GROUP = {
    "qoq": {128: "qoq-g128", -1: "qoq-per-channel"},
    "rtn": {128: "rtn", -1: "rtn-per-channel"},
}
PRECISIONS = tuple(p for p in _cli.PRECISIONS if p != "w16a16kv16")
STORIES = Path(__file__).parent / "assets" / "calibration" / "stories.txt"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the process's); returns the exit code."""
    return _cli.run("qserve_jax.quantize", quantize, argv)


def quantize(argv: Sequence[str]) -> None:
    """Check the flags, quantise, print. Raises UsageError before anything is loaded, then whatever
    reading, calibrating and writing raise."""
    parser = build_parser()
    with parser.errors_name_flags():
        args = parser.parse_args(argv)
        text = check_arguments(args)
        if not args.debug:
            _cli.quiet_libraries()
        start = time.perf_counter()
        try:
            report = run(args, text)
        except KeyboardInterrupt:
            if (partial := Path(f"{args.output}.partial")).exists():
                _note(args, f"stopped: the same command goes on with {partial}")
            raise
        except RuntimeError as error:  # JaxRuntimeError is one
            if "RESOURCE_EXHAUSTED" not in str(error) or args.debug:
                raise
            message = str(error).splitlines()[0]
            raise ValueError(f"{message}: lower --seq-len or --num-samples") from None
    report["seconds"] = time.perf_counter() - start
    if args.report == "json":
        print(json.dumps(report))
    elif not args.quiet:
        print(as_text(report), file=sys.stderr)


def build_parser() -> _cli.Parser:
    """The flags of the command."""
    parser = _cli.Parser(
        prog="python -m qserve_jax.quantize",
        description="Quantise a float checkpoint to the native format, calibrated, layer by layer.",
        allow_abbrev=False,
    )
    positive = _cli.whole_number(1)
    # fmt: off
    add = parser.add_argument_group("checkpoints").add_argument
    add("--model", metavar="DIR_OR_HF_ID", required=True, help="float Hugging Face checkpoint")
    add("--output", metavar="DIR", required=True, type=Path,
        help="directory to make; must not exist, or be empty")
    add("--restart", action="store_true", help="forget what a stopped run has left of --output")
    add = parser.add_argument_group("quantisation").add_argument
    add("--recipe", metavar="NAME", choices=("qoq", *NAMED), default="qoq",
        help="qoq, rtn (round to nearest, not calibrated), qoq-g128-centered (keys' mean taken off "
        "them: not in QServe's format) or an ablation, as qoq-g128-no-rotation "
        "(default: %(default)s)")
    add("--group-size", type=int, choices=(-1, 128),
        help="input features per scale, -1 for one scale per channel (default: the recipe's)")
    add("--precision", choices=PRECISIONS,
        help="bits of weights, activations and KV cache (default: w4a8kv4)")
    add("--kv-bits", type=int, choices=(4, 8, 16), help="of the cache (default: --precision's)")
    add("--scale-dtype", choices=("float32", "float16"), default="float32",
        help="float16 for a conversion to the format of QServe later (default: %(default)s)")
    add = parser.add_argument_group("calibration").add_argument
    add("--calib-file", type=Path, metavar="FILE",
        help="text, or .jsonl with \"text\" on each line, like what the model is to read "
        "(default: children's stories that come with the package)")
    add("--num-samples", type=positive, metavar="N", default=128,
        help="windows of the text (default: %(default)s)")
    add("--seq-len", type=_cli.whole_number(2), metavar="N", default=1024,
        help="tokens per window, at most the model's context (default: %(default)s)")
    add("--seed", type=_cli.whole_number(0, 2**63 - 1), metavar="N", default=42,
        help="which windows (default: %(default)s)")
    add("--calib-dtype", choices=_cli.DTYPES, default="float32",
        help="of the activations; weights are always quantised in float32 (default: %(default)s)")
    add = parser.add_argument_group("messages").add_argument
    add("--report", choices=("text", "json"), default="text",
        help="what was done, as text on stderr or an object on stdout (default: text)")
    add("--plot", type=_cli.picture, metavar="FILE.png",
        help="draw the errors of all layers (matplotlib)")
    add("--quiet", action="store_true", help="only errors and warnings on stderr")
    add("--debug", action="store_true", help="tracebacks, and all JAX has to say")
    # fmt: on
    return parser


def check_arguments(args: argparse.Namespace) -> str | None:
    """Raises UsageError for what argparse cannot see. Returns the calibration text."""
    from qserve_jax.checkpoint.atomic import check_free
    from qserve_jax.evaluation.text import read_text
    from qserve_jax.layerwise.plot import can_plot

    args.quantization = make_recipe(args)
    try:
        args.output = args.output.expanduser()
        check_free(args.output)
    except (ValueError, OSError, RuntimeError) as error:
        raise UsageError(f"--output: {error}") from None
    if args.plot is not None and not can_plot():
        raise UsageError(
            "--plot needs matplotlib, which is not installed: pip install 'qserve_jax[plot]'"
        )
    if args.plot is not None and args.plot.is_dir():
        raise UsageError(f"--plot {args.plot} is a folder: name a file in it")
    if args.plot is not None and not args.plot.parent.is_dir():
        raise UsageError(f"--plot {args.plot}: there is no folder {args.plot.parent}, make it")
    if not args.quantization.needs_calibration:
        if args.calib_file is not None:
            raise UsageError(f"--recipe {args.recipe} is not calibrated: leave --calib-file out")
        return None
    try:
        return read_text(args.calib_file or STORIES)
    except ValueError as error:
        raise UsageError(f"--calib-file {error}") from None


def make_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe that the flags ask for. Raises UsageError where they contradict each other."""
    from qserve_jax.quantization.config import QuantConfig
    from qserve_jax.quantization.recipes import find_recipe

    names = BY_GROUP.get(args.recipe, {})
    if args.recipe == "qoq" or args.group_size is not None:
        recipe = find_recipe(names.get(args.group_size or 128, args.recipe))
    else:
        recipe = find_recipe(args.recipe)
    held = recipe.quant.group_size
    if args.group_size not in (None, held):
        raise UsageError(
            f"--group-size {args.group_size}: --recipe {args.recipe} is for {held}, leave it out"
        )
    quant = QuantConfig.preset(args.precision or "w4a8kv4", group_size=held)
    if args.kv_bits is not None:
        if args.precision is not None and quant.kv_bits != args.kv_bits:
            raise UsageError(
                f"--kv-bits {args.kv_bits} contradicts --precision {args.precision}: give one"
            )
        quant = dataclasses.replace(quant, kv_bits=args.kv_bits)
    quant = dataclasses.replace(quant, scale_dtype=args.scale_dtype)
    if quant.weight_bits != 4:  # round to nearest is all that is done to 8 bits
        recipe = recipe.without(gptq=False, clip=False)
    return recipe.without(quant=quant)


def run(args: argparse.Namespace, text: str | None) -> dict[str, Any]:
    """Quantise. Returns what is worth telling."""
    from qserve_jax.layerwise import open_source, quantize_checkpoint
    from qserve_jax.layerwise.plot import plot_errors
    from qserve_jax.runtime.device_memory import peak_bytes

    _cli.leave_matmuls_to_cublas()
    _cli.enable_compilation_cache()
    source = open_source(args.model)
    tokens = None if text is None else calibration_tokens(args, source, text)
    report = quantize_checkpoint(
        args.output,
        source,
        args.quantization,
        tokens,
        dtype=args.calib_dtype,
        restart=args.restart,
        progress=not args.quiet and sys.stderr.isatty(),
    )
    if args.plot is not None:
        plot_errors(report, args.plot)
    after = sum(file.stat().st_size for file in args.output.glob("*.safetensors"))
    sizes = {"bytes_before": source.nbytes, "bytes_after": after, "peak_bytes": peak_bytes()}
    return {"output": str(args.output), "recipe": args.recipe, **report, **sizes}


def calibration_tokens(args: argparse.Namespace, source: CheckpointSource, text: str) -> np.ndarray:
    """i32[samples, seq_len] of the text. Raises ValueError where there is no tokenizer, or too
    little text."""
    from qserve_jax.checkpoint.tokenizer import load_tokenizer
    from qserve_jax.evaluation.text import encode_text
    from qserve_jax.layerwise import sample_windows

    tokenizer = load_tokenizer(source.folder)
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer to read text with: add its files")
    seq_len, samples = min(args.seq_len, source.config.context_length), args.num_samples
    if seq_len < args.seq_len:
        _note(args, f"--seq-len {args.seq_len} is more than the model's context: using {seq_len}")
    ids = encode_text(text, tokenizer)
    if args.calib_file is None:
        samples = min(samples, max(1, len(ids) // seq_len))
        _note(
            args,
            f"calibrating on {samples} x {seq_len} tokens of children's stories: --calib-file "
            "takes text that is nearer to what the model is to read",
        )
    return sample_windows(ids, samples, seq_len, args.seed)


def as_text(report: dict[str, Any]) -> str:
    """The report in a few lines."""
    before, after, peak = (
        f"{report[key] / 2**20:,.1f} MiB" for key in ("bytes_before", "bytes_after", "peak_bytes")
    )
    lines = [f"{report['recipe']}: {report['output']}, {before} -> {after}"]
    errors = {
        part["layer"]: part["output_error"] for part in report["parts"] if "output_error" in part
    }
    if errors:
        worst = max(errors, key=errors.__getitem__)
        mean = sum(errors.values()) / len(errors)
        lines.append(
            f"squared error of the layers' outputs: mean {mean:.2%}, most {errors[worst]:.2%} in "
            f"layer {worst}"
        )
    lines.append(f"{report['seconds']:.1f} s, at most {peak} of memory")
    return "\n".join(lines)


def _note(args: argparse.Namespace, message: str) -> None:
    if not args.quiet:
        print(f"note: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
