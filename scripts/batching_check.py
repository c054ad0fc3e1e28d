"""In-flight batching under pressure: requests of random lengths in a pool that forces preemption.

The same requests run with pages for all, and in a small pool; greedy tokens must be equal, and
where they are not the gap between the two best logits at the first difference says how near a tie
it was. Beside it a static run: as many tokens, lengths all equal, no preemption. And requests that
share a long prefix, with and without prefix caching. Writes JSON, and ends with status 1 where
something was lost, compiled anew, not preempted or too slow.

The small pool is without a watermark: with it none of 2 000 such requests gives way, whether the
pool holds all of their pages or 0.15.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from qserve_jax import LLM, QuantConfig, SamplingParams, load_model
from qserve_jax.benchmarks.dummy import dummy_model
from qserve_jax.benchmarks.model_shapes import MODEL_CONFIGS
from qserve_jax.benchmarks.provenance import provenance
from qserve_jax.checkpoint import LoadedModel
from qserve_jax.runtime import RequestOutput, scheduler
from qserve_jax.runtime.compile_time import compile_time

PAGE = 64
OF_STATIC = 0.85
TIMES_FEWER = 20


def timed(llm: LLM, prompts: Any, params: Any) -> tuple[list[RequestOutput], dict[str, Any]]:
    """A second run of the same kind, after one that compiles; and what was measured of it."""
    llm.generate([p[::-1] for p in prompts], params)
    compiled, preempted = compile_time.seconds, llm.stats.preemptions
    start = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - start
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    lengths = [len(o.token_ids) for o in outputs]
    return outputs, {
        "tokens": sum(lengths),
        "as_many_as_asked": lengths == [p.max_tokens for p in each],
        "tokens_per_s": sum(lengths) / seconds,
        "preemptions": llm.stats.preemptions - preempted,
        "compiled_s": compile_time.seconds - compiled,
        "pages_free": llm.pool.free_pages == llm.pool.num_pages,
    }


def first_differences(a: list[RequestOutput], b: list[RequestOutput]) -> list[float]:
    """Of each pair that differs: the gap between a's two best logits at the first difference."""
    gaps = []
    for x, y in zip(a, b, strict=True):
        pairs = zip(x.token_ids, y.token_ids, strict=True)
        at = next((i for i, (s, t) in enumerate(pairs) if s != t), None)
        if at is not None:
            (_, best), (_, second) = (x.logprobs or [])[at].top
            gaps.append(best - second)
    return gaps


def pressure(loaded: LoadedModel, args: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    ins, outs = (rng.integers(1, n + 1, args.requests) for n in (args.input_len, args.output_len))
    vocab = loaded.config.vocab_size
    prompts = [rng.integers(0, vocab, n).tolist() for n in ins]
    params = [SamplingParams(max_tokens=int(n), ignore_eos=True, logprobs=2) for n in outs]
    longest = -(-(args.input_len + args.output_len) // PAGE)
    settings = {
        "max_num_seqs": args.max_num_seqs,
        "page_size": PAGE,
        "max_model_len": args.input_len + args.output_len,
        "enable_prefix_caching": False,
    }
    runs, outputs = {}, []
    watermark = scheduler.WATERMARK
    for name, share, kept in (("pages for all", 1.0, watermark), ("small pool", args.pool, 0.0)):
        scheduler.WATERMARK = kept
        pages = max(longest, int(share * longest * args.max_num_seqs) + 8)
        llm = LLM(loaded, num_pages=pages, **settings)
        found, runs[name] = timed(llm, prompts, params)
        outputs.append(found)
        del llm
    scheduler.WATERMARK = watermark
    count, mean_in = args.requests, int(ins.mean())
    llm = LLM(loaded, num_pages=longest * args.max_num_seqs + 8, **settings)
    same = SamplingParams(max_tokens=int(outs.mean()), ignore_eos=True, logprobs=2)
    prompts = rng.integers(0, vocab, (count, mean_in)).tolist()
    _, runs["equal lengths"] = timed(llm, prompts, same)
    gaps = first_differences(*outputs)
    return {
        "requests": count,
        "runs": runs,
        "equal": 1 - len(gaps) / count,
        "gaps_at_first_difference": sorted(gaps),
        "of_static": runs["small pool"]["tokens_per_s"] / runs["equal lengths"]["tokens_per_s"],
    }


def prefixes(loaded: LoadedModel, prefix: int, suffix: int) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    vocab = loaded.config.vocab_size
    shared = rng.integers(0, vocab, prefix).tolist()
    prompts = [shared + rng.integers(0, vocab, suffix).tolist() for _ in range(64)]
    params = SamplingParams(max_tokens=32, ignore_eos=True, logprobs=2)
    outputs, computed = [], []
    for caching in (False, True):
        pages = 64 * -(-(prefix + suffix + 32) // PAGE) + 64
        llm = LLM(
            loaded,
            num_pages=pages,
            page_size=PAGE,
            enable_prefix_caching=caching,
            max_model_len=prefix + suffix + 32,
        )
        outputs.append(llm.generate(prompts, params))
        computed.append(llm.stats.prompt_tokens)
        del llm
    gaps = first_differences(*outputs)
    return {
        "prefilled": computed,
        "times_fewer": computed[0] / computed[1],
        "equal": 1 - len(gaps) / 64,
        "gaps_at_first_difference": sorted(gaps),
    }


def failures(found: dict[str, Any]) -> list[str]:
    """What must not be, a line each. How many tokens are equal is for the reader to judge."""
    runs, wrong = found["pressure"]["runs"], []
    for name, run in runs.items():
        if not run["as_many_as_asked"]:
            wrong.append(f"{name}: requests have more or fewer tokens than they asked for")
        if not run["pages_free"]:
            wrong.append(f"{name}: pages were not given back")
        if run["compiled_s"] > 0:
            wrong.append(f"{name}: compiled for {run['compiled_s']:.2f} s after the warm-up")
        if (run["preemptions"] > 0) != (name == "small pool"):
            wrong.append(f"{name}: {run['preemptions']} preemptions")
    if (ratio := found["pressure"]["of_static"]) < OF_STATIC:
        wrong.append(f"{ratio:.2f} of the static run's tokens/s, less than {OF_STATIC}")
    if (fewer := found["prefixes"]["times_fewer"]) < TIMES_FEWER:
        wrong.append(f"{fewer:.1f} times fewer prefilled tokens, less than {TIMES_FEWER}")
    return wrong


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
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    args = parser.parse_args()
    if (args.model is None) == (args.dummy_weights is None):
        parser.error("give --model or --dummy-weights")
    if args.dummy_weights:
        loaded = dummy_model(MODEL_CONFIGS[args.dummy_weights], QuantConfig())
    else:
        loaded = load_model(args.model)
    found = {"pressure": pressure(loaded, args), "prefixes": prefixes(loaded, args.prefix_len, 64)}
    content = {**provenance(), "model": args.model or args.dummy_weights, **found}
    args.output.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    if wrong := failures(found):
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
