"""`emulator.Gpu`, which besides knows who has met whom: warps move in lockstep, races are found.

What a thread reads of shared memory, another must have written before a barrier that both have
passed since; what it writes, or asks cp.async to write, others must have read before one. Barriers
are those of a warp, of a block and of a cluster, and an mbarrier is used by those who have met who
made it. The order of bulk copies and of who reads them is left to test_decode_ring.py.
"""

import dataclasses
from typing import Any

import numpy as np

from tests.pallas_kernels import emulator

NOBODY, SEVERAL = -1, -2


@dataclasses.dataclass
class Access:
    """Of each word: by which thread and warp, and after how many meetings of its warp, its block
    and its cluster."""

    thread: Any
    warp: Any
    warp_time: Any
    block_time: Any
    cluster_time: Any

    @staticmethod
    def of(words):
        return Access(*(np.full(words, NOBODY) for _ in range(5)))

    def at(self, words):
        return Access(*(x[words] for x in vars(self).values()))

    def set(self, words, other):
        for name, values in vars(other).items():
            getattr(self, name)[words] = values


class Gpu(emulator.Gpu):
    def __init__(self, blocks, threads, cluster, shared_bytes, eager):
        assert not eager, "copies that land late: when, is who waits for them"
        super().__init__(blocks, threads, cluster, shared_bytes, eager)
        self.warp_time, self.block_time = np.zeros(self.count // 32, int), np.zeros(blocks, int)
        self.cluster_time = self.meetings = 0
        self.per_block = shared_bytes // 4
        self.writes, self.reads = (Access.of(blocks * self.per_block) for _ in range(2))
        self.read_from_afar = np.full(blocks, NOBODY)
        self.made: dict[Any, Access] = {}  # mbarriers

    # Who, and whether they have met

    def _now(self, threads):
        warps, blocks = threads // 32, self.block[threads]
        times = self.warp_time[warps], self.block_time[blocks]
        return Access(threads, warps, *times, np.full(threads.shape, self.cluster_time))

    def _met(self, now, then):
        warp = (then.warp == now.warp) & (then.warp_time < now.warp_time)
        same = (then.thread == NOBODY) | (then.thread == now.thread)
        return same | warp | (then.block_time < now.block_time)

    def _words(self, address, offset, size):
        """Of the active threads' blocks, and what these threads are: both [threads, words]."""
        start = self._bytes(self.shared, address.value.astype(np.int64) + offset, size)[:, ::4]
        threads = np.flatnonzero(self.active)
        words = self.block[threads, None] * self.per_block + start // 4
        return words, self._now(np.broadcast_to(threads[:, None], words.shape))

    def _reading(self, words, now):
        assert self._met(now, self.writes.at(words)).all(), "read without meeting the writer"
        then = self.reads.at(words)
        others = ~self._met(now, then)
        warp = np.where(others & (then.warp != now.warp), SEVERAL, now.warp)
        thread = np.where(others, SEVERAL, now.thread)
        self.reads.set(words, dataclasses.replace(now, thread=thread, warp=warp))
        for mine, last in ((now.thread, self.reads.thread), (now.warp, self.reads.warp)):
            last[words[last[words] != mine]] = SEVERAL  # of this access

    def _writing(self, words, now):
        assert self._met(now, self.writes.at(words)).all(), "written without meeting the writer"
        assert self._met(now, self.reads.at(words)).all(), "written without meeting the readers"

    def _written(self, words, now):
        self.writes.set(words, now)
        assert (self.writes.thread[words] == now.thread).all(), "two threads write a word"

    # Meetings

    def sync_warp(self):
        super().sync_warp()
        self.warp_time[np.unique(np.flatnonzero(self.active) // 32)] += 1

    def sync_block(self, threads, barrier=1):
        super().sync_block(threads, barrier)
        self.block_time += 1

    def sync_cluster(self):
        super().sync_cluster()
        self.block_time += 1
        self.cluster_time += 1
        self.meetings += 1

    def meet_cluster(self):
        """What was written before, it shows to nobody."""
        super().sync_cluster()
        self.meetings += 1

    def finish(self):
        super().finish()
        assert (self.read_from_afar < self.meetings).all(), "a block ends while another reads it"

    # Shared memory

    def load_shared(self, address, offset=0, *, count=1, kind=emulator.I32):
        self._reading(*self._words(address, offset, 4 * count))
        return super().load_shared(address, offset, count=count, kind=kind)

    def store_shared_words(self, address, values, offset=0):
        words, now = self._words(address, offset, 4 * len(values))
        self._writing(words, now)
        super().store_shared_words(address, values, offset)
        self._written(words, now)

    def load_cluster(self, where, offset=0, *, count=1):
        address, block = where
        words, _ = self._words(address, offset, 4 * count)
        owner = np.broadcast_to(block, self.count)[self.active, None]
        then = self.writes.at(words % self.per_block + owner * self.per_block)
        assert (then.cluster_time < self.cluster_time).all(), "read without meeting the writer"
        self.read_from_afar[owner] = self.meetings
        return super().load_cluster(where, offset, count=count)

    # Copies, which land when they are waited for, and mbarriers

    def copy_16_bytes(self, target, source, *, offset=0, source_offset=0):
        words, now = self._words(target, offset, 16)
        self._writing(words, now)
        super().copy_16_bytes(target, source, offset=offset, source_offset=source_offset)
        self.open.append(lambda: self._written(words, self._now(now.thread)))

    def init_barrier(self, barrier, arrivals):
        super().init_barrier(barrier, arrivals)
        for thread, key in super()._each(barrier):
            self.made[key] = self._now(np.asarray(thread))

    def _each(self, barrier):
        for thread, key in super()._each(barrier):
            if key in self.made:
                met = self._met(self._now(np.asarray(thread)), self.made[key])
                assert met, "an mbarrier used without meeting who made it"
            yield thread, key
