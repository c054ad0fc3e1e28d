"""Attention and append beside cuDNN's bf16 attention, by one clock, with the cache out of the L2.

decode           one token per sequence over the paged cache           report["rows"]
append           RoPE, quantise and append of one token per sequence   report["append"]
prefill          fresh prompts over themselves                         report["prefill"]
chunked prefill  a chunk over the pages before it and itself           report["chunked_prefill"]

All but append with attends="quantized", the default of `LLM`, and "full": fresh prompts are then
cuDNN's own, with lengths.

`clock.PROTOCOL` says how times are taken. A case that fails is a problem, and ends no other.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qserve_jax.benchmarks.attention_cases import (
    LLAMA3_8B,
    Case,
    Heads,
    Paged,
    make_paged,
    normal,
)
from qserve_jax.benchmarks.attention_error import attend_row, worst_error
from qserve_jax.benchmarks.matmul import Bench, find_ceilings
from qserve_jax.benchmarks.operands import copies_of
from qserve_jax.benchmarks.report import Report, drop_row, has_row
from qserve_jax.pallas_kernels import paged_attention, rope_append_kv
from qserve_jax.pallas_kernels.paged_attention import longest_first
from qserve_jax.pallas_kernels.paged_attention.decode_problem import Problem
from qserve_jax.pallas_kernels.paged_attention.decode_rules import choose_config
from qserve_jax.quantization.qtensor import Array, KVCache

BASELINE: Any = "cudnn"
"""The implementation of `jax.nn.dot_product_attention` that ours is compared with."""

MOST_ERROR = 2.5e-3
"""Relative; rounding the output to bf16 alone takes 1.7e-3."""
LISTS = ("append", "prefill", "chunked_prefill")
TIMED_LAYER = 1
ATTENDS = ("quantized", "full")
PREFILL_BITS = 4
"""Of the cache that fresh prompts are read from."""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What to measure: decode cases, of each backend, and the other three for these heads."""

    cases: tuple[Case, ...]
    backends: tuple[str, ...]
    kv_bits: tuple[int, ...]
    heads: Heads = LLAMA3_8B
    append_batches: tuple[int, ...] = (1, 256)
    prompts: tuple[tuple[int, int], ...] = ((8, 1024),)
    chunks: tuple[tuple[int, int], ...] = ((1024, 2048), (1024, 8192))


def run_sweep(sweep: Sweep, bench: Bench) -> None:
    """Measure what the report lacks."""
    say_what_was_timed(bench.report)
    find_ceilings(bench)
    for case in sweep.cases:
        make_paged.cache_clear()  # room for the baseline's copies
        full = (case.heads, case.kv_heads, case.head_dim) == sweep.heads and case.kv_bits == 4
        for backend in sweep.backends:
            for attends in ATTENDS if full else ATTENDS[:1]:
                row = {"backend": backend, **case.place, "attends": attends}
                measure = functools.partial(_decode, case, backend, attends, bench)
                how = {"config": _config(case, backend), "ordered": True}
                _guarded(bench, "rows", row, measure, how)
    for backend in sweep.backends:
        for bits in sweep.kv_bits:
            for batch in sweep.append_batches:
                row = {"backend": backend} | _sizes(sweep.heads) | {"kv_bits": bits, "b": batch}
                measure = functools.partial(_append, sweep.heads, bits, batch, backend, bench)
                _guarded(bench, "append", row, measure)
        for (batch, tokens), attends in itertools.product(sweep.prompts, ATTENDS):
            row = {"backend": backend, "attends": attends} | _sizes(sweep.heads)
            case = Case(*sweep.heads, PREFILL_BITS, (tokens,) * batch)
            measure = functools.partial(_prefill, case, attends, backend, bench)
            _guarded(bench, "prefill", row | {"b": batch, "tokens": tokens}, measure)
        for bits, (chunk, context) in itertools.product(sweep.kv_bits, sweep.chunks):
            for attends in ATTENDS:
                row = {"backend": backend, "attends": attends} | _sizes(sweep.heads)
                row |= {"kv_bits": bits, "chunk": chunk, "ctx": context}
                case = Case(*sweep.heads, bits, (context,))
                measure = functools.partial(_chunk, case, chunk, attends, backend, bench)
                _guarded(bench, "chunked_prefill", row, measure)


