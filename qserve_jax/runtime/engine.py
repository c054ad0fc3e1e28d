"""Engine: in-flight batching over the paged cache, many device steps per call.

The host launches a call before it looks at what the last one brought, so that the device does not
wait for it. Both keep what they need: the host knows every sequence as far as it has seen it, the
device the last token of each (slots.py) and the cache. Batches are padded to few shapes, so that
few programs are compiled.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from typing import Any

import jax
import numpy as np

from qserve_jax.models.llama import CausalLM
from qserve_jax.models.sharding import P, axis_of, cache_spec, shardings
from qserve_jax.quantization.qtensor import KVCache
from qserve_jax.runtime.batch import (
    Needs,
    call_shape,
    device_state,
    full_calls,
    needs_of,
    pad_column,
    pad_rows,
    power_of_two,
    powers_of_two,
    row_bucket,
    token_counts,
)
from qserve_jax.runtime.compile_time import clock
from qserve_jax.runtime.decode import DecodeState
from qserve_jax.runtime.device_memory import held_bytes
from qserve_jax.runtime.distributed import to_devices
from qserve_jax.runtime.engine_stats import EngineStats, EngineStatus
from qserve_jax.runtime.kv_cache import init_cache
from qserve_jax.runtime.page_table import PagePool
from qserve_jax.runtime.sampling import SampleOutput
from qserve_jax.runtime.scheduler import Chunk, Plan, Scheduler
from qserve_jax.runtime.sequence import Sequence, StreamOutput, take_logprobs
from qserve_jax.runtime.slots import Live, decode_slots, make_live, prefill_slots
from qserve_jax.runtime.turns import Turns
from qserve_jax.runtime.warm_up import compile_programs

MAX_DECODE_STEPS = 64
WAITING_STEPS = 16
"""Decode steps per call while someone waits for a place."""
SEQUENCES_PER_PLACE = 16
"""A decode call ends, while someone waits, when the places of one in so many sequences are free.
Before a device that does nothing, 2 000 requests of 1 to 2 048 tokens that make 1 to 512 more, 256
at once, took 444 prefill and 216 decode calls, where the first free place ended it 1 693 and 1 120,
for 2.2 % more steps (counted in development; no record is kept)."""
STREAM_SECONDS = 0.1
"""A call that somebody listens to takes about this long."""
STATUS_SECONDS = 5.0

log = logging.getLogger("qserve_jax.engine")


@dataclasses.dataclass(frozen=True)
class Call:
    """A call on its way: its rows, the least and most tokens of each, and where they will be."""

    batch: list[Sequence]
    promised: list[tuple[int, int]]
    out: SampleOutput
    is_prefill: bool
    launched: float


class Engine:
    """Sequences in, tokens out. Threads may share it: they take turns at `step`.

    model, params: as `prepare_for_backend` makes them. num_pages, page_size, kv_bits: the cache.
    max_num_seqs, max_num_batched_tokens, share_prefixes: see `Scheduler`. attends: see
    `paged_attention`.
    """

    def __init__(
        self,
        model: CausalLM,
        params: Any,
        *,
        num_pages: int,
        page_size: int,
        kv_bits: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        attends: str,
        share_prefixes: bool,
    ):
        self.model, self.params, self.attends = model, params, attends
        max_num_seqs = min(max_num_seqs, num_pages)  # each that runs has a page
        self.kv_bits, self.max_num_seqs = kv_bits, max_num_seqs
        self.stats = EngineStats()
        self.pool = PagePool(num_pages, page_size)
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs,
            max_num_batched_tokens,
            share_prefixes=share_prefixes,
            salted=model.config.rope.rope_type == "dynamic",
            in_pieces=attends == "quantized",
        )
        static = ("model", "features", "attends", "max_steps")
        self._mesh = mesh = model.mesh
        options: dict[str, Any] = {"donate_argnames": ("cache", "live")}
        if mesh is not None:
            places = cache_spec(axis_of(mesh)), P(), P()  # of cache, slots and what is made
            options["out_shardings"] = shardings(places, mesh)
        self._prefill = jax.jit(prefill_slots, static_argnames=static[:3], **options)
        self._decode = jax.jit(decode_slots, static_argnames=static, **options)
        self._turns = Turns()
        self._in_order = True  # not while a turn is at work, nor after one that was interrupted
        self._taking: Sequence | None = None
        self._arrivals: deque[Sequence] = deque()
        self._cancelled: deque[Sequence] = deque()
        self._watched: set[Sequence] = set()  # those with a listener that have not finished
        self._calls: deque[Call] = deque()
        self._asking = threading.Lock()  # for the status, which any thread may
        self._recent: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
        self._last_done = self._logged = 0.0
        self._cache: KVCache | None = None
        self._live: Live | None = None
        self._least = Needs()  # what programs are compiled for in any case
        self._forget_shapes()
        self._device_arrays()

    def _forget_shapes(self) -> None:
        """Nobody is here: the next shapes follow from who comes."""
        self._needs, self._rows = self._least, 0
        self._decoding: tuple[list[Sequence], jax.Array, DecodeState] | None = None
        self._step_seconds: float | None = None
        self._watched.clear()
        if self._live is not None and self._live.counts is not None:
            self._live = None

    def _device_arrays(self) -> tuple[KVCache, Live]:
        """The cache and the slots, new ones where they were lost."""
        if self._cache is None:
            self._cache = init_cache(
                self.model.config,
                num_pages=self.pool.num_pages,
                page_size=self.pool.page_size,
                kv_bits=self.kv_bits,
                dtype=self.params["embed"]["embedding"].dtype,
                mesh=self._mesh,
            )
        counted = self._needs.features.penalties
        if self._live is None or (self._live.counts is None and counted):
            new = make_live(self.max_num_seqs, self.model.config.vocab_size if counted else None)
            if self._live is not None:  # who runs already has no penalties, nor needs counts
                new = dataclasses.replace(self._live, counts=new.counts)
            placed: Live = to_devices(new, self._mesh)
            self._live = placed
        return self._cache, self._live

    # Who comes and goes, and whose turn it is.

    def add(self, sequences: Seq[Sequence]) -> None:
        """Sequences to generate, from the next step on."""
        self._arrivals.extend(sequences)

    def cancel(self, sequences: Seq[Sequence]) -> None:
        """Drop those that have not finished: at once, or after the step that runs."""
        self._cancelled.extend(sequences)
        self._turns.take(self._accept_only)

    def run_until(self, done: Callable[[], Any]) -> None:
        """Step until done(), or wait for the thread that does. Raises what a step raises."""
        while not done():
            try:
                stepped = self._turns.take(self.step)
            finally:
                if self._cancelled:  # by a thread whose turn it was not
                    self._turns.take(self._accept_only)
            if not stepped:
                self._turns.wait()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._arrivals or self.scheduler.waiting or self.scheduler.running)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the paged cache; of several devices, on one of them."""
        return held_bytes(self._device_arrays()[0])

    def _accept(self) -> None:
        """Take note of who has come and gone."""
        if not (self.scheduler.waiting or self.scheduler.running):
            self._forget_shapes()
        while self._arrivals:
            sequence = self._arrivals[0]  # and there until it waits: a Ctrl-C loses nobody
            self._needs |= self._needs_of(sequence)
            self.scheduler.waiting.append(sequence)
            if sequence.listener is not None:
                self._watched.add(sequence)
            self._arrivals.popleft()
        while self._cancelled:
            sequence = self._cancelled[0]
            self._watched.discard(sequence)
            if not sequence.done:
                sequence.finish_reason = "abort"
                self.scheduler.drop(sequence)
            self._cancelled.popleft()
        if not self.scheduler.running:  # nobody is left to whom a call could bring something
            self._calls.clear()

    # The loop.

    def step(self) -> None:
        """Launch the next calls, then look at what all but the last of them have brought.

        After an exception the sequences are as the host last saw them, and wait to be computed
        anew: a call that was interrupted may have taken the cache with it.
        """
        self._orderly(self._step)
        self._log_status()

    def _step(self) -> None:
        self._accept()
        launched = self._launch()
        while len(self._calls) > launched:
            self._process(self._calls.popleft())

    def _accept_only(self) -> None:
        self._orderly(self._accept)

    def _orderly(self, work: Callable[[], None]) -> None:
        """Do the work. Where it is interrupted all is put in order, at once or, should that be
        interrupted too, before the next."""
        if not self._in_order:
            self._recover()
        self._in_order = False
        try:
            work()
        except BaseException:
            self._recover()
            raise
        self._in_order = True

    def _recover(self) -> None:
        """Everyone waits with nothing but its tokens. May itself be interrupted and begun anew."""
        self._calls.clear()
        self._cache = self._live = self._decoding = None
        self.pool.clear()
        self.scheduler.preempt_all()
        if self._taking is not None:
            self._fail_taking(self._taking)
        waiting = self.scheduler.waiting
        while self._arrivals and self._arrivals[0] in waiting:
            self._arrivals.popleft()
        self._watched = {s for s in waiting if s.listener is not None}
        self._in_order = True

    def _fail_taking(self, sequence: Sequence) -> None:
        """Some of its new tokens may be in its text, and some not: it cannot go on."""
        sequence.fail(RuntimeError("interrupted while its tokens were read: ask again"))
        self.scheduler.drop(sequence)
        self._taking = None
        self._tell(sequence, "", len(sequence.tokens))

    def _launch(self) -> bool:
        """The next calls; whether there were any."""
        plan = self.scheduler.schedule(
            self._most_steps(),
            WAITING_STEPS,
            drained=not self._calls,
            # Where nobody watches, steps of a batch that is not full yet are steps too many.
            between=int(self._is_watched()),
        )
        if plan is None:
            return False
        for chunks in full_calls(plan.chunks) if plan.chunks else []:
            self._launch_prefill(chunks)
        if plan.steps:
            self._launch_decode(plan)
        return bool(plan.chunks or plan.steps)

    def _most_steps(self) -> int:
        """Decode steps of the next call: few where somebody listens.

        Of several processes all must call for as many, whatever time theirs took.
        """
        if not self._is_watched() or jax.process_count() > 1:
            return MAX_DECODE_STEPS
        at_once = 1 if self._step_seconds is None else int(STREAM_SECONDS / self._step_seconds)
        return min(max(at_once, 1), MAX_DECODE_STEPS)

    def _is_watched(self) -> bool:
        """Whether somebody gets tokens as they come."""
        return bool(self._watched)

    def _launch_prefill(self, chunks: Seq[Chunk]) -> None:
        launched, batch = clock(), [c.sequence for c in chunks]
        # Fresh prompts that attend to themselves unquantised read no pages.
        fresh = self.attends == "full" and all(c.start == 0 for c in chunks)
        promised = [(int(c.samples), int(c.samples)) for c in chunks]
        operands = self._prefill_operands(chunks, *call_shape(chunks), self._needs, fresh=fresh)
        out = self._call(self._prefill, *operands, features=self._needs.features)
        self._calls.append(Call(batch, promised, out, True, launched))
        self.stats.prompt_tokens += sum(c.end - c.start for c in chunks)

    def _prefill_operands(
        self, chunks: Seq[Chunk], rows: int, width: int, needs: Needs, *, fresh: bool
    ) -> tuple[Any, ...]:
        """What `prefill_slots` takes from `slots` on: the chunks, padded."""
        batch = [c.sequence for c in chunks]
        # Only the last chunk of a sequence leaves something for decoding.
        slots = [
            s.slot if c.end == s.goal else self.max_num_seqs
            for c, s in zip(chunks, batch, strict=True)
        ]
        tokens = [c.sequence.known[c.start : c.end] for c in chunks]
        counts = None
        if needs.features.penalties:
            counts = token_counts(chunks, rows=rows, vocab_size=self.model.config.vocab_size)
        lens = [c.end for c in chunks]
        return (
            pad_column(slots, rows, self.max_num_seqs),
            pad_rows(tokens, rows, width, 0),
            device_state(batch, rows=rows, needs=needs, lens=lens, counts=counts),
            None if fresh else pad_column([c.end - c.start for c in chunks], rows),
            np.asarray([c.samples for c in chunks] + [False] * (rows - len(chunks))),
        )

    def _launch_decode(self, plan: Plan) -> None:
        launched, batch = clock(), plan.decoding
        rows = self._rows = row_bucket(len(batch), self._rows)
        slots, state = self._decode_arrays(batch, rows)
        waited_for = bool(self.scheduler.waiting)
        yield_idle = self._yield_idle(rows - len(batch)) if waited_for else rows + 1
        out = self._call(
            self._decode,
            slots,
            state,
            plan.steps,
            yield_idle,
            features=self._needs.features,
            max_steps=MAX_DECODE_STEPS,
        )
        promised = [s.promise(1 if waited_for else plan.steps, plan.steps) for s in batch]
        self._calls.append(Call(batch, promised, out, False, launched))

    def _yield_idle(self, padding: int) -> int:
        """Idle rows of a decode call at which enough places are free, or sure to be."""
        running = self.scheduler.running
        ending = sum(s.prefilled and s.steps_left <= 0 for s in running)
        enough = max(1, len(running) // SEQUENCES_PER_PLACE)
        return padding + max(0, enough - ending)

    def _decode_arrays(self, batch: list[Sequence], rows: int) -> tuple[jax.Array, DecodeState]:
        """Slots and state of a decode call. While nobody comes or goes, only pages change."""
        if self._decoding is not None and self._decoding[0] == batch:
            _, slots, state = self._decoding
            table = pad_rows([s.pages for s in batch], rows, self._needs.columns, -1)
            state = dataclasses.replace(state, block_table=to_devices(table, self._mesh))
        else:
            slots = pad_column([s.slot for s in batch], rows, self.max_num_seqs)
            state = device_state(batch, rows=rows, needs=self._needs, lens=[0] * len(batch))
            slots, state = to_devices((slots, state), self._mesh)
        self._decoding = batch, slots, state
        return slots, state

    def _call(self, function: Any, *args: Any, **kwargs: Any) -> SampleOutput:
        """Launch a function that is given the cache and the slots, and gives them back."""
        cache, live = self._device_arrays()
        self._cache, self._live, out = function(
            self.model, self.params, cache, live, *args, attends=self.attends, **kwargs
        )
        return out

    # Programs, before somebody needs them.

    def warm_up(self, longest: Sequence) -> None:
        """Compile all that sequences need which may become no longer than this one, sample with no
        more than it does and stop at no more ids, however many come, and whoever comes when. From
        then on its needs are everybody's, so that nobody asks for other programs."""
        types: list[Any] = []

        def keep() -> None:
            self._least |= self._needs_of(longest)
            self._needs |= self._least
            types[:] = jax.tree.map(self._type_of, self._device_arrays())

        while not self._turns.take(lambda: self._orderly(keep)):
            self._turns.wait()
        compile_programs(self._programs(longest.total_len, self._least, *types))

    def _programs(
        self, total_len: int, needs: Needs, cache: Any, live: Any
    ) -> Iterator[jax.stages.Lowered]:
        """Every prefill call that prompts of fewer than total_len tokens can make, of no sequence,
        and every decode call, lowered; cache, live: the types of the arrays."""
        fixed: dict[str, Any] = {"attends": self.attends, "features": needs.features}
        for fresh in {False, self.attends == "full"}:
            for rows, width in self.scheduler.prefill_shapes(total_len - 1):
                operands = self._prefill_operands([], rows, width, needs, fresh=fresh)
                yield self._prefill.lower(self.model, self.params, cache, live, *operands, **fixed)
        fixed["max_steps"] = MAX_DECODE_STEPS
        for rows in powers_of_two(1, power_of_two(self.max_num_seqs)):
            slots = pad_column([], rows, self.max_num_seqs)
            state = device_state([], rows=rows, needs=needs, lens=[])
            operands = *to_devices((slots, state), self._mesh), 1, 1
            yield self._decode.lower(self.model, self.params, cache, live, *operands, **fixed)

    def _type_of(self, x: jax.Array) -> jax.ShapeDtypeStruct:
        sharding = None if self._mesh is None else x.sharding
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def _needs_of(self, sequence: Sequence) -> Needs:
        return needs_of(sequence, self.pool.page_size, self.model.config.vocab_size)

    # What calls bring.

    def _process(self, call: Call) -> None:
        """Wait for a call, and hand its tokens to its sequences."""
        out = jax.device_get(call.out)
        now = clock()
        seconds, self._last_done = now - max(call.launched, self._last_done), now
        made = (out.tokens >= 0).sum(axis=1)[: len(call.batch)]
        self._count(call, seconds, made)
        for row, (sequence, promised) in enumerate(zip(call.batch, call.promised, strict=True)):
            sequence.redeem(promised)
            if made[row] and not sequence.done:
                self._take(sequence, out, row, int(made[row]), now)

    def _count(self, call: Call, seconds: float, made: np.ndarray) -> None:
        stats = self.stats
        stats.shared_tokens = self.scheduler.shared_tokens
        stats.preemptions = self.scheduler.preemptions
        if call.is_prefill:
            stats.prefill_seconds += seconds
            stats.prefilled_sequences += int(made.sum())
            return
        steps = int(made.max())
        if steps:  # none where all rows had ended before: that says nothing of a step
            self._step_seconds = seconds / steps
        stats.decode_seconds += seconds
        stats.decode_steps += steps
        cached = [s.cached for s in call.batch]
        window = self.model.config.sliding_window
        stats.attended_tokens += attended_tokens(cached, made, window)

    def _take(self, sequence: Sequence, out: Any, row: int, count: int, now: float) -> None:
        """Move `count` tokens of a SampleOutput's row to the sequence, up to where it ends."""
        self._taking = sequence
        first, text = len(sequence.tokens), ""
        tokens, finite = out.tokens[row, :count].tolist(), out.finite[row, :count].tolist()
        for step in range(count):
            if not finite[step]:
                sequence.fail(not_finite(sequence, self.params["embed"]["embedding"].dtype))
                break
            logprobs = take_logprobs(out, row, step, sequence.params)
            try:
                text += sequence.append(tokens[step], logprobs)
            except Exception as error:  # its tokenizer's: nobody else's
                sequence.fail(error)
            if sequence.done:  # a stop string ends before the device does
                break
        sequence.first_token_time = sequence.first_token_time or now
        sequence.end_time = now
        self.stats.generated_tokens += len(sequence.tokens) - first
        self.scheduler.share_generated(sequence)
        if sequence.done:
            self.scheduler.drop(sequence)
            self._watched.discard(sequence)
        self._tell(sequence, text, first)
        self._taking = None

    def _tell(self, sequence: Sequence, text: str, first: int) -> None:
        """The listener hears of the tokens from `first` on, and their text."""
        if sequence.listener is None or not (sequence.streams or sequence.done):
            return
        wants = sequence.params.logprobs is not None
        sequence.listener(
            StreamOutput(
                index=sequence.index,
                sample=sequence.sample,
                text=text,
                token_ids=sequence.tokens[first:],
                finish_reason=sequence.finish_reason,
                logprobs=sequence.logprobs[first:] if wants else None,
            )
        )

    def status(self) -> EngineStatus:
        """What the engine is doing."""
        now, made = time.monotonic(), self.stats.generated_tokens
        with self._asking:
            self._recent.append((now, made))
            while len(self._recent) > 2 and self._recent[1][0] < now - STATUS_SECONDS:
                self._recent.popleft()
            since, before = self._recent[0]
        prompt = self.stats.prompt_tokens + self.scheduler.shared_tokens
        return EngineStatus(
            queue=len(self._arrivals) + len(self.scheduler.waiting),
            running=len(self.scheduler.running),
            pages_used=self.pool.num_pages - self.pool.free_pages,
            num_pages=self.pool.num_pages,
            prefix_hit_rate=self.scheduler.shared_tokens / max(prompt, 1),
            tokens_per_second=(made - before) / max(now - since, 1e-9),
            preemptions=self.scheduler.preemptions,
        )

    def _log_status(self) -> None:
        if time.monotonic() - self._logged >= STATUS_SECONDS:
            self._logged = time.monotonic()
            log.info("%s", self.status())


def not_finite(sequence: Sequence, dtype: Any) -> RuntimeError:
    """The error of a sequence whose next token could not be chosen."""
    return RuntimeError(
        f"prompt {sequence.index}: the model's logits at token {len(sequence.tokens)} "
        f"are not finite in {dtype}: use dtype bfloat16 or float32"
    )


def attended_tokens(cached: Seq[int], made: np.ndarray, window: int | None) -> int:
    """Tokens that sequences with `cached` tokens attend to while each makes made[i] more."""
    steps = np.arange(1, made.max() + 1)
    lens = np.minimum(np.asarray(cached)[:, None] + steps, np.inf if window is None else window)
    return int(lens[steps <= made[:, None]].sum())
