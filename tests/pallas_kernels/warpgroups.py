"""`lanes`, for a block whose warpgroups do different things and meet at mbarriers: Hopper.

From the kernel's branch on, each warpgroup is a thread of Python, of which one runs at a time, and
which stops at barriers; who goes on is drawn at random. Clocks tell what each knows of the others:
who reads shared memory must know of its last writer, and who writes must know of all that have read
it. wgmma reads registers that were fenced, and shared memory, as its descriptor says, whose writers
have fenced it; it does so when it is issued or when it is waited for, and what it gives is no
number before.
"""

import threading
from typing import Any

import numpy as np

from qserve_jax.pallas_kernels.intrinsics import tensor_cores
from tests.pallas_kernels import lanes

BARRIERS = 1 << 20  # where they are, beyond shared memory
LANES = np.arange(32)
G, C = LANES // 4, LANES % 4


class Pending(lanes.Twin):
    """Of a wgmma that has not been waited for: without operators."""


class Stopped(Exception):
    """Another warpgroup has failed."""


class Warpgroup:
    def __init__(self, index, mask, clock):
        self.index, self.mask, self.clock = index, mask, clock
        self.go, self.done, self.ready = threading.Semaphore(0), False, lambda: True
        self.products, self.committed = [], 0
        self.thread: Any = None


class Barrier:
    def __init__(self, arrivals, warpgroups):
        self.arrivals = self.pending = arrivals
        self.phases = 0
        self.arriving, self.known = np.zeros((2, warpgroups), int)