def say_what_was_timed(report: Report) -> None:
    """To rows from before they said it, what they were timed with."""
    for name, attends in (("prefill", "full"), ("chunked_prefill", "quantized")):
        for row in report[name]:
            row.setdefault("attends", attends)
    for row in report["rows"]:
        row.setdefault("ordered", "lengths" in row)  # whether an `order` was given


def _sizes(heads: Heads) -> dict[str, Any]:
    return dict(zip(("heads", "kv_heads", "head_dim"), heads, strict=True))


def _guarded(
    bench: Bench,
    name: str,
    row: dict[str, Any],
    measure: Callable[[], dict[str, Any]],
    how: dict[str, Any] | None = None,
) -> None:
    """Add row | measure() | how to a list of the report, unless it has it, done so, of these
    kernels; a failure is a problem."""
    how = how or {}
    if has_row(bench.report[name], row | how, bench.kernels):
        return
    drop_row(bench.report[name], row)
    place = " ".join(f"{k}={v}" for k, v in row.items() if k != "lengths")
    place = f"{name if name != 'rows' else 'decode'} {place}"
    bench.say(place)
    try:
        found = measure()
    except NotImplementedError as refusal:
        bench.say(f"{place}: {_line(refusal)}")
        return
    except Exception as failure:  # out of memory too: the other cases go on
        bench.problem(f"{place}: {_line(failure)}")
        return
    if "gbps" in found and not bench.believes(place, found["gbps"]):
        return
    if not (error := found.get("rel_err", 0.0)) <= MOST_ERROR:
        bench.problem(f"{place}: an error of {error:.1e} is above {MOST_ERROR}: rejected as wrong")
        return
    bench.report[name].append(row | found | how | bench.origin)
    bench.save(bench.report)


# Decode


def _config(case: Case, backend: str) -> dict[str, int] | None:
    """How a decode kernel cuts the case; the reference has none."""
    if backend == "reference":
        return None
    p = Problem(
        rows=case.batch,
        **{"heads": case.heads, "kv_heads": case.kv_heads, "head_dim": case.head_dim},
        bits=case.kv_bits,
        width=max(case.pages),
        ordered=True,
        **{"num_pages": 1, "layers": 1, "q_dtype": "bfloat16", "stored": "bfloat16"},
        **{"new": None, "sm_scale": 1.0, "window": None, "softcap": None},
    )
    return dataclasses.asdict(choose_config(p, clusters=backend == "mosaic_sm90"))


def _is_ragged(case: Case) -> bool:
    return len(set(case.lengths)) > 1


def _decode(case: Case, backend: str, attends: str, bench: Bench) -> dict[str, Any]:
    sizes = {k: v for k, v in case.place.items() if k != "kv_bits"}
    baseline = _baseline(bench, sizes, functools.partial(_time_baseline, case, bench))
    paged = make_paged(case)
    q = normal((case.batch, case.heads, case.head_dim), 2)
    new = [normal((case.batch, case.kv_heads, case.head_dim), seed) for seed in (3, 4)]
    order = longest_first(paged.lens)  # as a model gives it, whose lengths are traced

    # All made before: what XLA made in the call would be timed with it.
    @jax.jit
    def run(pages: Array, q: Array, new: Any, table: Array, lens: Any, order: Any, layer: Any):
        cache = KVCache(pages, case.kv_bits, case.head_dim)
        options = {"attends": attends, "order": order, "layer": layer, "backend": backend}
        more = {"new_k": new[0], "new_v": new[1]} if attends == "full" else {}
        return paged_attention(q, cache, table, lens[0], query_lens=lens[1], **more, **options)

    lens = (paged.lens, jnp.ones_like(paged.lens))
    fixed = (paged.cache.pages, q, new, paged.table, lens, order)
    out = run(*fixed, paged.layers[TIMED_LAYER])
    error = worst_error(case, paged, TIMED_LAYER, q, out, new if attends == "full" else None)
    us = bench.median_us(run, fixed, paged.layers)
    return {
        "us": us,
        "cudnn_bf16_us": baseline,
        "gbps": case.bytes_read / us / 1e3,
        "rel_err": error,
    }


