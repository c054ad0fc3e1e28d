"""Measure: `python -m qserve_jax.bench kernels|throughput|decode|latency`.

`kernels` times the kernels on this GPU, the others serving; those run anywhere.

stdout holds the table (or CSV, or JSON); progress, problems and errors go to stderr. Exit codes: 0,
2 for wrong flags, 1 for any other error and for cases that could not be measured, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qserve_jax import _cli
from qserve_jax._cli import UsageError
from qserve_jax.benchmarks import serving_command

if TYPE_CHECKING:
    from qserve_jax.benchmarks.report import Report

# Copies of those in qserve_jax.benchmarks, which a test compares.
MODELS = ("llama3-8b", "qwen2.5-7b", "llama2-7b", "llama3-70b", "qwen2.5-72b")
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
FORMATS = ("table", "csv", "json")
GROUP_SIZES = (128, -1)
BATCHES, CONTEXTS, KV_BITS = (1, 16, 64, 128, 256), (1024, 1536, 4096, 16384), (4, 8, 16)
FLAGS = {
    "matmul": ("shapes", "model_shape", "tokens", "group_size", "only_ours"),
    "attention": ("heads", "batch", "context", "kv_bits"),
}
"""Those of one --op only."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the process's); returns the exit code."""
    return _cli.run("qserve_jax.bench", bench, argv)


def bench(argv: Sequence[str]) -> None:
    """Check the flags, measure, print. Raises UsageError before anything runs, then whatever
    measuring raises."""
    args = build_parser().parse_args(argv)
    with args.parser.errors_name_flags():
        args.run(args)


def bench_kernels(args: argparse.Namespace) -> None:
    """Measure the kernels. Raises ValueError where cases could not be measured, after the results
    of the others are printed."""
    if not args.debug:
        _cli.quiet_libraries()
    from qserve_jax.benchmarks import plot

    check_flags(args)
    if args.op == "attention":
        return bench_attention(args)
    from qserve_jax.benchmarks import report

    shapes = checked_shapes(args)
    saved = checked_save(args)
    if saved is not None and not report.is_matmul(saved):
        raise UsageError(f"--save {args.save} holds no results of --op matmul: name another file")
    if args.plot and not plot.can_plot():
        raise UsageError("--plot needs matplotlib: pip install 'qserve_jax[plot]'")
    found, problems = (saved, []) if args.no_run else measure(args, shapes, saved)
    assert found is not None  # of --no-run, by checked_save
    print(report.FORMATS[args.output](found))
    if args.plot:
        plot.plot_roofline(found, args.plot)
    _raise_problems(problems)


def check_flags(args: argparse.Namespace) -> None:
    """UsageError where a flag was given that --op does not read."""
    for op, names in FLAGS.items():
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]
        if given and op != args.op:
            raise UsageError(f"{given[0]} is of --op {op}, not of --op {args.op}: leave it out")


def _raise_problems(problems: list[str]) -> None:
    if problems:
        more = f"; {len(problems) - 1} more above" if len(problems) > 1 else ""
        raise ValueError(f"not measured: {problems[0]}{more}")


def bench_attention(args: argparse.Namespace) -> None:
    """`--op attention`: as `bench`."""
    from qserve_jax.benchmarks import attention_report as report
    from qserve_jax.benchmarks import plot
    from qserve_jax.benchmarks.attention import Sweep, attention_report, run_sweep

    cases = attention_cases(args)
    saved = checked_save(args)
    if saved is not None and not report.is_attention(saved):
        raise UsageError(
            f"--save {args.save} holds no results of --op attention: name another file"
        )
    if args.plot and not plot.can_plot():
        raise UsageError("--plot needs matplotlib: pip install 'qserve_jax[plot]'")
    found, problems = saved, []
    if not args.no_run:
        bits = tuple(dict.fromkeys(args.kv_bits or KV_BITS))

        def run(bench: Any, backends: tuple[str, ...]) -> None:
            bench.report = bench.report if saved else attention_report(bench.report)
            run_sweep(Sweep(tuple(cases), backends, bits), bench)

        found, problems = _measured(args, saved, run)
    assert found is not None  # of --no-run, by checked_save
    print(report.FORMATS[args.output](found))
    if args.plot:
        report.plot(found, args.plot)
    _raise_problems(problems)


