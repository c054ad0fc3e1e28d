"""Engine: in-flight batching over the paged cache, many device steps per call.

The host launches a call (device_calls.py) before it looks at what the last one brought, so that the
device does not wait for it. Both keep what they need: the host knows every sequence as far as it
has seen it, the device the last token of each (slots.py) and the cache.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import jax
import numpy as np

from qserve_jax.models.llama import CausalLM
from qserve_jax.runtime.batch import full_calls
from qserve_jax.runtime.compile_time import clock, compile_time
from qserve_jax.runtime.device_calls import MAX_DECODE_STEPS, DeviceCalls
from qserve_jax.runtime.engine_stats import EngineStats, EngineStatus
from qserve_jax.runtime.launches import Launched
from qserve_jax.runtime.page_table import PagePool
from qserve_jax.runtime.sampling import SampleOutput
from qserve_jax.runtime.scheduler import Chunk, Plan, Scheduler
from qserve_jax.runtime.sequence import Sequence, StreamOutput, take_logprobs
from qserve_jax.runtime.turns import Turns
from qserve_jax.runtime.warm_up import compile_programs

WAITING_STEPS = 16
"""Decode steps per call while someone waits for a place."""
SEQUENCES_PER_PLACE = 16
"""A decode call ends, while someone waits, when the places of one in so many sequences are free.
Before a device that does nothing, 2 000 requests of 1 to 2 048 tokens that make 1 to 512 more, 256
at once, took 444 prefill and 216 decode calls, where the first free place ended it 1 693 and 1 120,
for 2.2 % more steps (counted in development; no record is kept)."""
STREAM_SECONDS = 0.04
"""A call that somebody listens to takes about this long. Who comes waits for the one that runs and
for the one behind it."""
STATUS_SECONDS = 5.0

log = logging.getLogger("qserve_jax.engine")


@dataclasses.dataclass(frozen=True)
class Call:
    """A call on its way: its rows, the least and most tokens of each, and where they will be."""

    batch: list[Sequence]
    promised: list[tuple[int, int]]
    out: Launched[SampleOutput]
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
        max_num_seqs = min(max_num_seqs, num_pages)  # each that runs has a page
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
        self.device = DeviceCalls(
            model,
            params,
            num_pages=num_pages,
            page_size=page_size,
            kv_bits=kv_bits,
            max_num_seqs=max_num_seqs,
            attends=attends,
        )
        self._turns = Turns()
        self._in_order = True  # not while a turn is at work, nor after one that was interrupted
        self._taking: Sequence | None = None
        self._arrivals: deque[Sequence] = deque()
        self._cancelled: deque[Sequence] = deque()
        self._to_keep: deque[tuple[Sequence, list[Any]]] = deque()  # of `warm_up`, and its answer
        self._watched: set[Sequence] = set()  # those with a listener that have not finished
        self._calls: deque[Call] = deque()
        self._asking = threading.Lock()  # for the status, which any thread may
        self._recent: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
        self._last_done = self._logged = 0.0
        self._step_seconds: float | None = None
        self._longest = 0  # that programs were compiled for beforehand

    def _forget_shapes(self) -> None:
        """Nobody is here: the next shapes follow from who comes."""
        self.device.forget_shapes()
        self._step_seconds = None
        self._watched.clear()

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
        return self.device.cache_bytes

    def warm_up(self, longest: Sequence) -> None:
        """Compile all that sequences need which may become no longer than this one, sample with no
        more than it does and stop at no more ids, however many come, and whoever comes when. From
        then on its needs are everybody's, so that nobody asks for other programs."""
        kept: list[Any] = []
        self._to_keep.append((longest, kept))  # for whose turn it is: ours may be long in coming
        self.run_until(lambda: kept)
        if isinstance(kept[0], Exception):
            raise kept[0]
        self._longest = max(self._longest, longest.total_len)  # of a warm-up before, too
        shapes = self.scheduler.prefill_shapes(self._longest - 1)
        compile_programs(self.device.programs(shapes, *kept))

    def _accept(self) -> None:
        """Take note of who has come and gone."""
        if not (self.scheduler.waiting or self.scheduler.running):
            self._forget_shapes()
        while self._arrivals:
            sequence = self._arrivals[0]  # and there until it waits: a Ctrl-C loses nobody
            self.device.expect(sequence)
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
        while self._to_keep:
            longest, kept = self._to_keep[0]
            try:
                kept[:] = self.device.keep(longest)
            except Exception as error:  # for who asked, not for whose turn it is
                kept[:] = [error]
            self._to_keep.popleft()

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
        if not self.scheduler.running:
            self._drop_calls()
        launched = self._launch()
        while len(self._calls) > launched:
            self._process(self._calls.popleft())

    def _drop_calls(self) -> None:
        """Nobody is left to whom they could bring something. After one that failed pages may not
        hold what their keys say, or the cache be gone with it."""
        errors = [call.out.exception() for call in self._calls]
        if any(errors):
            log.error("a call that nobody waits for failed: %r", next(filter(None, errors)))
            self._begin_anew()
        self._calls.clear()

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
        """`_begin_anew`, which may itself be interrupted and done again."""
        self._begin_anew()
        self._in_order = True

    def _begin_anew(self) -> None:
        """Everyone waits with nothing but its tokens, before an empty cache."""
        for call in self._calls:
            call.out.cancel()  # where it waits for others
        self._calls.clear()
        self.device.forget_arrays()
        self.pool.clear()
        self.scheduler.preempt_all()
        if self._taking is not None:
            self._fail_taking(self._taking)
        waiting = self.scheduler.waiting
        while self._arrivals and self._arrivals[0] in waiting:
            self._arrivals.popleft()
        self._watched = {s for s in waiting if s.listener is not None}

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
        launched, batch = time.time(), [c.sequence for c in chunks]
        promised = [(int(c.samples), int(c.samples)) for c in chunks]
        out = self.device.prefill(chunks)
        self._calls.append(Call(batch, promised, out, True, launched))
        self.stats.prompt_tokens += sum(c.end - c.start for c in chunks)

    def _launch_decode(self, plan: Plan) -> None:
        launched, batch = time.time(), plan.decoding
        waited_for = bool(self.scheduler.waiting)
        enough = self._places_wanted() if waited_for else None
        out = self.device.decode(batch, plan.steps, enough)
        promised = [s.promise(1 if waited_for else plan.steps, plan.steps) for s in batch]
        self._calls.append(Call(batch, promised, out, False, launched))

    def _places_wanted(self) -> int:
        """How many of a decode call must end for enough places to be free, or sure to be."""
        running = self.scheduler.running
        ending = sum(s.prefilled and s.steps_left <= 0 for s in running)
        return max(0, max(1, len(running) // SEQUENCES_PER_PLACE) - ending)

    # What calls bring.

    def _process(self, call: Call) -> None:
        """Wait for a call, and hand its tokens to its sequences."""
        out = jax.device_get(call.out.result())
        now, done = clock(), time.time()
        seconds = compile_time.seconds_without(max(call.launched, self._last_done), done)
        self._last_done = done
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
        if steps and seconds:  # else all rows had ended before, or others compiled all the while
            self._step_seconds = seconds / steps
        stats.decode_seconds += seconds
        stats.decode_steps += steps
        cached = [s.cached for s in call.batch]
        window = self.device.model.config.sliding_window
        stats.attended_tokens += attended_tokens(cached, made, window)

    def _take(self, sequence: Sequence, out: Any, row: int, count: int, now: float) -> None:
        """Move `count` tokens of a SampleOutput's row to the sequence, up to where it ends."""
        self._taking = sequence
        first, text = len(sequence.tokens), ""
        tokens, finite = out.tokens[row, :count].tolist(), out.finite[row, :count].tolist()
        for step in range(count):
            if not finite[step]:
                sequence.fail(not_finite(sequence, self.device.params["embed"]["embedding"].dtype))
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
