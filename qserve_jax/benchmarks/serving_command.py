"""`bench decode|throughput|latency`: flags, the sweep over precisions and batches, and the file."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qserve_jax import _cli
from qserve_jax._cli import UsageError

if TYPE_CHECKING:
    from qserve_jax.benchmarks.serving_report import Row
    from qserve_jax.checkpoint import LoadedModel

# A copy of those in qserve_jax.benchmarks.model_shapes, which a test compares.
MODELS = (
    *("llama3-8b", "llama2-7b", "llama2-13b", "llama3-70b", "mistral-7b", "yi-34b"),
    *("qwen2.5-7b", "qwen2.5-72b", "qwen1.5-72b"),
)
PROTOCOLS = {
    "throughput": "all requests at once: generated tokens over prefill and decode wall time",
    "decode": "decoding alone, from a cache that is as full as --input-len says",
    "latency": "requests that arrive at random: time to first token and per token",
}
FORMATS = ("table", "csv", "json")


def add_parsers(commands: Any) -> None:
    """The three protocols as sub-commands."""
    for name, what in PROTOCOLS.items():
        parser = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
        positive = _cli.whole_number(1)
        add = parser.add_argument_group("workload").add_argument
        # fmt: off
        add("--batch", nargs="+", type=positive, metavar="N", default=[64],
            help="requests at once, several for a sweep; for latency those decoded together "
            "(default: 64)")
        add("--input-len", type=positive, metavar="N", default=1024, help="(default: %(default)s)")
        add("--output-len", type=positive, metavar="N", default=512, help="(default: %(default)s)")
        if name == "latency":
            add("--rate", nargs="+", type=positive_float, metavar="R", default=[1.0],
                help="requests a second, several for a sweep (default: 1)")
            add("--num-requests", type=positive, metavar="N", default=100,
                help="(default: %(default)s)")
        if name == "throughput":
            add("--profile", type=Path, metavar="DIR",
                help="write JAX's profile of the timed run there")
        add("--dummy-weights", action="store_true",
            help="random weights of --model-shape, made on the device as they are quantised")
        add("--model-shape", choices=MODELS, metavar="MODEL",
            help=f"of the random weights: {', '.join(MODELS)}")
        add("--precisions", nargs="+", choices=_cli.PRECISIONS, metavar="P", default=[],
            help="a sweep over these, in one run; w16a16kv16 is the same engine without "
            "quantisation (default: --precision)")
        add = parser.add_argument_group("results").add_argument
        add("--output", choices=FORMATS, default="table", help="(default: table)")
        add("--save", type=Path, metavar="FILE",
            help="write JSON after every row; what the file already has is not measured again")
        add("--plot", type=_cli.picture, metavar="FILE.png", help="draw the rows")
        # fmt: on
        _cli.add_model_arguments(parser)
        parser.set_defaults(run=run, parser=parser)


def positive_float(text: str) -> float:
    """An argparse type."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number: give one")
    return value


def run(args: argparse.Namespace) -> None:
    """Measure and print. Raises UsageError before anything runs; ValueError where cases could not
    be measured for another reason than memory, after the results of the others are printed."""
    check(args)
    if not args.debug:
        _cli.quiet_libraries()
    from qserve_jax.benchmarks import plot, serving_report
    from qserve_jax.benchmarks.report import write_report

    if args.plot and not plot.can_plot():
        raise UsageError("--plot needs matplotlib: pip install 'qserve_jax[plot]'")
    try:
        report = serving_report.read_report(args.save)
    except ValueError as error:
        raise UsageError(f"--save {error}") from None
    _cli.enable_compilation_cache()
    known = [row for row in report["rows"] if row["commit"] == report["commit"]]
    for row in measure(args, known):
        serving_report.put_row(report["rows"], row | {"commit": report["commit"]})
        if args.save:
            write_report(args.save, report)
        if not args.quiet:
            print(serving_report.markdown([row]).splitlines()[2], file=sys.stderr, flush=True)
    if args.output == "json":
        print(json.dumps(report, indent=1))
    else:
        show = serving_report.markdown if args.output == "table" else serving_report.as_csv
        print(show(report["rows"]))
    if args.plot:
        serving_report.plot(report, args.plot)


def check(args: argparse.Namespace) -> None:
    """Raises UsageError for what argparse cannot see."""
    _cli.check_model_arguments(args)
    if args.what == "latency":
        _cli.check_one_process(args, "bench latency")
    if args.dummy_weights != (args.model_shape is not None):
        raise UsageError("--dummy-weights and --model-shape go together: give both or neither")
    if args.precision and args.precisions:
        raise UsageError("--precision and --precisions contradict each other: give one")
    for flag, file in (("--save", args.save), ("--plot", args.plot)):
        if file is not None and file.is_dir():
            raise UsageError(f"{flag} {file} is a folder: name a file in it")
        if file is not None and not file.parent.is_dir():
            raise UsageError(f"{flag} {file}: there is no folder {file.parent}, make it")