def _baseline(bench: Bench, sizes: dict[str, Any], time: Callable[[], float]) -> float | None:
    """cuDNN's time(), once for these sizes, of whatever kernels of ours; None where it fails."""
    for known in bench.report["baselines"]:
        if all(known.get(k) == v for k, v in sizes.items()):
            return known["cudnn_bf16_us"]
    try:
        us = time()
    except Exception as failure:
        bench.problem(f"{BASELINE} {'ragged' if 'lengths' in sizes else sizes}: {_line(failure)}")
        us = None
    found = {"cudnn_bf16_us": us, "commit": bench.report["commit"]}
    bench.report["baselines"].append(sizes | found)
    return us


def _time_baseline(case: Case, bench: Bench) -> float:
    """Of a contiguous bf16 cache of the same lengths."""
    longest = max(case.lengths)
    shape = (case.batch, longest, case.kv_heads, case.head_dim)
    nbytes = 4 * int(np.prod(shape))
    q = normal((case.batch, 1, case.heads, case.head_dim), 2)
    lens = jnp.asarray(case.lengths, jnp.int32) if _is_ragged(case) else None
    run = jax.jit(functools.partial(_attend_contiguous, causal=False))
    sides = [(normal(shape, 2 * i), normal(shape, 2 * i + 1)) for i in range(copies_of(nbytes))]
    return bench.median_us(run, (q, lens), sides)


def _attend_contiguous(q: Array, lens: Array | None, sides: Any, *, causal: bool) -> Array:
    k, v = sides
    lengths: dict[str, Any] = {}
    if lens is not None:
        lengths = {
            "query_seq_lengths": jnp.full_like(lens, q.shape[1]),
            "key_value_seq_lengths": lens,
        }
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, implementation=BASELINE, **lengths
    )


# Append, prefill, chunked prefill


