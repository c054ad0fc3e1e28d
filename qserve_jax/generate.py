"""Generate text from a checkpoint: `python -m qserve_jax.generate --prompt "Once upon a time"`.

stdout holds the generated text and nothing else: of one sample as it is made; of several in order,
each under a line `==> prompt 0, sample 0 <==`. With --output json it holds one object a line and
sample: index, sample, the prompt as --prompts-file spells it, text, token_ids, finish_reason,
logprobs where asked for, stats of the sample and of the whole run. Statistics and errors go to
stderr. Exit codes: 0, 2 for wrong flags, 1 for any other error, 130 after Ctrl-C.
"""

from __future__ import annotations

import os
import signal

# Before the other imports: Python prints or loses a KeyboardInterrupt that comes while it imports
# modules, for a second or more, and the command has nothing to tidy up. What ignores it (`nohup`)
# goes on doing so.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import dataclasses
import io
import json
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qserve_jax import _cli
from qserve_jax._cli import UsageError
from qserve_jax.runtime.prompts import encode_prompt, is_utf8
from qserve_jax.runtime.prompts_file import Record, check_record, read_prompts_file
from qserve_jax.runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from qserve_jax.checkpoint import LoadedModel
    from qserve_jax.runtime import LLM, RequestOutput

Place = str
"""Where a prompt was given, for errors: `--prompt`, or a file and its line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the process's); returns the exit code."""
    return _cli.run("qserve_jax.generate", generate, argv)


def generate(argv: Sequence[str]) -> None:
    """Check the flags, load, generate, print. Raises UsageError before anything is loaded, then
    whatever loading and generating raise."""
    parser = build_parser()
    with parser.errors_name_flags():
        args = parser.parse_args(argv)
        params, records = checked_arguments(args)
        llm, prompts, load_seconds = load(args, params, records)
        if args.stream:
            outputs, first_tokens = [], [stream_text(llm, prompts, params)]
        else:
            outputs = generate_all(llm, prompts, params, [place for place, _ in records])
            first_tokens = [output.time_to_first_token for output in outputs]
    from qserve_jax.runtime.run_stats import format_stats, run_stats

    run = run_stats(llm, load_seconds, first_tokens)
    for output in outputs:
        if args.output == "json":
            print(json_line(output, records[output.index][1], run))
        else:
            print_text(output, header=len(outputs) > 1)
    sys.stdout.flush()  # before the statistics, where both go to one terminal
    if not args.quiet:
        for note in args.notes:
            print(f"note: {note}", file=sys.stderr)
        print(format_stats(run), file=sys.stderr)


def checked_arguments(
    args: argparse.Namespace,
) -> tuple[SamplingParams, list[tuple[Place, Record]]]:
    """What the flags say about sampling, and the prompts; sets args.stream. Raises UsageError."""
    _cli.check_model_arguments(args)
    try:
        params, records = sampling_params(args), read_records(args)
    except ValueError as error:
        raise UsageError(str(error)) from None
    args.stream = checked_stream(args, num_samples=len(records) * params.n)
    return params, records


def load(
    args: argparse.Namespace, params: SamplingParams, records: list[tuple[Place, Record]]
) -> tuple[LLM, list[list[int]], float]:
    """The LLM, with a cache for these prompts; their token ids; and the seconds that it took,
    compilation apart; sets args.notes. Raises ValueError, naming the place of a prompt that cannot
    be used."""
    loaded, seconds = _cli.load(args)
    args.notes = []
    if loaded.format == "float" and loaded.quant_config.weight_bits < 16:
        args.notes.append("weights were quantised on load, by round-to-nearest")
    from qserve_jax.runtime.compile_time import clock

    start = clock()
    prompts = [token_ids(place, record, loaded, args) for place, record in records]
    longest = max(map(len, prompts)) + args.max_tokens
    llm = _cli.make_llm(args, loaded, len(prompts) * params.n, longest)
    if longest > llm.max_model_len:
        room = f"completions end where prompt and completion are {llm.max_model_len} tokens"
        args.notes.append(f"--max-tokens {args.max_tokens}: {room}")
    return llm, prompts, seconds + clock() - start


