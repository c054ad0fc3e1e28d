"""What the commands share: exit codes, the flags of the model, and loading it.

JAX is imported inside functions, so that `--help` and wrong flags answer at once.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import importlib.resources
import io
import json
import logging
import os
import re
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from qserve_jax.checkpoint import LoadedModel
    from qserve_jax.runtime import LLM

# Copies of quantization.config.PRECISIONS and pallas_kernels.BACKENDS, which a test compares.
PRECISIONS = ("w4a8kv4", "w4a8kv8", "w8a8kv4", "w8a8kv8", "w4a16kv4", "w16a16kv16")
BACKENDS = ("auto", "mosaic_sm90", "mosaic_mma", "reference")
DTYPES = ("float32", "bfloat16", "float16")


GOODBYE_SECONDS = 3
"""What one of several processes waits for the others after an error."""


class UsageError(ValueError):
    """Flags that cannot be used, found before anything is loaded: exit code 2."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that leaves to `run` how errors are shown."""

    def error(self, message: str):
        raise UsageError(f"{message} (see --help)")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As of ArgumentParser, but an error has no values of unknown flags: one may be a key."""
        found, rest = self.parse_known_args(args, namespace)
        names = [text.partition("=")[0] for text in rest if text.startswith("-")]
        if rest:
            what = " ".join(names) or f"{len(rest)} without a flag"
            self.error(f"unrecognized arguments: {what}")
        return found

    def flag_names(self, message: str) -> str:
        """A message of the library with flags for parameters: --top-p 2.0 for top_p=2.0.

        Names of one word are words too, and are replaced before = only.
        """
        flags = {
            action.dest: action.option_strings[0]
            for action in self._actions
            if action.option_strings
        }

        def flag(match: re.Match[str]) -> str:
            name, equals = match.groups()
            if not equals and "_" not in name:
                return name
            return flags[name] + (" " if equals else "")

        return re.sub(rf"(?<![\w./'\"-])({'|'.join(flags)})\b(=?)", flag, message)

    @contextlib.contextmanager
    def errors_name_flags(self) -> Iterator[None]:
        """Within, the message of a ValueError passes through `flag_names`."""
        try:
            yield
        except ValueError as error:
            if len(error.args) == 1:  # else a message is made of them, as in UnicodeDecodeError
                error.args = (self.flag_names(str(error)),)
            raise


def run(
    command: str, body: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None
) -> int:
    """Call body(argv) and return the exit code: 0, 2 wrong flags, 1 any other error, 130 Ctrl-C.

    An error is one line on stderr, `command: error: ...`; with --debug anything but wrong flags
    raises. A reader that closes our output (`| head`) ends the command quietly with 141. One of
    several processes does not return after an error: it exits.
    """
    code = _run(command, body, argv)
    if code and _of_several_processes():
        _exit_now(code)
    return code


def _run(command: str, body: Callable[[Sequence[str]], None], argv: Sequence[str] | None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    prepare_streams()
    own_the_gpu()
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: show_warning(str(message))
        try:
            body(argv)
            sys.stdout.flush()
            return 0
        except UsageError as error:
            return _fail(command, _cut(str(error)), 2)
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:  # point stdout elsewhere, or Python complains when it exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except Exception as error:
            if "--debug" in argv:
                if not _of_several_processes():
                    raise
                traceback.print_exc()
            return _fail(command, describe(error), 1)


def _of_several_processes() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _exit_now(code: int) -> NoReturn:
    """Leave the other processes: together if all do, for which we wait GOODBYE_SECONDS; else alone.

    At a usual exit JAX waits for them for minutes, and for those that died until it aborts.
    """
    import jax

    goodbye = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    goodbye.start()
    goodbye.join(GOODBYE_SECONDS)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


MEMORY_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""Of a GPU's memory, what JAX takes. Both together are an error to JAX."""


def own_the_gpu() -> None:
    """A command has a GPU to itself: JAX may take 90 % of its memory, where its own default is
    75 %, unless the environment says how much. Before JAX's first use of a device."""
    if not any(os.environ.get(name) for name in MEMORY_VARIABLES):
        os.environ[MEMORY_VARIABLES[1]] = "0.9"


def prepare_streams() -> None:
    """Make the standard streams safe to use: a closed one is empty, or takes what nobody reads.

    Characters that an encoding lacks are written as \\u escapes, which JSON reads back.
    """
    codecs.register_error("qserve_jax.escape", _escape)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
        if mode == "w" and isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="qserve_jax.escape")


