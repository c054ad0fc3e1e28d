"""The body of decode attention, which both backends share; they differ in how pages are copied,
and only one has clusters.

How it works, on one page: docs/paged_attention.md.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.intrinsics import I32
from qserve_jax.pallas_kernels.paged_attention import decode_page as page
from qserve_jax.pallas_kernels.paged_attention.decode_config import (
    DecodeConfig,
    check_config,
    shared_memory,
)
from qserve_jax.pallas_kernels.paged_attention.decode_merge import (
    PARTIAL_EXTRA,
    add_splits,
    merge,
)
from qserve_jax.pallas_kernels.paged_attention.decode_problem import Problem, gather
from qserve_jax.pallas_kernels.paged_attention.decode_query import (
    Query,
    State,
    ask_new_token,
    ask_query,
    make_query,
    start_state,
)
from qserve_jax.pallas_kernels.paged_attention.decode_rules import choose_config
from qserve_jax.pallas_kernels.paged_attention.decode_thread import (
    Thread,
    Work,
    find_work,
    is_page,
    thread_of,
)
from qserve_jax.pallas_kernels.paged_attention.problem import SMS
from qserve_jax.quantization.qtensor import Array


class Copies(Protocol):
    """How a worker's ring is filled."""

    def prepare(self) -> tuple[I32, I32]:
        """What can be done before lengths have come -> the ids of the worker's first page, and of
        the first that this thread copies."""
        ...

    def start(self, work: Work, mine: I32) -> None:
        """The first pages are on their way. mine: the second id of `prepare`."""

    def wait(self, work: Work, i: I32, slot: I32, parity: I32) -> I32:
        """Until the i-th page has come, in this slot -> its address."""
        ...

    def release(self, slot: I32) -> None:
        """This thread has read from the slot all that it needs; by all threads of the worker."""

    def refill(self, work: Work, i: I32, slot: I32, parity: I32, later: I32) -> None:
        """Ask for page i + stages, whose id is `later`, when the slot is free."""


MakeCopies = Callable[[Problem, DecodeConfig, Thread, Any], Copies]


def attention(
    backend: str,
    make_copies: MakeCopies,
    q: Array,
    *args: Any,
    config: DecodeConfig | None = None,
    clusters: bool,
    barriers: Callable[[DecodeConfig], int],
    arch: tuple[int, int] | None,
    **kwargs: Any,
) -> Array:
    """See `api.paged_attention`; q [B, 1, N, H].

    config: None for the rules of `choose_config`.
    """
    if q.size == 0 and q.shape[1] == 1:
        return jnp.zeros_like(q)
    problem, operands = gather(backend, q, *args, **kwargs)
    chosen = config or choose_config(problem, clusters=clusters)
    if problem.rows * problem.head_blocks <= SMS and problem.ordered:  # all start at once
        operands.pop("order")
        problem = dataclasses.replace(problem, ordered=False)
    check_config(problem, chosen)
    b, n, h = problem.rows, problem.heads, problem.head_dim
    out = jax.ShapeDtypeStruct((b, n, h), q.dtype)
    if chosen.splits > 1:
        out = jax.ShapeDtypeStruct((chosen.splits, b, n, h + PARTIAL_EXTRA), jnp.float32)
    y = ptx.launch(
        functools.partial(_body, problem, chosen, make_copies, tuple(operands)),
        tuple(operands.values()),
        out,
        name=f"paged_attention_kv{problem.bits}_{backend.removeprefix('mosaic_')}",
        blocks=b * problem.head_blocks * chosen.splits * chosen.cluster,
        warpgroups=chosen.warpgroups,
        cluster=chosen.cluster,
        shared_bytes=shared_memory(problem, chosen).size,
        barriers=barriers(chosen),
        arch=arch,
    )
    y = add_splits(problem, y) if chosen.splits > 1 else y
    return y.reshape(q.shape)


def _body(
    p: Problem, config: DecodeConfig, make_copies: MakeCopies, names: tuple[str, ...], *refs: Any
) -> None:
    """The kernel. refs: the operands called `names`, the output, shared memory (and barriers)."""
    operands, (out, shared, *barriers) = refs[: len(names)], refs[len(names) :]
    t = thread_of(p, config, dict(zip(names, operands, strict=True)) | {"out": out}, shared)
    copies = make_copies(p, config, t, barriers)
    asked, new = ask_query(p, t), ask_new_token(p, t)
    first, mine = copies.prepare()
    work = find_work(p, t)
    copies.start(work, mine)
    query = make_query(p, t, work, asked)
    ptx.sync_block(config.threads)  # barriers are initialised
    state = start_state(p, t, work, new)  # one warp's: the others need not wait for it
    state = _main_loop(p, config, t, work, copies, query, state, first)
    merge(p, config, t.again(p, config), state)


def _main_loop(
    p: Problem,
    config: DecodeConfig,
    t: Thread,
    work: Work,
    copies: Copies,
    query: Query,
    state: State,
    first: I32,
) -> State:
    """first: the id of the worker's first page. Whether a page exists is asked a page ahead."""
    lane = page.Lane(p, t)
    early = p.bits == 4  # V fits in registers beside K, and the slot is free sooner

    def step(i: I32, carry: list[Any]) -> list[Any]:
        *registers, slot, parity, exists = carry
        state = State.of(registers)
        block = copies.wait(work, i, slot, parity)
        keys, words = page.load_keys(p, lane, block), page.load_scales(p, lane, block)
        values = page.load_values(p, lane, block) if early else None
        if early:
            copies.release(slot)
        following, later = t.page_id(p, i + 1), t.page_id(p, i + config.stages)
        seen = page.seen_tokens(p, t, work, lane, i, exists)
        products = page.key_products(p, query, keys)
        key_scales, value_scales = page.unpack_scales(p, words, seen)
        score = functools.partial(page.scores, p, query, products, key_scales, seen)
        zero = ptx.constant_float(0)
        state, relative = page.follow_top(p, state, score([zero - x for x in state.top]), score)
        state, weights = page.weigh(state, relative, value_scales)
        fragments = page.weight_fragments(p, weights)
        values = values or page.load_values(p, lane, block)
        if not early:
            copies.release(slot)
        for piece, part in enumerate(values):
            page.add_values(p, state.acc, piece, part, seen, fragments)
        copies.refill(work, i, slot, parity, later)
        last = slot.is_(config.stages - 1)
        return [
            *state.registers(),
            ptx.select(last, 0, slot + 1),
            ptx.select(last, parity ^ 1, parity),
            is_page(p, following),
        ]

    start = [*state.registers(), ptx.constant(0), ptx.constant(0), is_page(p, first)]
    return State.of(ptx.loop(work.count, start, step)[:-3])
