"""Who waits, who runs, and the pages they hold. First come, first served.

Sequences get the pages that the next device call may write, not all they may ever need. When the
pool runs dry the one that came last gives its pages back and waits again, at the front: what it had
is computed anew from the tokens that the host knows.
"""

from __future__ import annotations

import dataclasses
from collections import deque

from qserve_jax.runtime.batch import (
    MIN_PROMPT_BUCKET,
    power_of_two,
    powers_of_two,
    prompt_bucket,
)
from qserve_jax.runtime.page_table import PagePool, page_keys
from qserve_jax.runtime.sequence import Sequence

WATERMARK = 0.01
"""Part of the pool that admission leaves free for those that run, so that they can grow."""
PIECE = 256
"""Longest chunk where a prompt may fill several rows of a call: rows are padded to the longest."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Prefill's next tokens of a sequence, known[start:end].

    samples: this is the end of a fresh prompt, after which its first token is chosen. What had
    tokens before it was preempted goes on from the last of them.
    """

    sequence: Sequence
    start: int
    end: int
    samples: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """The next calls: one prefill of `chunks`, then up to `steps` decode steps of `decoding`."""

    chunks: list[Chunk]
    decoding: list[Sequence]
    steps: int


class Scheduler:
    """The sequences of an engine: `waiting`, then `running` until finished, preempted or dropped.

    max_num_batched_tokens: most tokens of a prefill call, padding included; at least
      `batch.MIN_PROMPT_BUCKET`.
    share_prefixes: whether sequences that begin with the same full pages share them.
    salted: whether cached keys depend on how long a sequence may become (dynamic NTK).
    in_pieces: whether a prompt may fill several rows of a call. Attention that reads every token
      from the pages allows that: in each layer all rows are appended before any row reads.
    """

    def __init__(
        self,
        pool: PagePool,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        *,
        share_prefixes: bool = True,
        salted: bool = False,
        in_pieces: bool = False,
    ):
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.shared_tokens = 0
        self._pool, self._budget = pool, max_num_batched_tokens
        self._in_pieces = in_pieces
        budget = 1 << (max_num_batched_tokens.bit_length() - 1)
        self._longest_chunk = min(budget, PIECE) if in_pieces else budget
        self._share_prefixes, self._salted = share_prefixes, salted
        self._max_num_seqs = max_num_seqs
        self._slots = self._all_slots()

    def _all_slots(self) -> list[int]:
        return list(range(self._max_num_seqs - 1, -1, -1))

    def schedule(
        self, most_steps: int, waiting_steps: int, *, drained: bool, between: int = 1
    ) -> Plan | None:
        """Grow who runs, admit who waits, and say what to run next.

        most_steps: of decoding; at most `waiting_steps` while someone waits for a place or pages,
          and `between` after a prefill call while prompts wait for the next one.
        drained: no call is on its way. Only then is somebody preempted, because only then are all
          tokens known; otherwise the answer is None: look at what the calls bring, and come again.
        """
        while not self._grow(self._decoding(), 1):
            if not drained:
                return None
            self._preempt(self.running[-1])  # which needs more than is free now, and waits in front
        chunks, more_prefill = self._next_chunks()
        decoding = self._decoding()
        steps = min(most_steps, max([s.steps_left for s in decoding], default=0))
        if self.waiting:
            steps = min(steps, waiting_steps)
        if more_prefill:
            steps = min(steps, between)
        while steps > 1 and not self._grow(decoding, steps):
            steps //= 2
        return Plan(chunks, decoding, steps)

    def prefill_shapes(self, longest: int) -> list[tuple[int, int]]:
        """Rows, and tokens of each, of all calls that prompts of `longest` tokens at most make."""
        widest = prompt_bucket(min(longest, self._longest_chunk))
        # A sequence fills more than one row with the longest chunks alone.
        several = self._in_pieces and longest > self._longest_chunk
        shapes = []
        for width in powers_of_two(MIN_PROMPT_BUCKET, widest):
            fit = max(self._budget // width, 1)
            most = fit if several and width == widest else min(self._max_num_seqs, fit)
            shapes += [(rows, width) for rows in powers_of_two(1, min(power_of_two(most), fit))]
        return shapes

    def _decoding(self) -> list[Sequence]:
        return [s for s in self.running if s.prefilled and s.steps_left > 0]

    def _grow(self, sequences: list[Sequence], steps: int) -> bool:
        """Pages for `steps` more tokens of each, or for none where they do not suffice for all."""
        pool = self._pool
        missing = [pool.pages_for(s.len_after(steps)) - len(s.pages) for s in sequences]
        if sum(m for m in missing if m > 0) > pool.free_pages:
            return False
        for sequence, count in zip(sequences, missing, strict=True):
            if count > 0:
                sequence.pages += pool.allocate(count) or []
        return True

    def _next_chunks(self) -> tuple[list[Chunk], bool]:
        """The next prefill call: prompts begun before, then new ones, in order, within the budget;
        and whether some are left that could run but for the budget."""
        chunks: list[Chunk] = []
        for sequence in self.running:
            if not self._add_chunks(sequence, chunks):
                return chunks, True
        while self.waiting and self._slots:
            sequence = self.waiting[0]
            if not self._take_pages(sequence):
                break
            shared = sequence.computed
            if not self._add_chunk(sequence, chunks):
                self._return_pages(sequence)
                return chunks, True
            sequence.slot = self._slots.pop()
            self.running.append(sequence)
            self.waiting.popleft()  # only now: an interruption loses nobody
            self.shared_tokens += shared
            if self._in_pieces and not self._add_chunks(sequence, chunks):
                return chunks, True
        return chunks, any(not s.prefilled for s in self.running)

    def _add_chunks(self, sequence: Sequence, chunks: list[Chunk]) -> bool:
        """The sequence's next chunk, or all of them in pieces; False where the call has no room."""
        while not sequence.prefilled:
            if not self._add_chunk(sequence, chunks):
                return False
            if not self._in_pieces:
                break
        return True

    def _add_chunk(self, sequence: Sequence, chunks: list[Chunk]) -> bool:
        """The sequence's next chunk, where the call has room; the first one always fits."""
        length = min(sequence.goal - sequence.computed, self._longest_chunk)
        longest = max([length, *[c.end - c.start for c in chunks]])
        if chunks and power_of_two(len(chunks) + 1) * prompt_bucket(longest) > self._budget:
            return False
        start, end = sequence.computed, sequence.computed + length
        samples = end == sequence.goal and not sequence.tokens
        chunks.append(Chunk(sequence, start, end, samples))
        sequence.computed = end
        sequence.promise(samples, samples)
        # Before the call that fills the pages: others of the same call may share them, because in
        # each layer the tokens of all rows are appended before any row reads.
        self._publish(sequence, end)
        return True

    def _take_pages(self, sequence: Sequence) -> bool:
        """Pages for all that prefill computes and one step more; shared as far as known."""
        pool = self._pool
        sequence.goal = sequence.cached
        if self._share_prefixes:
            salt = sequence.total_len if self._salted else 0
            page_keys(sequence.known, pool.page_size, sequence.page_keys, salt)
            # The last token is computed in any case: its logits choose the next one.
            sequence.pages = pool.share(sequence.page_keys[: (sequence.goal - 1) // pool.page_size])
        sequence.published = len(sequence.pages)
        sequence.computed = len(sequence.pages) * pool.page_size
        count = pool.pages_for(sequence.len_after(2)) - len(sequence.pages)
        spare = WATERMARK * pool.num_pages if self.running else 0
        pages = pool.allocate(count) if count <= pool.free_pages - spare else None
        if pages is None:
            self._return_pages(sequence)
            return False
        sequence.pages += pages
        return True

    def _return_pages(self, sequence: Sequence) -> None:
        self._pool.release(sequence.pages)
        sequence.pages, sequence.published = [], 0
        sequence.computed = sequence.goal = 0

    def _publish(self, sequence: Sequence, num_tokens: int) -> None:
        """Others may share the full pages of the first num_tokens tokens."""
        if not self._share_prefixes:
            return
        full = num_tokens // self._pool.page_size
        for index in range(sequence.published, full):
            self._pool.publish(sequence.pages[index], sequence.page_keys[index])
        sequence.published = max(full, sequence.published)

    def share_generated(self, sequence: Sequence) -> None:
        """Let others share full pages of what the sequence has generated and the host has seen."""
        if self._share_prefixes and sequence.cached // self._pool.page_size > sequence.published:
            salt = sequence.total_len if self._salted else 0
            page_keys(sequence.known, self._pool.page_size, sequence.page_keys, salt)
            self._publish(sequence, sequence.cached)

    def _preempt(self, sequence: Sequence) -> None:
        """The sequence waits again, at the front; everything it held is free."""
        self.waiting.appendleft(sequence)  # first: who is interrupted here may be there twice
        self.drop(sequence)
        self.preemptions += 1

    def preempt_all(self) -> None:
        """Everyone waits again, in order, and has nothing, as the pool's owner sees to: what the
        device had is lost. But for those that have finished, where the interruption came before
        they were dropped. Interrupted at whatever moment, here too, nobody is lost."""
        self.preemptions += len(self.running)
        everyone = dict.fromkeys([*self.running, *self.waiting])
        for sequence in everyone:
            sequence.pages, sequence.slot = [], -1
            sequence.published = sequence.computed = sequence.goal = 0
            sequence.pending = sequence.sure = 0
        self.waiting = deque(s for s in everyone if not s.done)
        self.running = []
        self._slots = self._all_slots()

    def drop(self, sequence: Sequence) -> None:
        """Take back what the sequence holds, whether it waits or runs or is unknown."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._slots.append(sequence.slot)
            self._return_pages(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