def _escape(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def _fail(command: str, message: str, code: int) -> int:
    print(f"{command}: error: {_one_line(message)}", file=sys.stderr)
    return code


LESS_MEMORY = (
    "lower --num-pages, --max-num-seqs or --max-model-len; where enough is free, but in pieces, "
    "set XLA_PYTHON_CLIENT_ALLOCATOR=cuda_async"
)


def describe(error: Exception) -> str:
    """One line about an exception; its type is named where the message is not written for users."""
    message = (str(error).strip() or "no message").splitlines()[0]
    if "RESOURCE_EXHAUSTED" in message:
        return f"{message}: {LESS_MEMORY}"
    if isinstance(error, (ValueError, OSError, NotImplementedError)):
        return message
    if isinstance(error, ModuleNotFoundError):
        return (
            f"{error.name} is not installed for {sys.executable}: use the Python that qserve_jax "
            "is installed for, as .venv/bin/python of `make demo`"
        )
    return f"{type(error).__name__}: {message} (--debug shows the traceback)"


def show_warning(message: str) -> None:
    """Print a warning, unless it is one of JAX's about the compilation cache that can be mended."""
    if not remove_broken_programs(message):
        print_warning(message)


def print_warning(message: str) -> None:
    """One line on stderr."""
    print(f"warning: {_one_line(message)}", file=sys.stderr)


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _cut(message: str, length: int = 500) -> str:
    """Without the middle of what is too long: the start names the flag, the end the cure."""
    half = length // 2
    return message if len(message) <= length else f"{message[:half]} ... {message[-half:]}"


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


def picture(text: str) -> Path:
    """An argparse type: a file to draw. Folders are left to be refused as such."""
    path = Path(text)
    if path.suffix not in (".png", ".svg", ".pdf") and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no picture: end it in .png, .svg or .pdf")
    return path


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that `load` and `make_llm` read."""
    group = parser.add_argument_group("model")
    add, positive = group.add_argument, whole_number(1)
    demo = importlib.resources.files("qserve_jax") / "assets" / "demo"
    # fmt: off
    add("--model", metavar="DIR_OR_HF_ID", default=str(demo),
        help="Hugging Face checkpoint, float or quantised (default: the embedded demo model)")
    add("--precision", choices=PRECISIONS,
        help="bits of weights, activations and KV cache (default: those of a quantised checkpoint, "
        "else w4a8kv4)")
    add("--group-size", type=int, choices=(-1, 128),
        help="input features per scale of 4-bit weights, -1 for one per channel (default: that of "
        "a quantised checkpoint, else 128)")
    add("--dtype", choices=DTYPES, default="bfloat16",
        help="of activations, embeddings and head (default: %(default)s)")
    add("--backend", choices=BACKENDS, default="auto",
        help="of the kernels; auto takes the fastest that can run (default: %(default)s)")
    add("--attends", choices=("full", "quantized"), default="quantized",
        help="K and V of new tokens as their own queries see them: as the cache holds them, or in "
        "full as QServe does (default: %(default)s)")
    add("--lm-head-bits", type=int, choices=(8, 16), default=16,
        help="of the output head (default: %(default)s, as in the paper)")
    add("--max-model-len", type=whole_number(2), metavar="N",
        help="longest prompt plus completion, in tokens (default: the model's context)")
    add("--page-size", type=positive, metavar="N", default=64,
        help="tokens per page of the KV cache (default: %(default)s)")
    add("--num-pages", type=positive, metavar="N",
        help="pages of the KV cache, of which each device holds its heads (default: what the "
        "longest requests may need, as far as the memory of each device goes)")
    add("--max-num-seqs", type=positive, metavar="N",
        help="sequences decoded together (default: all, at most 64; of a benchmark --batch)")
    add("--max-num-batched-tokens", type=whole_number(16), metavar="N", default=8192,
        help="prompt tokens computed at once; longer prompts are computed in chunks, with decode "
        "steps between (default: %(default)s)")
    add("--prefix-caching", action=argparse.BooleanOptionalAction,
        help="prompts that begin alike share pages (default: where a token's arithmetic does not "
        "depend on it: with --attends quantized or a 16-bit cache)")
    add_device_arguments(group)
    add("--seed", type=whole_number(0, 2**63 - 1), metavar="N", default=0,
        help="of the random numbers (default: %(default)s)")
    group = parser.add_argument_group("messages")
    group.add_argument("--quiet", action="store_true", help="only errors and warnings on stderr")
    group.add_argument("--debug", action="store_true", help="tracebacks, and all JAX has to say")
    # fmt: on


def add_chat_template(parser: argparse.ArgumentParser) -> None:
    """The flag that `use_chat_template` reads."""
    parser.add_argument(
        "--chat-template",
        type=text_file,
        metavar="FILE",
        help="Jinja template of chats (default: the tokenizer's own)",
    )


def text_file(path: str) -> str:
    """An argparse type: the text of a file."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise argparse.ArgumentTypeError(f"{path!r} cannot be read ({reason})") from None


def use_chat_template(args: argparse.Namespace, loaded: LoadedModel) -> None:
    """Give the tokenizer the template of --chat-template. Raises ValueError where there is no
    tokenizer, or it is no template."""
    if args.chat_template is None:
        return
    if loaded.tokenizer is None:
        raise ValueError(f"--chat-template is for a tokenizer, and {args.model} has none")
    import jinja2

    loaded.tokenizer.chat_template = args.chat_template
    try:
        loaded.tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        where = f"line {error.lineno}: {error.message}"
        raise ValueError(f"--chat-template is no Jinja template ({where}): correct it") from None
    except Exception:  # it may want other messages than these
        return


def add_device_arguments(group: argparse._ArgumentGroup) -> None:
    """The flags that `start_devices` reads."""
    add = group.add_argument
    # fmt: off
    add("--tensor-parallel-size", type=whole_number(1), metavar="N", default=1,
        help="devices that share the model; bytes are reported of one of them, the fullest "
        "(default: %(default)s)")
    add("--coordinator-address", metavar="HOST:PORT",
        help="of several processes that share the model, where the first one listens; auto where "
        "the cluster tells JAX (default: $JAX_COORDINATOR_ADDRESS, or one process)")
    add("--num-processes", type=whole_number(1), metavar="N",
        help="that run this command with the same flags (default: $JAX_NUM_PROCESSES)")
    add("--process-id", type=whole_number(0), metavar="I",
        help="of this process, from 0; the first prints (default: $JAX_PROCESS_ID)")
    # fmt: on


def check_model_arguments(args: argparse.Namespace) -> None:
    """Raises UsageError for what argparse cannot see."""
    process_settings(args)


PROCESS_VARIABLES = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}


