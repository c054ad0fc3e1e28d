"""In-flight batching under pressure: requests of random lengths in a pool that forces preemption.

    python scripts/batching_check.py --dummy-weights llama3-8b --output FILE.json [--parts PART ...]

Parts, each of which can be measured in a process of its own:

pages for all    the requests where nobody has to give way
small pool       the same requests in a share of the pages. Tokens should be as before, and where
                 they are not the gap between the two best logits at the first difference says how
                 near a tie it was
alone            some of the requests, one after another, each in calls of the shapes of a full
                 batch: what its tokens should be, whoever else is there
equal lengths    as many tokens, lengths all equal, nobody gives way: what the small pool costs
prefixes         64 requests that share a long prefix, with and without prefix caching

FILE.json is written after every part, and what it has is not measured again; tokens, by which parts
are compared, lie beside it. Ends with status 1 where something was lost, compiled anew, not
preempted, too slow or, with a shared prefix, other than without.

In the small pool admission leaves fewer pages free than an engine's own watermark, with which none
of 2 000 such requests gives way, whether the pool holds all of their pages or 0.15. Few do then, in
whatever pool, because requests are short in growth beside what their prompts take: before a device
that does nothing 0.5 % of the prompt tokens were computed again with a share of 0.45, 0.2 % with
0.4, 0.2 % with 0.1, 0.6 % with 0.05; with no watermark 2.1 % with 0.45 (no record is kept).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

from qserve_jax import LLM, QuantConfig, SamplingParams, _cli, load_model
from qserve_jax.benchmarks.dummy import dummy_model
from qserve_jax.benchmarks.model_shapes import MODEL_CONFIGS
from qserve_jax.benchmarks.provenance import provenance
from qserve_jax.benchmarks.report import write_report
from qserve_jax.checkpoint import LoadedModel
from qserve_jax.runtime import RequestOutput, batch, device_calls, engine, scheduler
from qserve_jax.runtime.compile_time import compile_time

PAGE = 64
SUFFIX, AFTER, SHARING = 64, 32, 64
"""Tokens behind a shared prefix, tokens made after them, and how many requests share it."""
ALONE = 32
"""About so many of the requests run alone."""
OF_STATIC = 0.85
TIMES_FEWER = 20
SAME = ("model", "settings", "device", "versions", "commit")
"""What parts of one file must have in common."""
Found = dict[str, Any]
Requests = tuple[list[list[int]], list[SamplingParams]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Requests of 1..input_len tokens that make 1..output_len more, max_num_seqs at once; pool: the
    share of the pages for all of them; prefix_len: of the prefix that prompts share; watermark:
    the share of the small pool that admission leaves free."""

    requests: int
    input_len: int
    output_len: int
    max_num_seqs: int
    pool: float
    prefix_len: int
    watermark: float

    @property
    def pages_each(self) -> int:
        longest = max(self.input_len + self.output_len, self.prefix_len + SUFFIX + AFTER)
        return -(-longest // PAGE)


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, logprobs=2)


def random_requests(s: Settings, vocab: int) -> Requests:
    rng = np.random.default_rng(0)
    ins, outs = (rng.integers(1, n + 1, s.requests) for n in (s.input_len, s.output_len))
    return [rng.integers(0, vocab, n).tolist() for n in ins], [greedy(int(n)) for n in outs]


def equal_requests(s: Settings, vocab: int) -> Requests:
    """As many tokens, but for less than one a request."""
    prompts, params = random_requests(s, vocab)
    shape = s.requests, sum(map(len, prompts)) // s.requests
    mean_out = sum(p.max_tokens or 0 for p in params) // s.requests
    return np.random.default_rng(2).integers(0, vocab, shape).tolist(), [greedy(mean_out)] * shape[
        0
    ]


def make_llm(loaded: LoadedModel, s: Settings, *, caching: bool = False) -> LLM:
    """Of the same shapes for all parts, so that they share compiled programs."""
    return LLM(
        loaded,
        num_pages=s.pages_each * s.max_num_seqs + 8,
        page_size=PAGE,
        max_num_seqs=s.max_num_seqs,
        max_model_len=s.pages_each * PAGE,
        enable_prefix_caching=caching,
    )