def token_ids(
    place: Place, record: Record, loaded: LoadedModel, args: argparse.Namespace
) -> list[int]:
    """The prompt's tokens. Raises ValueError, which begins with `place`."""
    prompt = engine_prompt(record, loaded.tokenizer, args)
    try:
        return encode_prompt(prompt, loaded.tokenizer, loaded.config.vocab_size)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def generate_all(
    llm: LLM, prompts: list[list[int]], params: SamplingParams, places: list[Place]
) -> list[RequestOutput]:
    """`llm.generate`, whose errors name a prompt's place for its index."""
    try:
        return llm.generate(prompts, params)
    except ValueError as error:
        message = re.sub(r"^prompt (\d+)(?=:)", lambda match: places[int(match[1])], str(error))
        raise ValueError(message) from None


def build_parser() -> _cli.Parser:
    """All flags of the command; README.md shows how they are used."""
    parser = _cli.Parser(
        prog="python -m qserve_jax.generate",
        description="Generate text from a Hugging Face checkpoint, quantised on load.",
        allow_abbrev=False,
    )
    # fmt: off
    add = parser.add_argument_group("prompts").add_argument
    add("--prompt", action="append", metavar="TEXT", default=[],
        help="text to go on from, or - for all of stdin; may be given several times")
    add("--prompts-file", metavar="F.jsonl",
        help='a prompt a line: {"prompt": TEXT}, {"prompt_token_ids": [...]} or '
        '{"messages": [{"role": ..., "content": ...}, ...]}')
    add("--system-prompt", metavar="TEXT", help="put before text prompts by the chat template")
    add("--no-chat-template", action="store_true",
        help="take text prompts as they are, also where the tokenizer has a chat template")
    add = parser.add_argument_group("sampling").add_argument
    add("--max-tokens", "--max-new-tokens", type=int, metavar="N", default=256,
        help="longest completion, in tokens (default: %(default)s)")
    add("--temperature", type=float, metavar="T", default=0.0, help="0 (the default) is greedy")
    add("--top-p", type=float, metavar="P", default=1.0,
        help="sample from the fewest tokens that have probability P together (default: all)")
    add("--top-k", type=int, metavar="K", default=0,
        help="sample from the K most likely tokens (default: all)")
    add("--min-p", type=float, metavar="P", default=0.0,
        help="sample from tokens at least P times as likely as the likeliest (default: all)")
    add("--repetition-penalty", type=float, metavar="X", default=1.0,
        help="> 1 makes tokens of prompt and completion less likely (default: 1)")
    add("--presence-penalty", type=float, metavar="X", default=0.0,
        help="subtracted from the logits of tokens of the completion (default: 0)")
    add("--frequency-penalty", type=float, metavar="X", default=0.0,
        help="the same, once per occurrence (default: 0)")
    add("--stop", nargs="+", action="extend", metavar="STR", default=[],
        help="strings that end the completion, and are not in it")
    add("--stop-token-ids", nargs="+", action="extend", type=int, metavar="ID", default=[],
        help="tokens that end the completion, as the end-of-sequence token does")
    add("--ignore-eos", action="store_true", help="go on after the end-of-sequence token")
    add("--num-samples", dest="n", type=int, metavar="N", default=1,
        help="completions per prompt; more than 1 need a temperature (default: 1)")
    add("--logprobs", type=int, metavar="N",
        help="log-probabilities of each token and of the N likeliest; with --output json")
    add = parser.add_argument_group("output").add_argument
    add("--output", choices=("text", "json"), default="text", help="(default: text)")
    add("--stream", action=argparse.BooleanOptionalAction,
        help="print text as it is made (default: when it is one sample)")
    # fmt: on
    _cli.add_model_arguments(parser)
    return parser


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """Raises ValueError as SamplingParams does. --seed is the engine's: one per prompt follows."""
    fields = {field.name for field in dataclasses.fields(SamplingParams)} - {"seed"}
    given = {name: value for name, value in vars(args).items() if name in fields}
    return SamplingParams(**given)


def read_records(args: argparse.Namespace) -> list[tuple[Place, Record]]:
    """The prompts of --prompt, then those of --prompts-file. Raises ValueError."""
    if args.prompt.count("-") > 1:
        raise UsageError("--prompt - is given more than once: stdin can be read only once")
    count, records = len(args.prompt), []
    for number, text in enumerate(args.prompt, start=1):
        place = "--prompt" if count == 1 else f"--prompt {number} of {count}"
        records.append((place, {"prompt": read_stdin() if text == "-" else text}))
        check_record(*records[-1])
    if args.prompts_file is not None:
        records += read_prompts_file(args.prompts_file)
    if not records:
        raise UsageError("no prompt: give --prompt TEXT, --prompt - or --prompts-file F.jsonl")
    check_template_flags(args, [record for _, record in records])
    return records


