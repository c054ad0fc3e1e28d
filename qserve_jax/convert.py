"""Convert checkpoints: `python -m qserve_jax.convert --model DIR --output DIR --to native`.

In: a float Hugging Face checkpoint (quantised on the way, by round-to-nearest), a native one
(safetensors or Orbax), a published QServe one (safetensors or .bin), GPTQ and AWQ where they can be
had exactly. Out: native, orbax, qserve. The output appears whole or not at all. Exit codes: 0, 2
for wrong flags, 1 for any other error, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qserve_jax import _cli
from qserve_jax._cli import UsageError

if TYPE_CHECKING:
    from qserve_jax.checkpoint import LoadedModel

TARGETS = ("native", "orbax", "qserve")
# A copy of checkpoint.qserve_format.S2_ORDERS, which a test compares.
S2_ORDERS = ("tile32", "tile16")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the process's); returns the exit code."""
    return _cli.run("qserve_jax.convert", convert, argv)


def convert(argv: Sequence[str]) -> None:
    """Check the flags, load, write, print. Raises UsageError before anything is loaded, then
    whatever loading and writing raise."""
    parser = build_parser()
    with parser.errors_name_flags():
        args = parser.parse_args(argv)
        check_arguments(args)
        if not args.debug:
            _cli.quiet_libraries()
        loaded = load(args)
        report = write(args, loaded) | {"input": loaded.format, "output": str(args.output)}
    if args.report == "json":
        print(json.dumps(report))
    elif not args.quiet:
        print(as_text(report), file=sys.stderr)


def build_parser() -> _cli.Parser:
    """The flags of the command."""
    parser = _cli.Parser(
        prog="python -m qserve_jax.convert",
        description="Convert a checkpoint to the native format, Orbax or that of QServe.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    # fmt: off
    add("--model", metavar="DIR_OR_HF_ID", required=True,
        help="float, native, QServe, GPTQ or AWQ checkpoint; which, it tells itself")
    add("--output", metavar="DIR", required=True, type=Path,
        help="directory to make; must not exist, or be empty")
    add("--to", choices=TARGETS, required=True, help="format to write")
    add("--precision", choices=[p for p in _cli.PRECISIONS if p != "w16a16kv16"],
        help="bits of a float checkpoint's weights, activations and cache (default: w4a8kv4)")
    add("--group-size", type=int, choices=(-1, 128),
        help="of a float checkpoint's 4-bit weights, -1 for one scale per channel (default: 128)")
    add("--s2-order", choices=S2_ORDERS,
        help="order of the level-2 scales in a QServe checkpoint (default: found out)")
    add("--report", choices=("text", "json"), default="text",
        help="what was done, as text on stderr or an object on stdout (default: text)")
    add("--quiet", action="store_true", help="only errors and warnings on stderr")
    add("--debug", action="store_true", help="tracebacks, and all JAX has to say")
    # fmt: on
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raises UsageError where the output cannot be written, before anything is loaded."""
    from qserve_jax.checkpoint.atomic import check_free

    try:
        args.output = args.output.expanduser()
        check_free(args.output)
    except (ValueError, OSError, RuntimeError) as error:
        raise UsageError(f"--output: {error}") from None


def load(args: argparse.Namespace) -> LoadedModel:
    """The model in its own dtype, with scales that the output can hold where they are made here."""
    from qserve_jax.checkpoint import load_model

    _cli.enable_compilation_cache()
    return load_model(
        args.model,
        precision=args.precision,
        group_size=args.group_size,
        dtype="auto",
        scale_dtype="float16" if args.to == "qserve" else "float32",
        s2_order=args.s2_order,
        progress=has_bar(args),
    )


def write(args: argparse.Namespace, loaded: LoadedModel) -> dict[str, Any]:
    """Write the output. Returns what is worth telling."""
    from qserve_jax.checkpoint.native import save_native
    from qserve_jax.checkpoint.orbax_io import save_native_orbax
    from qserve_jax.checkpoint.qserve_format import export_qserve

    report: dict[str, Any] = {"to": args.to, "precision": loaded.quant_config.precision}
    model = (args.output, loaded.params, loaded.config)
    if args.to == "qserve":
        error = export_qserve(*model, source=loaded.path, progress=has_bar(args))
        report["largest_scale_error"] = error
    elif args.to == "orbax":
        save_native_orbax(*model, loaded.quant_config, source=loaded.path)
    else:
        save_native(*model, loaded.quant_config, source=loaded.path, progress=has_bar(args))
    report["bytes"] = sum(f.stat().st_size for f in args.output.rglob("*") if f.is_file())
    return report


def has_bar(args: argparse.Namespace) -> bool:
    """Whether progress is shown on stderr."""
    return not args.quiet and sys.stderr.isatty()


def as_text(report: dict[str, Any]) -> str:
    """The report in a line or two."""
    size = report["bytes"] / 2**20
    lines = [
        f"{report['input']} -> {report['to']}, {report['precision']}: {report['output']} "
        f"({size:.1f} MiB)"
    ]
    if report["input"] == "float":
        lines.append("note: weights were quantised by round-to-nearest")
    if report["to"] == "qserve" and report["precision"] != "w4a8kv4":
        lines.append(
            "note: QServe's format does not hold the bits of activations and cache: load it with "
            f"--precision {report['precision']}"
        )
    if error := report.get("largest_scale_error"):
        lines.append(f"note: scales were rounded to float16, relative error up to {error:.1e}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