def process_settings(args: argparse.Namespace) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` needs, by flags or environment; None for one process.

    Raises UsageError where a part is missing or wrong.
    """
    found = {name: getattr(args, name) for name in PROCESS_VARIABLES}
    for name, variable in PROCESS_VARIABLES.items():
        found[name] = os.environ.get(variable) if found[name] is None else found[name]
    flags = {name: "--" + name.replace("_", "-") for name in found}
    missing = [name for name, value in found.items() if value is None]
    if found["coordinator_address"] == "auto" or len(missing) == len(found):
        return {} if missing != list(found) else None
    if missing:
        raise UsageError(
            f"{flags[missing[0]]} is missing: several processes need {', '.join(flags.values())}"
        )
    for name in ("num_processes", "process_id"):
        if not str(found[name]).isdecimal():
            raise UsageError(f"{PROCESS_VARIABLES[name]}={found[name]!r} is no integer: correct it")
        found[name] = int(found[name])
    if found["process_id"] >= found["num_processes"]:
        raise UsageError(
            f"--process-id {found['process_id']} is not below --num-processes "
            f"{found['num_processes']}: processes count from 0"
        )
    return found


def check_one_process(args: argparse.Namespace, what: str) -> None:
    """Raises UsageError where the flags or the environment ask for several processes.

    What comes from outside, at any time, would reach them in different orders.
    """
    settings = process_settings(args)
    if settings is not None and settings.get("num_processes") != 1:
        flag = "--coordinator-address"
        raise UsageError(
            f"{flag} is set ({settings.get('coordinator_address', 'auto')}) but {what} runs in one "
            f"process: leave it out (or unset ${PROCESS_VARIABLES['coordinator_address']}) and "
            "share the model among this machine's devices by --tensor-parallel-size"
        )


def start_devices(args: argparse.Namespace) -> Mesh | None:
    """The mesh that the flags ask for, None for one device. Before JAX's first use of a device.

    Joins the other processes, of which the first alone speaks: stdout and notes of the others go
    nowhere. Raises UsageError where there are no such devices.
    """
    import jax

    from qserve_jax.models.sharding import tensor_mesh

    settings = process_settings(args)
    if settings is not None and not jax.distributed.is_initialized():
        jax.distributed.initialize(**settings)
        if jax.process_index() > 0:
            args.quiet, sys.stdout = True, open(os.devnull, "w", encoding="utf-8")
    try:
        return tensor_mesh(args.tensor_parallel_size)
    except ValueError as error:
        raise UsageError(str(error)) from None


def load(args: argparse.Namespace) -> tuple[LoadedModel, float]:
    """The model that the flags of `add_model_arguments` ask for, and the seconds it took to load.

    Compilation is not in the seconds. Raises UsageError for a backend that cannot run here,
    ValueError as `load_model` does.
    """
    if not args.debug:
        quiet_libraries()
    from qserve_jax.checkpoint import load_model
    from qserve_jax.runtime.compile_time import clock

    mesh = start_devices(args)
    _check_backend(args.backend)
    enable_compilation_cache()
    start = clock()
    loaded = load_model(
        args.model,
        precision=args.precision,
        group_size=args.group_size,
        dtype=args.dtype,
        backend=None if args.backend == "auto" else args.backend,
        progress=not args.quiet and sys.stderr.isatty(),
        mesh=mesh,
    )
    return loaded, clock() - start


def make_llm(
    args: argparse.Namespace, loaded: LoadedModel, num_sequences: int, longest: int
) -> LLM:
    """The LLM that the flags ask for. Raises ValueError as `LLM` does.

    num_sequences and longest (prompt plus completion, in tokens) keep the default cache from being
    larger than of use; a context that is asked for and too long is left for LLM to refuse. longest
    is rounded up, because programs are compiled for the shape of the cache. Consumes `loaded`.
    """
    from qserve_jax.models.collectives import prepare_model
    from qserve_jax.runtime import LLM

    backend = None if args.backend == "auto" else args.backend
    prepare_model(loaded.model, loaded.params, in_place=True)  # frees the parts
    context = loaded.config.context_length
    limit = args.max_model_len or context
    longest = 1 << (longest - 1).bit_length()
    return LLM(
        loaded,
        max_model_len=limit if limit > context else min(limit, longest),
        page_size=args.page_size,
        num_pages=args.num_pages,
        max_num_seqs=args.max_num_seqs or min(num_sequences, 64),
        seed=args.seed,
        attends=args.attends,
        max_num_batched_tokens=args.max_num_batched_tokens,
        enable_prefix_caching=args.prefix_caching,
        lm_head_bits=args.lm_head_bits,
        backend=backend,
    )


def _check_backend(backend: str) -> None:
    from qserve_jax.pallas_kernels.backend import unavailable

    reason = None if backend == "auto" else unavailable(backend)
    if reason is not None:
        raise UsageError(f"--backend {backend}: {reason}; use auto or reference")


class _OneLineHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print_warning(record.getMessage())


def quiet_libraries() -> None:
    """Hide what XLA's C++ logs, and show what JAX logs as our warnings. Before JAX is imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("jax").handlers = [_OneLineHandler(logging.WARNING)]


def cache_folder() -> str:
    """Where compiled programs are to be kept; ~ stands as it is.

    In $QSERVE_JAX_CACHE; else where JAX was told to (JAX_COMPILATION_CACHE_DIR); else in
    qserve_jax under $XDG_CACHE_HOME or ~/.cache.
    """
    import jax

    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (
        os.environ.get("QSERVE_JAX_CACHE")
        or jax.config.jax_compilation_cache_dir
        or f"{user_cache}/qserve_jax"
    )


def enable_compilation_cache() -> None:
    """Let JAX keep compiled programs in `cache_folder`, so that a second run starts at once.

    Warns, and goes on without, if it is unwritable.
    """
    import jax

    folder = cache_folder()
    try:
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ is nobody's home
        print_warning(
            f"compiled programs are not kept, {folder} is not writable "
            f"({getattr(error, 'strerror', error)}): set QSERVE_JAX_CACHE to another folder"
        )
        jax.config.update("jax_compilation_cache_dir", None)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # small programs add up
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def leave_matmuls_to_cublas() -> None:
    """Before JAX's first use of a GPU: no search for faster kernels by Triton, unless XLA_FLAGS has
    a word about it.

    Calibration has many large float32 products, which are cuBLAS's in the end; on an H200 the
    first layer of an 8B model was not done after 79 s with the search
    (docs/results/h200_quantize_8b.json), and all 32 take 281 s without.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_enable_triton_gemm" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_triton_gemm=false".strip()


def remove_broken_programs(message: str) -> bool:
    """Delete the compiled programs that JAX's warning is about; False for another or a failure.

    JAX writes an entry of the cache in place, so that a process killed meanwhile leaves half of it,
    and never overwrites one: each later run would warn and compile again. It warns before it
    compiles, so what we delete is written anew at once. The warning names the program only, whose
    entries for other shapes go too and are compiled when next needed.
    """
    import jax

    found = re.match(r"Error reading persistent compilation cache entry for '([^']+)'", message)
    if found is None or jax.config.jax_compilation_cache_dir is None:
        return False
    folder = Path(jax.config.jax_compilation_cache_dir)
    try:
        entries = [path for path in folder.iterdir() if path.name.startswith(f"{found[1]}-")]
        for path in entries:
            path.unlink(missing_ok=True)
    except OSError:
        return False
    return bool(entries)