def _append(heads: Heads, bits: int, batch: int, backend: str, bench: Bench) -> dict[str, Any]:
    """One token per sequence into pages of 1024 tokens each, the layers in turn."""
    n, kv_heads, head_dim = heads
    made = make_paged(Case(*heads, bits, (1024,) * batch), layers=4)
    paged = dataclasses.replace(made, cache=jax.tree.map(jnp.copy, made.cache))  # it is donated
    slots = paged.table[:, 3] * 64 + jnp.arange(batch, dtype=jnp.int32) % 64
    qkv = [normal((batch, n + 2 * kv_heads, head_dim), i) for i in range(8)]
    angles = jnp.linspace(0.0, 100.0, batch * head_dim // 2).reshape(batch, -1)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(pages: Array, qkv: Array, cos: Array, sin: Array, slots: Array, layer: Array):
        cache = KVCache(pages, bits, head_dim)
        options = {"layer": layer, "backend": backend}
        *heads, cache = rope_append_kv([qkv], cos, sin, cache, slots, **options)
        return cache.pages, heads

    state = [paged.cache.pages]

    turn = jnp.cos(angles), jnp.sin(angles)
    call = functools.partial(_append_once, run, state, qkv, turn, slots, paged.layers)
    return {"us": statistics.median(bench.clock(call))}


def _append_once(
    run: Any, state: list, qkv: list, turn: Any, slots: Array, layers: list, i: int
) -> Any:
    """One call: the cache in `state` is donated, and replaced by what comes back."""
    state[0], heads = run(state[0], qkv[i % len(qkv)], *turn, slots, layers[i % len(layers)])
    return heads


def _prefill(case: Case, attends: str, backend: str, bench: Bench) -> dict[str, Any]:
    """Fresh prompts of the full length, beside the same attention without lengths: as stored in
    pages, or without any over their own K and V."""
    full, batch, tokens = attends == "full", case.batch, case.lengths[0]
    paged = make_paged(case)
    q, sides = normal((batch, tokens, case.heads, case.head_dim), 0), _new(batch, tokens, case)

    @jax.jit
    def run(pages: Array, q: Array, table: Array, lens: Array, new: Any, layer: Array) -> Array:
        more = {"new_k": new[0], "new_v": new[1]} if full else {}
        cache = KVCache(pages, case.kv_bits, case.head_dim)
        options = {"attends": attends, "layer": layer, "backend": backend}
        return paged_attention(q, cache, table, lens, **more, **options)

    table = paged.table[:, :0] if full else paged.table
    fixed = (paged.cache.pages, q, table, paged.lens, sides)
    found = (
        {}
        if full
        else {"rel_err": _chunk_error(case, paged, q, run(*fixed, paged.layers[TIMED_LAYER]))}
    )
    us = bench.median_us(run, fixed, paged.layers[:1] if full else paged.layers)
    plain = jax.jit(functools.partial(_attend_contiguous, causal=True))
    sizes = {"what": "prefill", "b": batch, "tokens": tokens} | _sizes(_heads(case))
    other = _baseline(bench, sizes, lambda: bench.median_us(plain, (q, None), [sides]))
    operations = 2 * batch * case.heads * tokens * (tokens + 1) * case.head_dim
    return {"us": us, "cudnn_bf16_us": other, "tflops": operations / us / 1e6} | found


def _new(batch: int, tokens: int, case: Case) -> tuple[Array, Array]:
    shape = (batch, tokens, case.kv_heads, case.head_dim)
    return normal(shape, 1), normal(shape, 2)


def _chunk(case: Case, chunk: int, attends: str, backend: str, bench: Bench) -> dict[str, Any]:
    """The last `chunk` tokens of a sequence. The baseline sees all keys of a contiguous cache from
    each query, which is somewhat more."""
    (context,) = case.lengths
    paged = make_paged(case)
    q = normal((1, chunk, case.heads, case.head_dim), 2)
    new = _new(1, chunk, case) if attends == "full" else None
    lens = (paged.lens, jnp.full(1, chunk, jnp.int32))

    @jax.jit
    def run(pages: Array, q: Array, new: Any, table: Array, lens: Any, layer: Array) -> Array:
        cache = KVCache(pages, case.kv_bits, case.head_dim)
        more = {"new_k": new[0], "new_v": new[1]} if new else {}
        options = {"query_lens": lens[1], "attends": attends, "backend": backend}
        return paged_attention(q, cache, table, lens[0], layer=layer, **more, **options)

    fixed = (paged.cache.pages, q, new, paged.table, lens)
    out = run(*fixed, paged.layers[TIMED_LAYER])
    us = bench.median_us(run, fixed, paged.layers)
    plain = jax.jit(functools.partial(_attend_contiguous, causal=False))
    sizes = {"what": "chunked prefill", "chunk": chunk, "ctx": context} | _sizes(_heads(case))
    sides = [_new(1, context, case)]
    other = _baseline(bench, sizes, lambda: bench.median_us(plain, (q, None), sides))
    operations = 4 * case.heads * case.head_dim * chunk * (context - (chunk - 1) / 2)
    error = _chunk_error(case, paged, q, out, new)
    tflops = operations / us / 1e6
    return {"us": us, "cudnn_bf16_us": other, "tflops": tflops, "rel_err": error}


def _heads(case: Case) -> Heads:
    return case.heads, case.kv_heads, case.head_dim


def _chunk_error(case: Case, paged: Paged, q: Array, out: Array, new: Any = None) -> float:
    """Against float64, of the worst of three queries of the first sequence."""
    before = case.lengths[0] - q.shape[1]
    errors = []
    for at in (0, q.shape[1] // 2, q.shape[1] - 1):
        seen = dataclasses.replace(case, lengths=(before + at + 1,))
        last = [np.asarray(x[0, : at + 1], np.float64) for x in new or ()]
        exact = attend_row(seen, paged, TIMED_LAYER, 0, np.asarray(q[0, at], np.float64), last)
        difference = np.asarray(out[0, at], np.float64) - exact
        errors.append(np.linalg.norm(difference) / np.linalg.norm(exact))
    return float(np.max(errors))


def attention_report(start: Report) -> Report:
    """A report without results, for this benchmark."""
    return start | {"op": "attention"} | {name: [] for name in LISTS}


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]
