"""What the commands share: exit codes, the flags of the model, and loading it.

JAX is imported inside functions, so that `--help` and wrong flags answer at once.
"""

from __future__ import annotations

import argparse
import importlib.resources
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qserve_jax.runtime import LLM

# Copies of quantization.config.PRECISIONS and pallas_kernels.BACKENDS, which a test compares.
PRECISIONS = ("w4a8kv4", "w4a8kv8", "w8a8kv4", "w8a8kv8", "w4a16kv4", "w16a16kv16")
BACKENDS = ("auto", "mosaic_sm90", "mosaic_mma", "reference")
DTYPES = ("float32", "bfloat16", "float16")


class UsageError(ValueError):
    """Flags that cannot be used, found before anything is loaded: exit code 2."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that leaves to `run` how errors are shown."""

    def error(self, message: str):
        raise UsageError(f"{message} (see --help)")


def run(
    command: str, body: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None
) -> int:
    """Call body(argv) and return the exit code: 0, 2 wrong flags, 1 any other error, 130 Ctrl-C.

    An error is one line on stderr, `command: error: ...`; with --debug anything but wrong flags
    raises. A reader that closes our output (`| head`) ends the command quietly with 141.
    """
    argv = sys.argv[1:] if argv is None else argv
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print_warning(message)
        try:
            body(argv)
            sys.stdout.flush()
            return 0
        except UsageError as error:
            return _fail(command, str(error), 2)
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:  # point stdout elsewhere, or Python complains when it exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except Exception as error:
            if "--debug" in argv:
                raise
            return _fail(command, describe(error), 1)


def _fail(command: str, message: str, code: int) -> int:
    print(f"{command}: error: {_one_line(message)}", file=sys.stderr)
    return code


def describe(error: Exception) -> str:
    """One line about an exception; its type is named where the message is not written for users."""
    message = (str(error).strip() or "no message").splitlines()[0]
    if "RESOURCE_EXHAUSTED" in message:
        return f"{message}: lower --num-pages, --max-num-seqs or --max-model-len"
    if isinstance(error, (ValueError, OSError, NotImplementedError)):
        return message
    return f"{type(error).__name__}: {message} (--debug shows the traceback)"


def print_warning(message: object) -> None:
    """One line on stderr."""
    print(f"warning: {_one_line(str(message))}", file=sys.stderr)


def _one_line(message: str) -> str:
    return " ".join(message.split())


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argparse type: an integer from `low` to `high`, None for no limit."""
    limit = f"of at least {low}" if high is None else f"in {low}..{high}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer {limit}: give one")
        return value

    return parse


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that `load_llm` reads."""
    group = parser.add_argument_group("model")
    add, positive = group.add_argument, whole_number(1)
    demo = importlib.resources.files("qserve_jax") / "assets" / "demo"
    # fmt: off
    add("--model", metavar="DIR_OR_HF_ID", default=str(demo),
        help="Hugging Face checkpoint with safetensors (default: the embedded demo model)")
    add("--precision", choices=PRECISIONS, default="w4a8kv4",
        help="bits of weights, activations and KV cache (default: %(default)s)")
    add("--group-size", type=int, choices=(-1, 128), default=128,
        help="input features per scale of 4-bit weights, -1 for one per channel (default: 128)")
    add("--dtype", choices=DTYPES, default="bfloat16",
        help="of activations, embeddings and head (default: %(default)s)")
    add("--backend", choices=BACKENDS, default="auto",
        help="of the kernels; auto takes the fastest that can run (default: %(default)s)")
    add("--attends", choices=("full", "quantized"), default="full",
        help="K and V of a new token as its own query sees them (default: %(default)s)")
    add("--max-model-len", type=whole_number(2), metavar="N",
        help="longest prompt plus completion, in tokens (default: the model's context)")
    add("--page-size", type=positive, metavar="N", default=64,
        help="tokens per page of the KV cache (default: %(default)s)")
    add("--num-pages", type=positive, metavar="N",
        help="pages of the KV cache (default: what the sequences need, as far as memory goes)")
    add("--max-num-seqs", type=positive, metavar="N",
        help="sequences decoded together (default: all, at most 64)")
    add("--tensor-parallel-size", type=positive, metavar="N", default=1,
        help="devices to spread the model over; only 1 in this version")
    add("--seed", type=whole_number(0, 2**63 - 1), metavar="N", default=0,
        help="of the random numbers (default: %(default)s)")
    group = parser.add_argument_group("messages")
    group.add_argument("--quiet", action="store_true", help="only errors and warnings on stderr")
    group.add_argument("--debug", action="store_true", help="tracebacks, and all JAX has to say")
    # fmt: on


def check_model_arguments(args: argparse.Namespace) -> None:
    """Raises UsageError for what argparse cannot see."""
    if args.tensor_parallel_size != 1:
        raise UsageError(
            f"--tensor-parallel-size {args.tensor_parallel_size}: this version runs on one device, "
            "use 1"
        )


def load_llm(args: argparse.Namespace, num_sequences: int) -> tuple[LLM, float]:
    """The LLM that the flags of `add_model_arguments` ask for, and the seconds it took to load.

    num_sequences: bounds the default of --max-num-seqs, so that the cache is not larger than of
    use. Compilation is not in the seconds. Raises UsageError for a backend that is not there yet,
    ValueError as `LLM` does.
    """
    if not args.debug:
        quiet_libraries()
    from qserve_jax.runtime import LLM
    from qserve_jax.runtime.compile_time import clock

    _check_backend(args.backend)
    enable_compilation_cache()
    start = clock()
    llm = LLM(
        args.model,
        args.precision,
        args.group_size,
        args.dtype,
        max_model_len=args.max_model_len,
        page_size=args.page_size,
        num_pages=args.num_pages,
        max_num_seqs=args.max_num_seqs or min(num_sequences, 64),
        seed=args.seed,
        attends=args.attends,
        backend=None if args.backend == "auto" else args.backend,
        progress=not args.quiet and sys.stderr.isatty(),
    )
    return llm, clock() - start


def _check_backend(backend: str) -> None:
    from qserve_jax.pallas_kernels.append_kv.api import APPEND_BACKENDS
    from qserve_jax.pallas_kernels.paged_attention.api import ATTENTION_BACKENDS
    from qserve_jax.pallas_kernels.w4a8_matmul.api import W4A8_BACKENDS

    there = ("auto", *(W4A8_BACKENDS | ATTENTION_BACKENDS | APPEND_BACKENDS))
    if backend not in there:
        raise UsageError(f"--backend {backend} is not in this version: use {' or '.join(there)}")


class _OneLineHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print_warning(record.getMessage())


def quiet_libraries() -> None:
    """Hide what XLA's C++ logs, and show what JAX logs as our warnings. Before JAX is imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("jax").handlers = [_OneLineHandler(logging.WARNING)]


def enable_compilation_cache() -> None:
    """Let JAX keep compiled programs on disk, so that a second run starts at once.

    In $QSERVE_JAX_CACHE; else where JAX was told to (JAX_COMPILATION_CACHE_DIR); else in
    qserve_jax under $XDG_CACHE_HOME or ~/.cache. Warns, and goes on without, if it is unwritable.
    """
    import jax

    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = (
        os.environ.get("QSERVE_JAX_CACHE")
        or jax.config.jax_compilation_cache_dir
        or f"{user_cache}/qserve_jax"
    )
    folder = Path(folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        print_warning(
            f"compiled programs are not kept, {folder} is not writable ({error.strerror}): set "
            "QSERVE_JAX_CACHE to another folder"
        )
        jax.config.update("jax_compilation_cache_dir", None)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # small programs add up
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
