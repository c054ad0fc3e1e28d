"""`emulator` for the matmul kernels, whose warps do different things: any order of warps.

Each warp is a thread of Python with an `emulator.Gpu` of its own, that runs the whole body. One
runs at a time, which stops wherever it meets others, and who goes on, and which copy of the copy
engine lands, is drawn at random (test_w4a8_ring.py). A cluster of blocks has its shared memory and
barriers together; clusters come one after another.

Clocks tell what each warp knows of the others (as in warpgroups.py): who reads shared memory must
know of its last writer, and who writes, or asks for a copy, of all that have read or written it.
(Who arrives `relaxed`, which the kernels do after their reads, passes on as much as others.)
"""

import itertools
import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.pallas_kernels import intrinsics
from qserve_jax.pallas_kernels.intrinsics import tensor_cores
from qserve_jax.pallas_kernels.w4a8_matmul import (
    mma_epilogue,
    mma_thread,
    mosaic_mma,
    mosaic_sm90,
    problem,
    sm90_epilogue,
    sm90_exchange,
    sm90_thread,
)
from qserve_jax.pallas_kernels.w4a8_matmul.mma_config import MmaConfig
from tests.pallas_kernels import emulator, warpgroups
from tests.pallas_kernels.emulator import I32, POISON, signed, unsigned
from tests.pallas_kernels.test_w4a8_ring import Barrier, Warps

MODULES = (
    *(problem, mosaic_mma, mma_thread, mma_epilogue),
    *(mosaic_sm90, sm90_thread, sm90_exchange, sm90_epilogue),
)
SHARED = 1040  # where shared memory begins: no multiple of 1024
BARRIERS = 1 << 20


class Fenced(I32):
    """A register that wgmma may read."""


class Pending:
    """A sum that has not been waited for: without operators, and without a value."""

    value: Any


class Meeting(Barrier):
    """A barrier, of whatever kind, that passes on what those that arrive know."""

    def __init__(self, arrivals, agents):
        super().__init__(arrivals)
        self.arriving, self.known = np.zeros((2, agents), int)

    def _turn(self):
        phases = self.phases
        super()._turn()
        if self.phases > phases:
            self.known = self.arriving.copy()

    def bring(self, clock):
        np.maximum(self.arriving, clock, out=self.arriving)