def timed(
    llm: LLM, requests: Requests, warm_up: Callable[[], Any]
) -> tuple[list[RequestOutput], Found]:
    """A run, after a warm-up that compiles, and what was measured."""
    prompts, params = requests
    start, compiled = time.perf_counter(), compile_time.seconds
    warm_up()
    before, pages = dataclasses.replace(llm.stats), llm.pool.free_pages
    warm, compiled_before = time.perf_counter(), compile_time.seconds
    outputs = llm.generate(*requests)
    seconds, during = time.perf_counter() - warm, compile_time.seconds - compiled_before
    lengths = [len(o.token_ids) for o in outputs]
    prefilled = llm.stats.prompt_tokens - before.prompt_tokens
    return outputs, {
        "tokens": sum(lengths),
        "as_many_as_asked": lengths == [p.max_tokens for p in params],
        "tokens_per_s": sum(lengths) / seconds,
        "preemptions": llm.stats.preemptions - before.preemptions,
        "prefilled_again": prefilled / sum(map(len, prompts)) - 1,
        "compiled_s": during,
        "pages_free": llm.pool.free_pages == pages,
        "seconds": {
            "compiling": compile_time.seconds - compiled,
            "warm_up": warm - start - (compiled_before - compiled),
            "running": seconds - during,
        },
    }


def longest_of(requests: Requests) -> int:
    """Tokens of a prompt and what follows it."""
    return max(len(p) + (q.max_tokens or 0) for p, q in zip(*requests, strict=True))


def pages_for_all(loaded: LoadedModel, s: Settings) -> tuple[list[RequestOutput], Found]:
    llm, requests = make_llm(loaded, s), random_requests(s, loaded.config.vocab_size)
    return timed(llm, requests, lambda: llm.warm_up(greedy(1), longest_of(requests)))


