"""The ring of pages on Hopper, with its own code: four warps in any order, copies landing in any.

Each warp (its lane 0) is a thread of Python, see test_w4a8_ring.py; of the first warp the lanes
that copy the first pages, too.
"""

import contextlib
import types
from typing import Any

import pytest

from qserve_jax.pallas_kernels.paged_attention import mosaic_sm90
from qserve_jax.pallas_kernels.paged_attention.decode_config import DecodeConfig
from tests.pallas_kernels.test_w4a8_ring import Address, Barrier, Warps, Word

BASE, BARRIERS, SIZE = 4096, 512, 8704


def emulate(stages, pages, seed, monkeypatch):
    """Runs a worker -> the pages that each of its warps has read, in order."""
    warps = Warps(seed)
    barriers: dict[int, Barrier] = {}
    holds: list[Any] = [None] * stages
    readers = [0] * stages

    def copy_to_shared(target, source, count, at):
        assert all(warps.mine.agent.conditions) and count == SIZE
        slot, rest = divmod(target - BASE, SIZE)
        assert rest == 0

        def land():
            assert readers[slot] == 0, "a slot is overwritten while it is read"
            holds[slot] = source.value
            barriers[at].complete(count)

        warps.copies.append(land)
        warps.pause()

    @contextlib.contextmanager
    def when(condition):
        """Bodies are entered in any case; what they do asks for the conditions."""
        warps.mine.agent.conditions.append(bool(condition))
        yield
        warps.mine.agent.conditions.pop()

    def if_active(do):
        def run(*args, **kwargs):
            if all(warps.mine.agent.conditions):
                do(*args, **kwargs)
                warps.pause()

        return run

    def init_barrier(at, arrivals):
        assert at not in barriers
        barriers[at] = Barrier(arrivals)

    ptx = types.SimpleNamespace(
        constant=Word,
        shared_address=lambda ref: Word(BARRIERS),
        when=when,
        init_barrier=if_active(init_barrier),
        publish_barriers=lambda: None,
        minimum=min,
        value_of_lane=lambda value, lane: value,
        expect_bytes=if_active(lambda at, count: barriers[at].arrive(expected=count)),
        copy_to_shared=if_active(copy_to_shared),
        wait=if_active(lambda at, parity: warps.pause(lambda: barriers[at].passes(parity))),
        fence_reads=lambda: warps.pause(),
        sync_warp=lambda: warps.pause(lambda: len(barriers) == 2 * stages),
        arrive=if_active(lambda at: [barriers[at].arrive() for _ in range(32)]),  # all lanes do
    )
    monkeypatch.setattr(mosaic_sm90, "ptx", ptx)
    started: list[int] = []
    seen: dict[int, list[int]] = {warp: [] for warp in range(4)}

    def begin(index):
        t: Any = types.SimpleNamespace(
            index=Word(index),
            lane=Word(index % 32),
            warpgroup=Word(0),
            ring=Word(BASE),
            page_id=lambda p, i: Word(1000 + i),
        )
        work: Any = types.SimpleNamespace(count=Word(pages), source=lambda p, page: Address(page))
        p: Any = types.SimpleNamespace(page=types.SimpleNamespace(block_bytes=SIZE))
        ring: Any = mosaic_sm90.BulkCopies(p, DecodeConfig(stages, 2), t, [None])
        first, page = ring.prepare()
        assert index or first == 1000
        ring.start(work, page)
        started.append(index)
        warps.pause(lambda: len(started) == 4 + stages - 1)  # sync_block
        return t, p, work, ring

    def run(warp):
        t, p, work, ring = begin(32 * warp)
        slot, parity = Word(0), Word(0)
        for i in map(Word, range(pages)):
            later = t.page_id(p, i + stages)
            place = ring.wait(work, i, slot, parity)
            assert place == BASE + slot * SIZE
            readers[slot] += 1
            seen[warp].append(holds[slot])
            warps.pause()
            readers[slot] -= 1
            ring.release(slot)
            ring.refill(work, i, slot, parity, later)
            last = slot == stages - 1
            slot, parity = Word(0 if last else slot + 1), Word(parity ^ 1 if last else parity)

    for warp in range(4):
        warps.start(0, lambda warp=warp: run(warp))
    for lane in range(1, stages):
        warps.start(0, lambda lane=lane: begin(lane))
    warps.run()
    return seen


@pytest.mark.parametrize("stages, pages", [(2, 1), (2, 7), (3, 2), (3, 10), (4, 13)])
def test_each_warp_reads_each_page_once(stages, pages, monkeypatch):
    for seed in range(15):
        seen = emulate(stages, pages, seed, monkeypatch)
        expected = [1000 + i for i in range(pages)]
        assert seen == dict.fromkeys(range(4), expected)


def test_a_ring_that_does_not_wait_fails(monkeypatch):
    """So the emulation can: the refill goes where other warps still read."""

    def refill(self, work, i, slot, parity, later):
        with mosaic_sm90.ptx.when(self.copies & (i + self.stages < work.count)):
            self._copy(work, slot, later)

    monkeypatch.setattr(mosaic_sm90.BulkCopies, "refill", refill)
    failures = 0
    for seed in range(10):
        try:
            failures += emulate(2, 7, seed, monkeypatch) != dict.fromkeys(
                range(4), [1000 + i for i in range(7)]
            )
        except AssertionError:
            failures += 1
    assert failures
