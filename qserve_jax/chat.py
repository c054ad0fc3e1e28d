"""Talk to a checkpoint in a terminal: `python -m qserve_jax.chat --model DIR`.

A line is a message; the answer appears as it is made, and Ctrl-C stops it. /reset forgets the
conversation, /exit or Ctrl-D ends. A model without a chat template goes on from your text. stdout
holds the answers; everything else goes to stderr. Exit codes: 0, 2 for wrong flags, 1 for any other
error, 130 after Ctrl-C while nothing is being answered.
"""

from __future__ import annotations

import os
import signal

# Before the other imports: see generate.py. Conversations have the handler of Python again.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import contextlib
import dataclasses
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qserve_jax import _cli
from qserve_jax._cli import UsageError
from qserve_jax.runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from qserve_jax.runtime import LLM

Message = dict[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the process's); returns the exit code."""
    return _cli.run("qserve_jax.chat", chat, argv)


def chat(argv: Sequence[str]) -> None:
    """Check the flags, load, converse. Raises UsageError before anything is loaded, then whatever
    loading raises."""
    parser = build_parser()
    with parser.errors_name_flags():
        args = parser.parse_args(argv)
        params = checked_arguments(args)
        llm = load(args)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    has_template = llm.tokenizer is not None and bool(llm.tokenizer.chat_template)
    tell(args, greeting(args.model, has_template))
    converse(llm, params, args.system_prompt, has_template)


def build_parser() -> _cli.Parser:
    """All flags of the command."""
    parser = _cli.Parser(
        prog="python -m qserve_jax.chat",
        description="Talk to a Hugging Face checkpoint in the terminal.",
        allow_abbrev=False,
    )
    # fmt: off
    add = parser.add_argument_group("conversation").add_argument
    add("--system-prompt", metavar="TEXT", help="first message of every conversation")
    add("--max-tokens", "--max-new-tokens", type=int, metavar="N", default=1024,
        help="longest answer, in tokens (default: %(default)s)")
    add("--temperature", type=float, metavar="T", default=0.0, help="0 (the default) is greedy")
    add("--top-p", type=float, metavar="P", default=1.0,
        help="sample from the fewest tokens that have probability P together (default: all)")
    add("--top-k", type=int, metavar="K", default=0,
        help="sample from the K most likely tokens (default: all)")
    add("--min-p", type=float, metavar="P", default=0.0,
        help="sample from tokens at least P times as likely as the likeliest (default: all)")
    add("--repetition-penalty", type=float, metavar="X", default=1.0,
        help="> 1 makes tokens of the conversation less likely (default: 1)")
    add("--stop", nargs="+", action="extend", metavar="STR", default=[],
        help="strings that end an answer, and are not in it")
    # fmt: on
    _cli.add_chat_template(parser)
    _cli.add_model_arguments(parser)
    return parser


def checked_arguments(args: argparse.Namespace) -> SamplingParams:
    """What the flags say about sampling. Raises UsageError."""
    _cli.check_model_arguments(args)
    _cli.check_one_process(args, "the conversation")
    fields = {field.name for field in dataclasses.fields(SamplingParams)} - {"seed"}
    try:
        return SamplingParams(**{k: v for k, v in vars(args).items() if k in fields})
    except ValueError as error:
        raise UsageError(str(error)) from None


def load(args: argparse.Namespace) -> LLM:
    """The LLM, with room for one conversation as long as its context. Raises ValueError."""
    loaded, _ = _cli.load(args)
    _cli.use_chat_template(args, loaded)
    if loaded.tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer to read and write text with: add one")
    if args.system_prompt is not None and not loaded.tokenizer.chat_template:
        raise ValueError(
            f"--system-prompt {args.system_prompt!r:.40} needs a chat template, and the tokenizer "
            f"of {args.model} has none: give --chat-template FILE"
        )
    return _cli.make_llm(args, loaded, 1, loaded.config.context_length)


def greeting(model: str, has_template: bool) -> str:
    """What is said first."""
    ways = "/reset forgets the conversation, /exit ends, Ctrl-C stops an answer"
    if has_template:
        return ways
    return f"{model} has no chat template: it goes on from your text; {ways}"


def tell(args: argparse.Namespace, line: str) -> None:
    """A line on stderr, unless --quiet."""
    if not args.quiet:
        print(line, file=sys.stderr)


def converse(llm: LLM, params: SamplingParams, system: str | None, has_template: bool) -> None:
    """Read lines and answer them until /exit or the end of stdin."""
    start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    history = list(start)
    for line in lines():
        if line == "/exit":
            return
        if line == "/reset":
            history = list(start)
            continue
        if re.fullmatch(r"/\w+", line):
            print(f"error: {line} is no command: /reset and /exit are", file=sys.stderr)
            continue
        asked = [*history, {"role": "user", "content": line}]
        try:
            answer = say(llm, as_prompt(asked, has_template), params)
        except ValueError as error:  # the context is full, or the template refuses
            print(f"error: {error}; /reset forgets the conversation", file=sys.stderr)
            continue
        history = [*asked, {"role": "assistant", "content": answer}]


def lines() -> Iterator[str]:
    """Lines from stdin that are not empty, after a prompt where it is a terminal."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lets input() edit, and remember
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line:
            yield line


def as_prompt(messages: list[Message], has_template: bool) -> Any:
    """The conversation as `LLM.stream` takes it: of a model without a template, its text."""
    if has_template:
        return messages
    texts = [message["content"] for message in messages]
    turns = ["".join(texts[i : i + 2]) for i in range(0, len(texts), 2)]  # a line and its answer
    return " ".join(turns)


def say(llm: LLM, prompt: Any, params: SamplingParams) -> str:
    """Print the answer as it is made; Ctrl-C ends it. Returns as much of it as was shown."""
    shown: list[str] = []
    try:
        with contextlib.closing(llm.stream(prompt, params)) as pieces:
            for piece in pieces:
                shown.append(piece.text)
                print(piece.text, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="", file=sys.stderr, flush=True)
    print(flush=True)
    return "".join(shown)


if __name__ == "__main__":
    sys.exit(main())