def attention_cases(args: argparse.Namespace) -> list[Any]:
    """What --heads, --batch, --context and --kv-bits ask for: all combinations, of all of what is
    not given (of long contexts then small batches); without any of them the default cases. Raises
    UsageError."""
    from qserve_jax.benchmarks.attention_cases import HEADS, decode_cases, default_cases

    heads = tuple(map(parse_heads, args.heads))
    if not (heads or args.batch or args.context or args.kv_bits):
        return default_cases(KV_BITS)
    bits = tuple(dict.fromkeys(args.kv_bits or KV_BITS))
    batches, contexts = tuple(args.batch or BATCHES), tuple(args.context or CONTEXTS)
    limited = not (args.batch and args.context)
    return decode_cases(heads or HEADS, bits, batches, contexts, limited)


def parse_heads(text: str) -> tuple[int, int, int]:
    """ "32/8/128" -> (32, 8, 128): query heads, KV heads, head_dim. Raises UsageError."""
    parts = text.split("/")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise UsageError(f"--heads {text!r}: give query heads/KV heads/head_dim, as 32/8/128")
    n, k, h = map(int, parts)
    if n % k or h not in (64, 128):
        raise UsageError(f"--heads {text!r}: KV heads must divide query heads, head_dim be 64, 128")
    return n, k, h


def build_parser() -> _cli.Parser:
    """The flags of the command."""
    parser = _cli.Parser(
        prog="python -m qserve_jax.bench",
        description="Measure the kernels on this GPU beside XLA's and torch's, or serving.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    kernels = commands.add_parser(
        "kernels",
        help="kernel times by CUPTI, weights out of the cache",
        description="Kernel times by CUPTI, medians of 20 calls with weights out of the cache.",
        allow_abbrev=False,
    )
    add, positive = kernels.add_argument, _cli.whole_number(1)
    # fmt: off
    add("--op", choices=("matmul", "attention"), default="matmul", help="(default: %(default)s)")
    add("--shapes", nargs="+", metavar="NxK", default=[],
        help="matmul: out features x in features, as 28672x4096")
    add("--model-shape", nargs="+", choices=MODELS, metavar="MODEL", default=[],
        help=f"matmul: those of a model: {', '.join(MODELS)} (default: llama3-8b)")
    add("--tokens", nargs="+", type=positive, metavar="M", default=[],
        help=f"matmul: rows of the activation (default: {' '.join(map(str, TOKENS))})")
    add("--group-size", nargs="+", type=int, choices=GROUP_SIZES, default=[],
        help="matmul: input features per scale, -1 for one per channel (default: both)")
    add("--only-ours", action="store_true",
        help="matmul: not XLA's and torch's bf16, int8 and fp8, which take most of the time")
    add("--heads", nargs="+", metavar="N/K/H", default=[],
        help="attention: query heads/KV heads/head_dim (default: those of six models, Llama-3-8B's"
        " with all batches, contexts and bits, the others with some)")
    add("--batch", nargs="+", type=_cli.whole_number(1, 2**16), metavar="B", default=[],
        help=f"attention: sequences (default: {' '.join(map(str, BATCHES))})")
    add("--context", nargs="+", type=_cli.whole_number(1, 2**20), metavar="TOKENS", default=[],
        help=f"attention: cached tokens of each (default: {' '.join(map(str, CONTEXTS))}; the"
        " longest of up to 64 sequences, unless --batch is given, too)")
    add("--kv-bits", nargs="+", type=int, choices=KV_BITS, default=[],
        help="attention: of the cache (default: all); with any of these four, all combinations")
    add("--backend", nargs="+", choices=_cli.BACKENDS[1:], metavar="NAME", default=[],
        help=f"{', '.join(_cli.BACKENDS[1:])} (default: the kernels that can run here)")
    add("--output", choices=FORMATS, default="table", help="(default: table)")
    add("--save", type=Path, metavar="FILE",
        help="write JSON after every row; what the file has of these kernels is not measured again")
    add("--no-run", action="store_true", help="measure nothing, show what --save FILE has")
    add("--plot", type=_cli.picture, metavar="FILE.png",
        help="draw the share of the ceiling over M")
    add("--quiet", action="store_true", help="only errors and warnings on stderr")
    add("--debug", action="store_true", help="tracebacks, and all JAX has to say")
    # fmt: on
    kernels.set_defaults(run=bench_kernels, parser=kernels)
    serving_command.add_parsers(commands)
    return parser