class Machine(lanes.Machine):
    """One block."""

    def __init__(self, block, threads, shared_bytes, seed, *, late=True):
        super().__init__([block], threads, shared_bytes)
        self.rng, self.late, self.error = np.random.default_rng(seed), late, None
        self.back, self.barriers = threading.Semaphore(0), {}
        count, words = threads // 128, len(self.shared.words)
        self.groups = [
            Warpgroup(i, self.thread // 128 == i, np.zeros(count, int)) for i in range(count)
        ]
        self.now: Any = None  # the warpgroup that runs
        self.writer, self.written = np.zeros((2, words), int)
        self.read = np.full((words, count), -1)
        self.fenced = np.zeros(words, bool)

    def shared_address(self, ref):
        return self.constant(BARRIERS if ref == "barriers" else 0)

    # Warpgroups

    def branch(self, condition, yes, no):
        for group in self.groups:
            sides = np.unique(condition.values[group.mask])
            assert len(sides) == 1, "a warpgroup that goes both ways"
            group.thread = threading.Thread(
                target=self._run, args=(group, yes if sides[0] else no), daemon=True
            )
            group.thread.start()
        while self.error is None and not all(group.done for group in self.groups):
            ready = [group for group in self.groups if not group.done and group.ready()]
            if not ready:
                self.error = AssertionError("deadlock")
                break
            ready[self.rng.integers(len(ready))].go.release()
            self.back.acquire()
        for group in self.groups:
            group.go.release()
            group.thread.join()
        if self.error is not None:
            raise self.error

        for number, b in self.barriers.items():
            assert number >= BARRIERS or b.pending == b.arrivals, "arrivals that nobody waits for"

    def _run(self, group, body):
        try:
            self._wait_for_turn(group)
            body()
            assert not group.products, "wgmma that nobody waits for"
        except Stopped:
            pass
        except BaseException as error:
            self.error = self.error or error
        group.done = True
        self.back.release()

    def _wait_for_turn(self, group):
        group.go.acquire()
        if self.error is not None:
            raise Stopped
        self.now, self.mask = group, group.mask

    def _pause(self, ready):
        group, mask = self.now, self.mask
        group.ready = ready
        self.back.release()
        self._wait_for_turn(group)
        self.mask, group.ready = mask, lambda: True

    def set_max_registers(self, count, *, increase):
        assert count % 8 == 0
        assert increase == (count > 65536 // len(self.thread) // 8 * 8)

    # Barriers

    def _barrier(self, address):
        (at,) = np.unique(address.values[self.mask])
        assert at >= BARRIERS and at % 8 == 0
        return at

    def init_barrier(self, barrier, arrivals):
        self.barriers[self._barrier(barrier)] = Barrier(arrivals, len(self.groups))

    def publish_barriers(self):
        pass

    def sync_warp(self):
        self._whole_warps()

    def sync_block(self, threads, barrier=1):
        if self.now is None:
            return super().sync_block(threads, barrier)
        if not self.mask.any():  # `when` another warpgroup does
            return
        b = self._named(threads, barrier)
        phases = b.phases
        self._arrive(b)
        self._pause(lambda: b.phases > phases)
        self.now.clock = np.maximum(self.now.clock, b.known)

    def _named(self, threads, barrier):
        numbers = np.broadcast_to(barrier.values, self.mask.shape)[self.mask]
        (number,) = np.unique(numbers)
        assert 0 < number < 16
        return self.barriers.setdefault(number, Barrier(threads, len(self.groups)))

    def arrive(self, barrier):
        """By all threads that act."""
        self._arrive(self.barriers[self._barrier(barrier)])

    def _arrive(self, b):
        group = self.now
        b.arriving = np.maximum(b.arriving, group.clock)
        b.pending -= int(self.mask.sum())
        assert b.pending >= 0, "more arrivals than the barrier was made for"
        if b.pending == 0:
            b.phases, b.pending, b.known = b.phases + 1, b.arrivals, b.arriving
        group.clock[group.index] += 1
        self._pause(lambda: True)

    def wait(self, barrier, parity):
        b = self.barriers[self._barrier(barrier)]
        (parity,) = np.unique(np.broadcast_to(parity.values, self.mask.shape)[self.mask])
        self._pause(lambda: b.phases % 2 != parity)
        group = self.now
        group.clock = np.maximum(group.clock, b.known)

    def fence_writes(self):
        self.fenced[self.writer == self.now.index] = True

    # Shared memory

    def _load(self, address, count, kind):
        self.meetings += 1  # the clocks check who meets whom
        found = super()._load(address, count, kind)
        if address.memory is self.shared:
            first, _ = self._place(address, count)
            self._reads(np.unique(first[:, None] + np.arange(count)))
        return found

    def _reads(self, words):
        group = self.now
        assert self.shared.filled[words].all(), "read before it was written"
        known = self.written[words] <= group.clock[self.writer[words]]
        own = self.writer[words] == group.index
        assert (known | own).all(), "read without meeting the writer"
        self.read[words, group.index] = group.clock[group.index]

    def _store(self, address, values):
        self.meetings += 1
        super()._store(address, values)
        if address.memory is self.shared:
            group = self.now
            first, _ = self._place(address, len(values))
            words = np.unique(first[:, None] + np.arange(len(values)))
            others = np.arange(len(self.groups)) != group.index
            known = (self.read[words] <= group.clock) | ~others
            assert known.all(), "written without meeting who has read"
            self.writer[words], self.written[words] = group.index, group.clock[group.index]
            self.fenced[words] = False

    # wgmma (PTX ISA: matrix descriptor, shared memory layouts, register fragments)

    def wgmma_descriptor(self, address, *, columns_apart=16):
        return tensor_cores.wgmma_descriptor(address, columns_apart=columns_apart)

    def wgmma_fence(self, registers):
        found = [type(r)(r.values) for r in registers]
        for r in found:
            r.fenced = True
        return found

    def wgmma_halves(self, acc, a, descriptor, *, transposed=False):
        group, begins = self.now, isinstance(acc, int)
        assert (self.mask == group.mask).all(), "not by the whole warpgroup"
        used = [*a, *([] if begins else acc)]
        fenced = [isinstance(r, Pending) or getattr(r, "fenced", False) for r in used]
        assert all(fenced), "wgmma reads registers that were not fenced"
        out = [Pending(None) for _ in range(acc // 2 if begins else len(acc))]
        (low,) = np.unique(descriptor.values[self.mask])
        where = addresses(int(low), 2 * len(out), transposed)
        self._check_b(where)
        b = None if self.late else self._b(where)

        def multiply():
            self._check_b(where)
            self._multiply(out, None if begins else acc, a, self._b(where) if b is None else b)

        group.products.append(multiply)
        return out

    def _check_b(self, where):
        words = np.unique(where // 4)
        assert words[-1] < len(self.shared.words), "out of bounds"
        self._reads(words)
        assert self.fenced[words].all(), "wgmma reads what no fence has shown it"

    def _b(self, where):
        return self.shared.words.view(np.float16)[where // 2].astype(np.float32)

    def _multiply(self, out, acc, a, b):
        left, threads = np.zeros((64, 16), np.float32), np.flatnonzero(self.now.mask)
        for i, word in enumerate(a):
            pair = word.values[threads].view(np.float16).reshape(4, 32, 2)
            for warp, half in np.ndindex(4, 2):
                rows, columns = 16 * warp + G + 8 * (i % 2), 2 * C + 8 * (i // 2) + half
                left[rows, columns] = pair[warp, :, half]
        with np.errstate(all="ignore"):
            product = left @ b
        for r, register in enumerate(out):
            register.values = np.zeros(len(self.thread), np.float32)
            j, i = divmod(r, 4)
            rows = 16 * np.arange(4)[:, None] + G + 8 * (i // 2)
            found = product[rows, 8 * j + 2 * C + i % 2].reshape(-1)
            before = 0 if acc is None else acc[r].values[threads]
            register.values[threads] = before + found

    def wgmma_commit(self):
        self.now.committed = len(self.now.products)

    def wgmma_wait(self, acc, a):
        group = self.now
        assert group.committed == len(group.products), "wgmma that was not committed"
        self._pause(lambda: True)
        for multiply in group.products:
            multiply()
        group.products, group.committed = [], 0
        return [lanes.F32(r.values) for r in acc]


def addresses(low, columns, transposed):
    """Byte addresses [16, columns] of B's halves by the descriptor of its first."""
    high = tensor_cores._DESCRIPTOR_HIGH
    assert high >> 30 == 1 and high >> 17 & 7 == 0  # 128-byte swizzle, no base offset
    start, leading = (low & 0x3FFF) << 4, (low >> 16 & 0x3FFF) << 4
    stride = (high & 0x3FFF) << 4
    k, n = np.arange(16)[:, None], np.arange(columns)
    if transposed:
        at = start + n // 64 * leading + k // 8 * stride + k % 8 * 128 + n % 64 * 2
    else:
        at = start + n // 8 * stride + n % 8 * 128 + k * 2
    return at ^ (at >> 7 & 7) << 4
