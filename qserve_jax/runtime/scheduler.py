"""Who waits, who runs, and the pages they hold. First come, first served."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from qserve_jax.runtime.page_table import PagePool
from qserve_jax.runtime.sequence import Sequence


class Scheduler:
    """The sequences of one call of the engine.

    A sequence is admitted when the pool has pages for its whole length, so that it never has to
    wait or give way once it runs.
    """

    def __init__(self, sequences: Iterable[Sequence], pool: PagePool, max_num_seqs: int):
        self.waiting = deque(sequences)
        self.running: list[Sequence] = []
        self._pool, self._max_num_seqs = pool, max_num_seqs

    def admit(self) -> list[Sequence]:
        """Move sequences from waiting to running, in order, while places and pages last.

        Raises RuntimeError when none can be admitted, none runs, and so none ever will.
        """
        admitted = []
        while self.waiting and len(self.running) < self._max_num_seqs:
            needed = self._pool.pages_for(self.waiting[0].total_len)
            pages = self._pool.allocate(needed)
            if pages is None:
                self._check_progress(needed)
                break
            sequence = self.waiting.popleft()
            sequence.pages = pages
            admitted.append(sequence)
            self.running.append(sequence)
        return admitted

    def _check_progress(self, needed: int) -> None:
        if not self.running:
            raise RuntimeError(
                f"a prompt needs {needed} pages and {self._pool.free_pages} of "
                f"{self._pool.num_pages} are free, the others held by streams that are still open: "
                "close one or raise num_pages"
            )

    def retire(self) -> bool:
        """Give back the pages of sequences that have finished; whether there were any."""
        finished = [s for s in self.running if s.finish_reason is not None]
        self.running = [s for s in self.running if s.finish_reason is None]
        self._release(finished)
        return bool(finished)

    def close(self) -> None:
        """Give back all pages."""
        self._release(self.running)
        self.running = []
        self.waiting.clear()

    def _release(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            self._pool.release(sequence.pages)
            sequence.pages = []