def checked_shapes(args: argparse.Namespace) -> tuple[tuple[int, int], ...]:
    """(N, K) of --shapes and --model-shape, each once. Raises UsageError."""
    from qserve_jax.benchmarks.shapes import MODEL_SHAPES, parse_shape

    try:
        shapes = [parse_shape(text) for text in args.shapes]
    except ValueError as error:
        raise UsageError(f"--shapes {error}") from None
    models = args.model_shape or ([] if shapes else ["llama3-8b"])
    for model in models:
        shapes += MODEL_SHAPES[model]
    return tuple(dict.fromkeys(shapes))


def checked_save(args: argparse.Namespace) -> Report | None:
    """What --save FILE holds. Raises UsageError where it is of no use."""
    from qserve_jax.benchmarks.report import read_report

    if args.save is None:
        if args.no_run:
            raise UsageError("--no-run shows saved results: name their --save FILE")
        return None
    if args.save.is_dir():
        raise UsageError(f"--save {args.save} is a folder: name a file in it")
    if not args.save.parent.is_dir():
        raise UsageError(f"--save {args.save}: there is no folder {args.save.parent}, make it")
    try:
        saved = read_report(args.save)
    except ValueError as error:
        raise UsageError(f"--save {error}") from None
    if args.no_run and saved is None:
        raise UsageError(f"--no-run: there is no file {args.save}, leave --no-run out to measure")
    if args.no_run and not (saved and saved["ceilings"]):
        raise UsageError(f"--no-run: {args.save} has no results yet, leave --no-run out to measure")
    return saved


def measure(
    args: argparse.Namespace, shapes: tuple[tuple[int, int], ...], saved: Report | None
) -> tuple[Report, list[str]]:
    """The report, and a line for every case that could not be measured. Raises ValueError where
    this machine cannot measure, or the saved report is of another one."""
    from qserve_jax.benchmarks.matmul import Sweep, run_sweep

    def run(bench: Any, backends: tuple[str, ...]) -> None:
        tokens = tuple(dict.fromkeys(args.tokens or TOKENS))
        sizes = tuple(dict.fromkeys(args.group_size or GROUP_SIZES))
        run_sweep(Sweep(shapes, tokens, sizes, backends, others=not args.only_ours), bench)

    return _measured(args, saved, run)


def _measured(
    args: argparse.Namespace,
    saved: Report | None,
    run: Callable[[Any, tuple[str, ...]], None],
) -> tuple[Report, list[str]]:
    """The report that run(bench, backends) fills, and its problems. Raises as `measure`."""
    from qserve_jax.benchmarks import clock
    from qserve_jax.benchmarks.matmul import Bench
    from qserve_jax.benchmarks.report import continued, empty_report, write_report

    _cli.enable_compilation_cache()
    backends = tuple(dict.fromkeys(args.backend)) or runnable_backends()
    clock.check_available()
    here = empty_report()
    start = here if saved is None else continued(saved, here)

    def save(report: Report) -> None:
        if args.save:
            write_report(args.save, report)

    def say(line: str) -> None:
        if not args.quiet:
            print(line, file=sys.stderr, flush=True)

    bench = Bench(clock.call_times, start, save, say, args.op)
    run(bench, backends)
    return bench.report, bench.problems


def runnable_backends() -> tuple[str, ...]:
    """The matmul kernels that can run here. Raises ValueError where there is none."""
    from qserve_jax.pallas_kernels import backend
    from qserve_jax.pallas_kernels.w4a8_matmul.api import W4A8_BACKENDS

    kernels = [name for name in backend.BACKENDS[:-1] if name in W4A8_BACKENDS]
    reasons = {name: backend.unavailable(name) for name in kernels}
    names = tuple(name for name, reason in reasons.items() if reason is None)
    if not names:
        raise ValueError(f"no kernel can run here: {'; '.join(map(str, reasons.values()))}")
    return names


if __name__ == "__main__":
    sys.exit(main())
