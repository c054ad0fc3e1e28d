"""Serve a checkpoint over HTTP: `python -m qserve_jax.serve --model DIR`.

OpenAI's API: /v1/completions, /v1/chat/completions, /v1/models, beside /health and /metrics
(Prometheus). stdout stays empty; stderr says where it listens, what the engine is doing while it
works, every few seconds, and errors; with --quiet errors alone. SIGTERM and Ctrl-C let
running requests finish for --grace seconds, while new ones get 503; a second one ends it at once.
Exit codes: 0 after SIGTERM, 130 after Ctrl-C, 2 for wrong flags, 1 for any other error.
"""

from __future__ import annotations

import os
import signal

# Until the server handles its signals itself: Python prints or loses a KeyboardInterrupt that comes
# while it imports modules, and there is nothing to tidy up. What ignores it goes on doing so.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import asyncio
import logging
import math
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qserve_jax import _cli
from qserve_jax._cli import UsageError

if TYPE_CHECKING:
    from qserve_jax.runtime import LLM

API_KEY_VARIABLE = "QSERVE_JAX_API_KEY"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the process's); returns the exit code."""
    return _cli.run("qserve_jax.serve", serve, argv)


def serve(argv: Sequence[str]) -> None:
    """Check the flags, load, serve. Raises UsageError before anything is loaded, then whatever
    loading raises, and KeyboardInterrupt after Ctrl-C."""
    parser = build_parser()
    with parser.errors_name_flags():
        args = parser.parse_args(argv)
        _cli.check_model_arguments(args)
        _cli.check_one_process(args, "the server")
        api_key = checked_key(args.api_key)
        bound = listening_socket(args)
        llm = load(args)
    if asyncio.run(serve_llm(llm, args, bound, api_key)) == signal.SIGINT:
        raise KeyboardInterrupt


def build_parser() -> _cli.Parser:
    """All flags of the command."""
    parser = _cli.Parser(
        prog="python -m qserve_jax.serve",
        description="Serve a Hugging Face checkpoint over OpenAI's HTTP API.",
        allow_abbrev=False,
    )
    count = _cli.whole_number(1)
    # fmt: off
    add = parser.add_argument_group("server").add_argument
    add("--host", metavar="ADDRESS", default="127.0.0.1",
        help="to listen on; 0.0.0.0 lets other machines in (default: %(default)s)")
    add("--port", type=_cli.whole_number(0, 65535), metavar="N", default=8000,
        help="0 takes a free one (default: %(default)s)")
    add("--api-key", metavar="KEY",
        help="asked of every request but /health; other users of this machine see flags, so rather "
        f"set ${API_KEY_VARIABLE} (default: none)")
    add("--served-model-name", metavar="NAME",
        help="that clients ask for (default: the last part of --model)")
    add("--max-body-bytes", type=count, metavar="N", default=4 * 2**20,
        help="of a request (default: %(default)s)")
    add("--max-prompt-tokens", type=count, metavar="N",
        help="longest prompt (default: what leaves room for one token)")
    add("--max-queue", type=_cli.whole_number(0), metavar="N", default=1024,
        help="completions that may wait for one of the --max-num-seqs places; more than that get "
        "429 (default: %(default)s)")
    add("--warm-up", action="store_true",
        help="compile whatever requests of up to --max-model-len tokens may need before listening, "
        "but for options beyond temperature, stop and seed; may take minutes the first time")
    add("--grace", type=seconds, metavar="SECONDS", default=30.0,
        help="that running requests have to finish after SIGTERM (default: %(default)g)")
    # fmt: on
    _cli.add_chat_template(parser)
    _cli.add_model_arguments(parser)
    return parser


def seconds(text: str) -> float:
    """An argparse type: a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: give seconds, 0 or more")
    return value


def checked_key(flag: str | None) -> str | None:
    """The API key, or None. Raises UsageError, which does not show it, for one that no HTTP header
    can carry."""
    key = os.environ.get(API_KEY_VARIABLE) if flag is None else flag
    where = API_KEY_VARIABLE if flag is None else "--api-key"
    if key is None:
        return None
    if not key or not all("!" <= character <= "~" for character in key):
        raise UsageError(f"{where} is empty or has spaces or characters beyond ASCII: use others")
    return key


def listening_socket(args: argparse.Namespace) -> socket.socket:
    """The socket of --host and --port, bound before the model takes its time to load.

    Raises UsageError where the extra `serve` is not installed or the address cannot be had.
    """
    try:
        from qserve_jax.server.process import bound_socket
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{error.name} is not installed: run pip install 'qserve_jax[serve]'"
        ) from None
    try:
        return bound_socket(args.host, args.port)
    except ValueError as error:
        raise UsageError(str(error)) from None


def load(args: argparse.Namespace) -> LLM:
    """The LLM, which has generated: what cannot run fails now, not at the first request."""
    from qserve_jax.runtime import SamplingParams

    loaded, took = _cli.load(args)
    _cli.use_chat_template(args, loaded)
    is_float = loaded.format == "float" and loaded.quant_config.weight_bits < 16
    llm = _cli.make_llm(args, loaded, 64, loaded.config.context_length)
    as_most_ask = SamplingParams(max_tokens=2, ignore_eos=True, temperature=1.0)
    llm.generate([[0]], as_most_ask)
    warmed = f" · compiled in {llm.warm_up(as_most_ask):.1f} s" if args.warm_up else ""
    if not args.quiet:
        if is_float:
            print("note: weights were quantised on load, by round-to-nearest", file=sys.stderr)
        ranks = args.tensor_parallel_size
        print(
            f"loaded in {took:.1f} s · {llm.pool.num_pages} pages of {llm.pool.page_size} tokens · "
            f"{llm.max_num_seqs} sequences at once" + f" · {ranks} devices" * (ranks > 1) + warmed,
            file=sys.stderr,
        )
    return llm


async def serve_llm(
    llm: LLM, args: argparse.Namespace, bound: socket.socket, api_key: str | None
) -> int:
    """Serve until a signal, which is returned."""
    from qserve_jax.runtime import AsyncLLM
    from qserve_jax.server.app import make_app
    from qserve_jax.server.process import serve_app
    from qserve_jax.server.service import Limits, Service

    name = args.served_model_name or Path(args.model).resolve().name
    limits = Limits(args.max_body_bytes, args.max_prompt_tokens, args.max_queue)
    service = Service(AsyncLLM(llm), name, limits)
    most, asked = service.longest_prompt, args.max_prompt_tokens
    if asked is not None and asked > most and not args.quiet:
        limit = f"prompts have at most {most}, by the context and the pool of pages"
        print(f"note: --max-prompt-tokens {asked}: {limit}", file=sys.stderr, flush=True)
    host, port = bound.getsockname()[:2]
    where = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def ready() -> None:
        if not args.quiet:
            print(f"serving {name} on {where}/v1 (Ctrl-C stops)", file=sys.stderr, flush=True)
            show_status()

    app = make_app(service, api_key)
    return await serve_app(app, service, bound, grace=args.grace, ready=ready, debug=args.debug)


def show_status() -> None:
    """The engine's line of status, which it logs while it works, on stderr."""
    engine = logging.getLogger("qserve_jax.engine")
    engine.addHandler(logging.StreamHandler(sys.stderr))
    engine.setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