def measure(args: argparse.Namespace, known: list[Row]) -> Iterator[Row]:
    """A row for every case that is not among the known ones; a precision whose weights memory does
    not suffice for has rows that say so."""
    import jax

    from qserve_jax.benchmarks.serving_report import SETTINGS, same_case
    from qserve_jax.quantization import QuantConfig

    for precision in args.precisions or [args.precision]:
        try:
            loaded, problem = load(args, precision), {}
            config = loaded.quant_config
            check_context(args, loaded.config.context_length)
        except jax.errors.JaxRuntimeError as error:
            loaded, problem = None, does_not_fit(error)
            config = QuantConfig.preset(precision or "w4a8kv4", group_size=args.group_size or 128)
        for case in cases(args):
            label = {
                "bench": args.what,
                "model": args.model_shape or Path(args.model).name,
                "precision": config.precision,
                "group_size": config.group_size if config.weight_bits == 4 else None,
                "attends": args.attends,
                "lm_head_bits": args.lm_head_bits,
                "xla_flags": os.environ.get("XLA_FLAGS") or None,
                "allocator": os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR") or None,
                "sums": os.environ.get("QSERVE_JAX_SUMS", "auto").replace("auto", "") or None,
                **case,
                **{name: getattr(args, name, None) for name in SETTINGS},
            }
            if not any(same_case(label, row) for row in known):
                yield {**label, **(problem if loaded is None else measure_case(args, loaded, case))}
        del loaded


def does_not_fit(error: Exception) -> Row:
    """The columns of a case that memory does not suffice for. Raises any other error."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    return {"tokens_per_s": None, "problem": f"does not fit: {str(error).splitlines()[0]}"}


def check_context(args: argparse.Namespace, context: int) -> None:
    """Raises ValueError where the model has no room for such requests."""
    if args.input_len + args.output_len > context:
        raise ValueError(
            f"--input-len {args.input_len} and --output-len {args.output_len} are more than the "
            f"model's context of {context}: lower one"
        )


def cases(args: argparse.Namespace) -> Iterator[Row]:
    """Batches, and rates where there are any."""
    for batch in args.batch:
        for rate in args.rate if args.what == "latency" else [None]:
            case = {"batch": batch, "input": args.input_len, "output": args.output_len}
            case["gpus"] = args.tensor_parallel_size
            yield case if rate is None else {**case, "rate": rate}


def load(args: argparse.Namespace, precision: str | None) -> LoadedModel:
    """The model in a precision. Raises ValueError as `load_model` does."""
    args.precision = precision
    if not args.dummy_weights:
        loaded = _cli.load(args)[0]
    else:
        from qserve_jax.benchmarks.dummy import dummy_model
        from qserve_jax.benchmarks.model_shapes import MODEL_CONFIGS
        from qserve_jax.quantization import QuantConfig

        mesh = _cli.start_devices(args)
        sizes = MODEL_CONFIGS[args.model_shape]
        config = QuantConfig.preset(precision or "w4a8kv4", group_size=args.group_size or 128)
        loaded = dummy_model(sizes, config, dtype=args.dtype, seed=args.seed, mesh=mesh)
    from qserve_jax.models.collectives import prepare_model
    from qserve_jax.runtime.int8_head import with_int8_head

    if args.backend != "auto":
        loaded = dataclasses.replace(loaded, model=loaded.model.clone(backend=args.backend))
    prepare_model(loaded.model, loaded.params, in_place=True)  # frees the parts
    return with_int8_head(loaded) if args.lm_head_bits == 8 else loaded


def measure_case(args: argparse.Namespace, loaded: LoadedModel, case: Row) -> Row:
    """The row of a case; one that memory does not suffice for says so."""
    import jax

    from qserve_jax.benchmarks import serving

    names = (
        *("page_size", "num_pages", "max_num_seqs", "max_model_len", "max_num_batched_tokens"),
        "attends",
    )
    given = {name: getattr(args, name) for name in names}
    given["enable_prefix_caching"] = args.prefix_caching
    given["backend"] = None if args.backend == "auto" else args.backend
    settings = {name: value for name, value in given.items() if value is not None}
    work = serving.Workload(case["batch"], case["input"], case["output"], settings, args.seed)
    if args.what == "decode":
        protocol = functools.partial(serving.decode, loaded, work)
    elif args.what == "latency":
        protocol = functools.partial(serving.latency, loaded, work, case["rate"], args.num_requests)
    else:
        protocol = functools.partial(serving.throughput, loaded, work)
        if args.profile:
            around = functools.partial(jax.profiler.trace, str(args.profile))
            protocol = functools.partial(protocol, around=around)
    try:
        return protocol()
    except jax.errors.JaxRuntimeError as error:
        return does_not_fit(error)