def read_stdin() -> str:
    """All of stdin, less the line end that `echo` and editors put last. Raises ValueError."""
    if isinstance(sys.stdin, io.TextIOWrapper):  # whatever the locale says
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt -: stdin is not text ({error}): give UTF-8") from None


def check_template_flags(args: argparse.Namespace, records: list[Record]) -> None:
    """Raises UsageError where a flag about chat templates would have no effect."""
    keys = {key for record in records for key in record}
    if args.no_chat_template and "messages" in keys:
        raise UsageError("messages need the chat template: leave --no-chat-template out")
    if args.system_prompt is not None and args.no_chat_template:
        raise UsageError("--system-prompt needs the chat template: leave --no-chat-template out")
    if args.system_prompt is not None and not is_utf8(args.system_prompt):
        raise UsageError(
            f"--system-prompt {args.system_prompt!r:.60} is not UTF-8 text: correct it"
        )
    if args.system_prompt is not None and keys != {"prompt"}:
        raise UsageError(
            "--system-prompt is for text prompts only: put it into messages as their first"
        )


def checked_stream(args: argparse.Namespace, num_samples: int) -> bool:
    """Whether to stream. Raises UsageError where output flags contradict each other."""
    if args.logprobs is not None and args.output != "json":
        raise UsageError(f"--logprobs {args.logprobs} has no place in text: use --output json")
    can_stream = args.output == "text" and num_samples == 1
    if args.stream and not can_stream:
        raise UsageError(
            f"--stream is for one sample as text, not for {num_samples} as {args.output}: "
            "leave it out"
        )
    return can_stream if args.stream is None else args.stream


def engine_prompt(record: Record, tokenizer: Any | None, args: argparse.Namespace) -> Any:
    """The prompt as `LLM.generate` takes it. Text becomes a chat where the tokenizer has a template
    and --no-chat-template is not given. Raises ValueError where flags and tokenizer do not fit."""
    if "prompt_token_ids" in record and tokenizer is None and args.output == "text":
        raise ValueError(f"{args.model} has no tokenizer to make text with: use --output json")
    if "prompt_token_ids" not in record and tokenizer is None:
        raise ValueError(
            f"{args.model} has no tokenizer to read text with: "
            'give {"prompt_token_ids": [...]} in --prompts-file'
        )
    if "prompt" not in record:
        ((_, prompt),) = record.items()
        return prompt
    has_template = tokenizer is not None and bool(tokenizer.chat_template)
    if has_template and not args.no_chat_template:
        user = {"role": "user", "content": record["prompt"]}
        if args.system_prompt is None:
            return [user]
        return [{"role": "system", "content": args.system_prompt}, user]
    if args.system_prompt is not None:
        raise ValueError(
            f"--system-prompt {args.system_prompt!r:.40} needs a chat template, and the tokenizer "
            f"of {args.model} has none: put it into --prompt"
        )
    return record["prompt"]


def stream_text(llm: LLM, prompts: list[Any], params: SamplingParams) -> float:
    """Print one sample's text as it is made; returns the seconds to its first token."""
    from qserve_jax.runtime.compile_time import clock

    start, first_token = clock(), None
    for piece in llm.stream(prompts, params):
        first_token = first_token or clock() - start
        print(piece.text, end="", flush=True)
    print()
    return first_token or 0.0


def print_text(output: RequestOutput, *, header: bool) -> None:
    """The text of a sample; the header is that of `head` for several files."""
    if header:
        print(f"==> prompt {output.index}, sample {output.sample} <==")
    print(output.text)


def json_line(output: RequestOutput, record: Record, run: dict[str, Any]) -> str:
    """A sample as one JSON object; times are seconds, compilation apart."""
    steps, decode_time = len(output.token_ids) - 1, output.total_time - output.time_to_first_token
    sample: dict[str, Any] = {
        "index": output.index,
        "sample": output.sample,
        **record,
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
    }
    if output.logprobs is not None:
        sample["logprobs"] = [dataclasses.asdict(token) for token in output.logprobs]
    sample["stats"] = {
        "prompt_tokens": len(output.prompt_token_ids),
        "generated_tokens": len(output.token_ids),
        "time_to_first_token": output.time_to_first_token,
        "total_time": output.total_time,
        "tokens_per_second": steps / decode_time if steps and decode_time else None,
    }
    return json.dumps(sample | {"run": run}, ensure_ascii=False, allow_nan=False)


if __name__ == "__main__":
    sys.exit(main())