class Cluster:
    """Blocks with shared memory, full of NaN, and barriers.

    Of each word: who wrote it last, at what time of its own (0: nobody has), and when each warp of
    its block read it.
    """

    def __init__(self, index, blocks, threads, shared_bytes, seed, stored):
        self.warps = Warps((seed, index))
        self.first_block, self.blocks, self.threads = index * blocks, blocks, threads
        words = np.full((blocks, shared_bytes // 4), POISON, np.uint32)
        self.shared = words.view(np.uint8)
        self.agents, self.per_block = blocks * threads // 32, threads // 32
        self.barriers: dict[tuple[int, int], Meeting] = {}  # by block, and address or number
        self.meeting = Meeting(blocks * threads, self.agents)
        self.stored = stored  # bytes of the output
        self.running = np.full(blocks, self.per_block)
        self.writer, self.written = np.zeros((2, *words.shape), int)
        self.read = np.zeros((*words.shape, self.per_block), int)


class Agent(emulator.Gpu):
    """A warp. eager: whether what its threads copy lands at once."""

    def __init__(self, cluster: Cluster, rank: int, warp: int, eager: bool):
        self.all, self.warps, self.rank, self.warp = cluster, cluster.warps, rank, warp
        self.number = rank * cluster.per_block + warp
        self.clock = np.zeros(cluster.agents, int)
        self.clock[self.number] = 1
        self.shared, self.eager = cluster.shared, eager
        self.count, self.threads = 32, cluster.threads
        self.block, self.index = np.full(32, rank), 32 * warp + np.arange(32)
        self.active = np.ones(self.count, bool)
        self.groups, self.open = [], []
        self.products, self.committed = [], 0

    def run(self, body):
        self.warps.mine.gpu = self
        body()
        assert not self.products, "wgmma that nobody waits for"
        left = [*itertools.chain.from_iterable(self.groups), *self.open]
        assert not left, "a copy that no one waited for"
        self.all.running[self.rank] -= 1

    def block_index(self):
        return self.constant(self.all.first_block + self.rank)

    def cluster_rank(self):
        return self.constant(self.rank)

    def set_max_registers(self, count, *, increase):
        assert self.active.all() and count % 8 == 0

    def branch(self, condition, yes, no):
        (side,) = np.unique(condition.value)
        (yes if side else no)()

    # Memory

    def global_address(self, ref):
        return super().global_address(ref.reshape(-1).view(np.uint8))

    def shared_address(self, ref):
        return self.constant(ref)

    def store_global(self, address, words):
        """To the output: what is written twice is the same."""
        where = self._bytes(address.memory, address.offset, 4 * len(words))
        octets = self._store(words)
        same = address.memory[where] == octets
        assert same[self.all.stored[where]].all(), "written twice"
        super().store_global(address, words)
        assert (address.memory[where] == octets).all(), "written twice at once"
        self.all.stored[where] = True

    def _bytes(self, memory, offset, size):
        return super()._bytes(memory, offset - SHARED if memory is self.shared else offset, size)

    # Who knows of whom

    def _words(self, address, offset, size):
        start = address.value.astype(np.int64) + offset
        return self._bytes(self.shared, start, size)[:, ::4] // 4

    def _reads(self, words):
        written = self.all.written[self.rank, words]
        assert written.all(), "read before it was written"
        known = written <= self.clock[self.all.writer[self.rank, words]]
        assert known.all(), "read without meeting the writer"
        self.all.read[self.rank, words, self.warp] = self.clock[self.number]

    def _writes(self, block, words):
        first = block * self.all.per_block
        readers = self.clock[first : first + self.all.per_block]
        known = self.all.written[block, words] <= self.clock[self.all.writer[block, words]]
        assert known.all(), "written without meeting the writer"
        met = self.all.read[block, words] <= readers
        assert met.all(), "written without meeting the readers"
        self.all.writer[block, words] = self.number
        self.all.written[block, words] = self.clock[self.number]

    def _arrive(self, barrier, count, expected=0):
        barrier.bring(self.clock)
        self.clock[self.number] += 1
        barrier.arrive(count, expected)

    def _pass(self, barrier, ready):
        self.warps.pause(ready)
        np.maximum(self.clock, barrier.known, out=self.clock)

    def load_shared(self, address, offset=0, *, count=1, kind=I32):
        self._reads(self._words(address, offset, 4 * count))
        return super().load_shared(address, offset, count=count, kind=kind)

    def store_shared_words(self, address, values, offset=0):
        self._writes(self.rank, self._words(address, offset, 4 * len(values)))
        super().store_shared_words(address, values, offset)

    def _copy(self, target, offset, source, source_offset, size, reads):
        self._writes(self.rank, self._words(target, offset, size))
        super()._copy(target, offset, source, source_offset, size, reads)

    # Threads that meet

    def sync_block(self, threads, barrier=1):
        if self.active.any():
            found = self._named(threads, barrier)
            phases = found.phases
            self._arrive(found, self.count)
            self._pass(found, lambda: found.phases > phases)

    def arrive_at_block(self, threads, barrier):
        if self.active.any():
            self._arrive(self._named(threads, barrier), self.count)
            self.warps.pause()

    def _named(self, threads, barrier):
        assert self.active.all(), "a part of a warp"
        (number,) = np.unique(unsigned(barrier))
        assert 0 < number < 16
        new = Meeting(threads, self.all.agents)
        found = self.all.barriers.setdefault((self.rank, int(number)), new)
        if found.arrivals != threads:  # others meet there now
            assert found.pending == found.arrivals, "threads that another number waits for"
            found.arrivals = found.pending = threads
        return found

    def arrive_at_cluster(self):
        assert self.active.all()
        self.before = self.all.meeting.phases
        self._arrive(self.all.meeting, self.count)
        self.warps.pause()

    def wait_for_cluster(self):
        self._pass(self.all.meeting, lambda: self.all.meeting.phases > self.before)

    def meet_cluster(self):
        self.arrive_at_cluster()
        self.wait_for_cluster()

    sync_cluster = meet_cluster

    # mbarriers

    def _acting(self, *registers):
        """The values of each thread that acts."""
        columns = [np.broadcast_to(signed(r), self.count)[self.active] for r in registers]
        return [tuple(map(int, values)) for values in zip(*columns, strict=True)]

    def _barrier(self, at, rank=None):
        assert at >= BARRIERS and at % 8 == 0
        key = self.rank if rank is None else rank, at
        assert key in self.all.barriers, "an mbarrier that nobody has made"
        return self.all.barriers[key]

    def init_barrier(self, barrier, arrivals):
        for (at,) in self._acting(barrier):
            assert (self.rank, at) not in self.all.barriers
            self.all.barriers[self.rank, at] = Meeting(arrivals, self.all.agents)

    def arrive(self, barrier):
        self.arrive_in_block(barrier, self.rank)

    def arrive_in_block(self, barrier, rank):
        for at, block in self._acting(barrier, rank):
            assert self.all.running[block], "arrives in a block that has ended"
            self._arrive(self._barrier(at, block), 1)
        self.warps.pause()

    def expect_bytes(self, barrier, count):
        for at, size in self._acting(barrier, count):
            self._arrive(self._barrier(at), 1, size)
        self.warps.pause()

    def wait(self, barrier, parity):
        for at, phase in set(self._acting(barrier, parity)):
            found = self._barrier(at)
            self._pass(found, lambda found=found, phase=phase: found.passes(phase))

    # Copies of the copy engine

    def _start(self, block, where, octets, at):
        """Of bytes to the places `where` of a block, which the barrier `at` counts there."""
        assert (where >= 0).all() and (where < self.shared.shape[1]).all(), "out of bounds"
        self._writes(block, where[::4] // 4)
        clock = self.clock.copy()

        def land():
            assert self.all.running[block], "a copy to a block that has ended"
            self.shared[block, where] = octets
            self._barrier(at, block).bring(clock)
            self._barrier(at, block).complete(octets.size)

        self.warps.copies.append(land)
        self.clock[self.number] += 1

    def copy_to_shared(self, target, source, count, barrier):
        starts = np.broadcast_to(source.offset, self.count)[self.active]
        for (to, at), start in zip(self._acting(target, barrier), starts, strict=True):
            assert not (start % 16 or to % 16 or count % 16), "misaligned"
            assert 0 <= start and start + count <= len(source.memory), "out of bounds"
            octets = source.memory[start : start + count]
            self._start(self.rank, to - SHARED + np.arange(count), octets, at)
        self.warps.pause()

    def tensor_map(self, context, ref, box):
        assert context == "context" and box[0] <= 256 and box[1] == 128
        return ref, box[0]

    def copy_tile_to_shared(self, target, descriptor, row, column, barrier, *, blocks=1):
        x, rows = descriptor
        for to, first, start, at in self._acting(target, row, column, barrier):
            assert to % 128 == 0 and first >= 0 and start >= 0
            tile = np.zeros((rows, 128), np.uint8)
            found = x[first : first + rows, start : start + 128].view(np.uint8)
            tile[: found.shape[0], : found.shape[1]] = found
            where = to + np.arange(tile.size)
            where = (where ^ (where >> 7 & 7) << 4) - SHARED  # the 128-byte swizzle
            for block in range(blocks) if blocks > 1 else [self.rank]:
                self._start(block, where, tile.reshape(-1), at)
        self.warps.pause()

    def address_in_block(self, address, rank):
        return address, rank

    def send_words(self, where, values, barrier, offset=0):
        (address, block), (there, to) = where, barrier
        assert block == to != self.rank or not self.active.any()
        words = self._store(values).reshape(-1, 16)
        for (at, signal), octets in zip(self._acting(address, there), words, strict=True):
            assert (at + offset) % 16 == 0, "misaligned"
            self._start(block, at + offset - SHARED + np.arange(16), octets, signal)
        self.warps.pause()

    # wgmma

    def wgmma_descriptor(self, address):
        return tensor_cores.wgmma_descriptor(address)

    def wgmma_fence(self, registers):
        return [Fenced(r.value) for r in registers]

    def wgmma_s8(self, acc, a, descriptor):
        """By the maps of the PTX ISA; each warp multiplies its 16 rows. B is read now and when it
        is waited for, and must not change."""
        assert self.active.all()
        assert all(isinstance(r, Fenced) for r in a), "wgmma reads registers that were not fenced"
        (low,) = np.unique(descriptor.value)
        out = [Pending() for _ in acc]
        halves = warpgroups.addresses(int(low), 2 * len(acc), False)
        where = (halves[:, None] + np.arange(2)[:, None]).reshape(32, -1) - SHARED
        assert where.min() >= 0 and where.max() < self.shared.shape[1], "out of bounds"
        self._reads(where[::4] // 4)
        b = self.shared[self.rank, where].view(np.int8)
        left = np.stack([r.value for r in a]).view(np.int8).reshape(2, 2, -1, 8, 4, 4)
        left = left.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 32).astype(np.float32)

        def multiply():
            now = self.shared[self.rank, where].view(np.int8)
            assert (b == now).all(), "x is overwritten while it is multiplied"
            self._reads(where[::4] // 4)
            found = (left @ b.astype(np.float32)).reshape(-1, 2, 8, len(acc) // 4, 4, 2)
            found = found.transpose(3, 1, 5, 0, 2, 4).reshape(len(acc), -1)
            words = found.astype(np.int32).view(np.uint32)
            for register, before, word in zip(out, acc, words, strict=True):
                register.value = before.value + word

        self.products.append((a, multiply))
        return out

    def wgmma_commit(self):
        self.committed = len(self.products)
        self.warps.pause()

    def wgmma_wait(self, acc, a):
        assert self.committed == len(self.products), "wgmma that was not committed"
        self.warps.pause()
        for fragments, multiply in self.products:
            assert {*fragments} <= {*a}, "registers that are not kept"
            multiply()
        self.products = []
        return [I32(r.value) for r in acc]


class Namespace(types.SimpleNamespace):
    """What takes the place of `ptx`: the twins of the agent that runs."""

    I32, F32, Address = I32, emulator.F32, emulator.Address

    def __init__(self, warps):
        super().__init__(warps=warps)

    def __getattr__(self, name):
        return getattr(self.warps.mine.gpu, name)


def launch(
    body,
    inputs,
    out,
    *,
    seed,
    blocks,
    warpgroups,
    shared_bytes,
    barriers=0,
    cluster=1,
    with_context=False,
    **_,
):
    """`intrinsics.launch`: arrays in, an array out that was full of NaN."""
    size = int(np.prod(out.shape)) * np.dtype(out.dtype).itemsize
    poison = np.full(-(-size // 4), POISON, np.uint32).view(np.uint8)[:size]
    found = poison.view(out.dtype).reshape(out.shape)
    refs = [*map(np.asarray, inputs), found, SHARED, *([BARRIERS] if barriers else [])]
    refs = ["context", *refs] if with_context else refs
    stored = np.zeros(size, bool)
    for index in range(blocks // cluster):
        everybody = Cluster(index, cluster, 128 * warpgroups, shared_bytes, seed, stored)
        with pytest.MonkeyPatch.context() as patch:
            for module in MODULES:
                patch.setattr(module, "ptx", Namespace(everybody.warps))
                for name in ("I32", "F32"):
                    if hasattr(module, name):
                        patch.setattr(module, name, getattr(Namespace, name))
            for rank, warp in itertools.product(range(cluster), range(4 * warpgroups)):
                agent = Agent(everybody, rank, warp, eager=bool(seed % 2))
                everybody.warps.start(rank, lambda agent=agent: agent.run(lambda: body(*refs)))
            everybody.warps.run()
        for (_, number), barrier in everybody.barriers.items():
            came = barrier.arrivals - barrier.pending
            assert number >= BARRIERS or not came, "arrivals that nobody waits for"
    return jnp.asarray(found)


def multiply(x, w, config, *, seed=0, **options):
    """The product by the kernel that takes this config."""
    module: Any = mosaic_mma if isinstance(config, MmaConfig) else mosaic_sm90
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intrinsics, "launch", lambda *a, **sizes: launch(*a, seed=seed, **sizes))
        return module.matmul(x, w, config=config, **options)