def small_pool(loaded: LoadedModel, s: Settings) -> tuple[list[RequestOutput], Found]:
    llm, requests = make_llm(loaded, s), random_requests(s, loaded.config.vocab_size)
    longest = longest_of(requests)

    def warm_up() -> None:
        llm.warm_up(greedy(1), longest)
        kept = max(-(-longest // PAGE), int(s.pool * s.pages_each * s.max_num_seqs))
        llm.pool.allocate(llm.pool.num_pages - kept)  # for nobody, and for good

    watermark, scheduler.WATERMARK = scheduler.WATERMARK, s.watermark
    try:
        return timed(llm, requests, warm_up)
    finally:
        scheduler.WATERMARK = watermark


def some(requests: int) -> range:
    """Those of so many that run alone."""
    return range(0, requests, max(1, requests // ALONE))


def alone(loaded: LoadedModel, s: Settings) -> tuple[list[RequestOutput], Found]:
    llm, requests = make_llm(loaded, s), random_requests(s, loaded.config.vocab_size)
    (prompts, params), longest = requests, longest_of(requests)
    start, compiled = time.perf_counter(), compile_time.seconds
    llm.warm_up(greedy(1), longest)
    with calls_of_a_full_batch(llm, longest):
        outputs = [llm.generate([prompts[i]], params[i])[0] for i in some(s.requests)]
    compiling = compile_time.seconds - compiled
    running = time.perf_counter() - start - compiling
    return outputs, {
        "requests": len(outputs),
        "seconds": {"compiling": compiling, "running": running},
    }


@contextlib.contextmanager
def calls_of_a_full_batch(llm: LLM, longest: int) -> Iterator[None]:
    """Every prefill call has as many rows of the longest chunk as fit, and every decode call a row
    for each that may run, however few come."""
    rows = batch.power_of_two(llm.max_num_seqs)
    shape = llm.engine.scheduler.prefill_shapes(longest)[-1]
    here = {"row_bucket": lambda wanted, previous: rows, "call_shape": lambda chunks: shape}
    with (
        mock.patch.multiple(device_calls, **here),
        mock.patch.object(engine, "full_calls", lambda chunks: [chunks]),
    ):
        yield


def equal_lengths(loaded: LoadedModel, s: Settings) -> tuple[list[RequestOutput], Found]:
    llm, (prompts, params) = make_llm(loaded, s), equal_requests(s, loaded.config.vocab_size)
    # All end together: the shapes are those of a full batch and of the last one.
    few = min(s.max_num_seqs + s.requests % s.max_num_seqs, s.requests)
    others = [prompt[::-1] for prompt in prompts[:few]]
    return timed(llm, (prompts, params), lambda: llm.generate(others, params[:few]))


def prefixes(loaded: LoadedModel, s: Settings) -> Found:
    rng, vocab = np.random.default_rng(1), loaded.config.vocab_size
    shared = rng.integers(0, vocab, s.prefix_len).tolist()
    prompts = [shared + rng.integers(0, vocab, SUFFIX).tolist() for _ in range(SHARING)]
    outputs, computed, start, compiled = [], [], time.perf_counter(), compile_time.seconds
    for caching in (False, True):
        llm = make_llm(loaded, s, caching=caching)
        outputs.append(llm.generate(prompts, greedy(AFTER)))
        computed.append(llm.stats.prompt_tokens)
        del llm
    compiling = compile_time.seconds - compiled
    running = time.perf_counter() - start - compiling
    return {
        "prefilled": computed,
        "times_fewer": computed[0] / computed[1],
        **differences(*(as_arrays(found) for found in outputs)),
        "seconds": {"compiling": compiling, "running": running},
    }


Arrays = dict[str, np.ndarray]
"""Of all outputs, one after another: tokens, and the gap between the two best logits at each;
lengths: of each."""


def as_arrays(outputs: list[RequestOutput]) -> Arrays:
    tops = [t.top for o in outputs for t in o.logprobs or []]
    return {
        "tokens": np.asarray([token for o in outputs for token in o.token_ids], np.int32),
        "gaps": np.asarray([best[1] - second[1] for best, second in tops], np.float32),
        "lengths": np.asarray([len(o.token_ids) for o in outputs]),
    }


def only(found: Arrays, wanted: range) -> Arrays:
    """Of these outputs."""
    ends = np.cumsum(found["lengths"])
    own = [np.arange(ends[i] - found["lengths"][i], ends[i]) for i in wanted]
    where = np.concatenate(own)
    lengths = found["lengths"][list(wanted)]
    return {"tokens": found["tokens"][where], "gaps": found["gaps"][where], "lengths": lengths}


def differences(a: Arrays, b: Arrays) -> Found:
    """The share of requests whose tokens are equal; of others a's gap at the first difference."""
    ends, gaps = np.cumsum(a["lengths"]), []
    for end, length in zip(ends, a["lengths"], strict=True):
        own = slice(end - length, end)
        differ = np.flatnonzero(a["tokens"][own] != b["tokens"][own])
        if len(differ):
            gaps.append(float(a["gaps"][own][differ[0]]))
    return {"equal": 1 - len(gaps) / len(ends), "gaps_at_first_difference": sorted(gaps)}


PARTS: dict[str, Callable[[LoadedModel, Settings], Any]] = {
    "pages for all": pages_for_all,
    "small pool": small_pool,
    "alone": alone,
    "equal lengths": equal_lengths,
    "prefixes": prefixes,
}


def tokens_file(output: Path, part: str) -> Path:
    return output.with_name(f"{output.stem}.{part.replace(' ', '_')}.npz")


def measure(part: str, loaded: LoadedModel, s: Settings, output: Path) -> Found:
    """The part's entry of the report; tokens go to a file."""
    found = PARTS[part](loaded, s)
    if part == "prefixes":
        return found
    outputs, run = found
    np.savez(tokens_file(output, part), **as_arrays(outputs))  # pyright: ignore[reportArgumentType]
    return run


def compared(parts: Found, output: Path) -> Found:
    """What those parts say together that have been measured."""
    found: Found = {}
    made = {part: tokens_file(output, part) for part in ("pages for all", "small pool", "alone")}
    tokens = {part: dict(np.load(file)) for part, file in made.items() if file.exists()}
    if {"pages for all", "small pool"} <= tokens.keys():
        found |= differences(tokens["pages for all"], tokens["small pool"])
    for part in {"pages for all", "small pool"} & tokens.keys():
        if "alone" in tokens:
            wanted = some(len(tokens[part]["lengths"]))
            found[f"alone, {part}"] = differences(tokens["alone"], only(tokens[part], wanted))
    if {"small pool", "equal lengths"} <= parts.keys():
        speeds = (parts[part]["tokens_per_s"] for part in ("small pool", "equal lengths"))
        found["of_static"] = next(speeds) / next(speeds)
    return found


def failures(parts: Found, together: Found) -> list[str]:
    """What must not be, a line each, of what was measured. How many tokens are equal under pressure
    is for the reader to judge."""
    wrong = []
    for name, run in parts.items():
        if name == "prefixes":
            wrong += prefix_failures(run)
        if name in ("prefixes", "alone"):
            continue
        if not run["as_many_as_asked"]:
            wrong.append(f"{name}: requests have more or fewer tokens than they asked for")
        if not run["pages_free"]:
            wrong.append(f"{name}: pages were not given back")
        if run["compiled_s"]:
            wrong.append(f"{name}: compiled for {run['compiled_s']:.2f} s after the warm-up")
        if (run["preemptions"] > 0) != (name == "small pool"):
            wrong.append(f"{name}: {run['preemptions']} preemptions")
    if {"pages for all", "small pool"} <= parts.keys() and "equal" not in together:
        wrong.append("the tokens are not beside the file: measure the first two parts again")
    if (ratio := together.get("of_static", OF_STATIC)) < OF_STATIC:
        wrong.append(f"{ratio:.2f} of the static run's tokens/s, less than {OF_STATIC}")
    return wrong


def prefix_failures(found: Found) -> list[str]:
    wrong, gaps = [], found["gaps_at_first_difference"]
    if (fewer := found["times_fewer"]) < TIMES_FEWER:
        wrong.append(f"{fewer:.1f} times fewer prefilled tokens, less than {TIMES_FEWER}")
    if gaps:
        wrong.append(
            f"prefixes: shared, {len(gaps)} requests have other tokens; the two best logits are up "
            f"to {gaps[-1]:.3f} apart at the first of them"
        )
    return wrong


def begin(output: Path, here: Found) -> Found:
    """The report to go on with. Ends the command where the file is of something else."""
    if not output.exists():
        return here | {"parts": {}}
    try:
        report = json.loads(output.read_text())
    except ValueError:
        report = None
    if not isinstance(report, dict) or not isinstance(report.get("parts"), dict):
        sys.exit(f"{output} is no report of this script: name another file")
    if other := [name for name in SAME if report.get(name) != here[name]]:
        sys.exit(f"{output} differs in {', '.join(other)}: name another file")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a checkpoint")
    parser.add_argument("--dummy-weights", choices=MODEL_CONFIGS, metavar="MODEL")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--input-len", type=int, default=2048, help="longest")
    parser.add_argument("--output-len", type=int, default=512, help="longest")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--pool", type=float, default=0.45, help="share of the pages for all")
    parser.add_argument("--prefix-len", type=int, default=2048)
    parser.add_argument("--watermark", type=float, default=0.0005, help="of the small pool")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    args = parser.parse_args()
    if (args.model is None) == (args.dummy_weights is None):
        parser.error("give --model or --dummy-weights")
    if args.output.is_dir() or not args.output.parent.is_dir():
        parser.error(f"--output {args.output}: name a file in a folder that is there")
    s = Settings(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)})
    named = {"model": args.model or args.dummy_weights, "settings": dataclasses.asdict(s)}
    report = begin(args.output, provenance() | named)
    _cli.enable_compilation_cache()
    if missing := [part for part in args.parts if part not in report["parts"]]:
        start = time.perf_counter()
        loaded = load(args)
        log("loading", {"loading": time.perf_counter() - start})
        for part in missing:
            report["parts"][part] = measure(part, loaded, s, args.output)
            write_report(args.output, report)
            log(part, report["parts"][part]["seconds"])
    start = time.perf_counter()
    report["compared"] = compared(report["parts"], args.output)
    report["failures"] = failures(report["parts"], report["compared"])
    write_report(args.output, report)
    log("together", {"comparing": time.perf_counter() - start})
    print(json.dumps({name: report[name] for name in ("parts", "compared")}, indent=1))
    if left := [part for part in PARTS if part not in report["parts"]]:
        print(f"not measured yet: {', '.join(left)}")
    if report["failures"]:
        sys.exit("\n".join(report["failures"]))


def load(args: argparse.Namespace) -> LoadedModel:
    if args.dummy_weights is None:
        return load_model(args.model)
    loaded = dummy_model(MODEL_CONFIGS[args.dummy_weights], QuantConfig())
    jax.block_until_ready(loaded.params)
    return loaded


def log(what: str, seconds: dict[str, float]) -> None:
    """Where the time of a call goes, as soon as it is known."""
    parts = ", ".join(f"{name.replace('_', '-')} {took:.1f} s" for name, took in seconds.items())
    print(f"{what}: {parts}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
