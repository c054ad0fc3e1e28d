"""`emulator` for the matmul kernels, whose warps do different things: any order of warps.

Each warp, or warpgroup where it multiplies by wgmma, is a thread of Python with an `emulator.Gpu`
of its own, that runs the whole body. One runs at a time, which stops wherever it meets others, and
who goes on, and which copy of the copy engine lands, is drawn at random (test_w4a8_ring.py). A
cluster of blocks has its shared memory and barriers together; clusters come one after another.
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


class Cluster:
    """Blocks with shared memory, full of NaN, and barriers."""

    def __init__(self, index, blocks, threads, shared_bytes, seed):
        self.warps = Warps((seed, index))
        self.first_block, self.blocks, self.threads = index * blocks, blocks, threads
        words = np.full((blocks, shared_bytes // 4), POISON, np.uint32)
        self.shared = words.view(np.uint8)
        self.barriers: dict[tuple[int, int], Barrier] = {}  # by block, and address or number
        self.meeting = Barrier(blocks * threads)
        self.running = np.zeros(blocks, int)


class Agent(emulator.Gpu):
    """Some threads of a block, in lockstep. eager: whether what they copy lands at once."""

    def __init__(self, cluster: Cluster, rank: int, threads: range, eager: bool):
        self.all, self.warps, self.rank = cluster, cluster.warps, rank
        self.shared, self.eager = cluster.shared, eager
        self.count, self.threads = len(threads), cluster.threads
        self.block, self.index = np.full(self.count, rank), np.asarray(threads)
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

    def _bytes(self, memory, offset, size):
        return super()._bytes(memory, offset - SHARED if memory is self.shared else offset, size)

    # Threads that meet

    def sync_block(self, threads, barrier=1):
        self._meet(self._named(threads, barrier), bool(self.active.any()))

    def arrive_at_block(self, threads, barrier):
        if self.active.any():
            self._named(threads, barrier).arrive(int(self.active.sum()))
            self.warps.pause()

    def _named(self, threads, barrier):
        """Of those that act; nobody's where there are none."""
        self._whole_warps()
        numbers = np.unique(np.broadcast_to(unsigned(barrier), self.count)[self.active])
        if not numbers.size:
            return Barrier(threads)
        (number,) = numbers
        assert 0 < number < 16
        found = self.all.barriers.setdefault((self.rank, int(number)), Barrier(threads))
        if found.arrivals != threads:  # others meet there now
            assert found.pending == found.arrivals, "threads that another number waits for"
            found.arrivals = found.pending = threads
        return found

    def _meet(self, barrier, acts=True):
        if acts:
            phases = barrier.phases
            barrier.arrive(int(self.active.sum()))
            self.warps.pause(lambda: barrier.phases > phases)

    def arrive_at_cluster(self):
        assert self.active.all()
        self.before = self.all.meeting.phases
        self.all.meeting.arrive(self.count)
        self.warps.pause()

    def wait_for_cluster(self):
        self.warps.pause(lambda: self.all.meeting.phases > self.before)

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
        return self.all.barriers[self.rank if rank is None else rank, at]

    def init_barrier(self, barrier, arrivals):
        for (at,) in self._acting(barrier):
            assert (self.rank, at) not in self.all.barriers
            self.all.barriers[self.rank, at] = Barrier(arrivals)

    def arrive(self, barrier):
        self.arrive_in_block(barrier, self.rank)

    def arrive_in_block(self, barrier, rank):
        for at, block in self._acting(barrier, rank):
            self._barrier(at, block).arrive()
        self.warps.pause()

    def expect_bytes(self, barrier, count):
        for at, size in self._acting(barrier, count):
            self._barrier(at).arrive(expected=size)
        self.warps.pause()

    def wait(self, barrier, parity):
        for at, phase in set(self._acting(barrier, parity)):
            self.warps.pause(lambda at=at, phase=phase: self._barrier(at).passes(phase))

    # Copies of the copy engine

    def _start(self, block, where, octets, at):
        """Of bytes to the places `where` of a block, which the barrier `at` counts there."""
        assert (where >= 0).all() and (where < self.shared.shape[1]).all(), "out of bounds"

        def land():
            assert self.all.running[block], "a copy to a block that has ended"
            self.shared[block, where] = octets
            self._barrier(at, block).complete(octets.size)

        self.warps.copies.append(land)

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
        """By the maps of the PTX ISA. B is read now and when it is waited for, and must not
        change."""
        assert self.active.all() and self.count == 128
        assert all(isinstance(r, Fenced) for r in a), "wgmma reads registers that were not fenced"
        (low,) = np.unique(descriptor.value)
        out = [Pending() for _ in acc]
        halves = warpgroups.addresses(int(low), 2 * len(acc), False)
        where = (halves[:, None] + np.arange(2)[:, None]).reshape(32, -1) - SHARED
        assert where.min() >= 0 and where.max() < self.shared.shape[1], "out of bounds"
        b = self.shared[self.rank, where].view(np.int8)
        left = np.stack([r.value for r in a]).view(np.int8).reshape(2, 2, 4, 8, 4, 4)
        left = left.transpose(2, 1, 3, 0, 4, 5).reshape(64, 32).astype(np.float32)

        def multiply():
            now = self.shared[self.rank, where].view(np.int8)
            assert (b == now).all(), "x is overwritten while it is multiplied"
            found = (left @ b.astype(np.float32)).reshape(4, 2, 8, -1, 4, 2)
            found = found.transpose(3, 1, 5, 0, 2, 4).reshape(len(acc), 128)
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
    warps = [range(32 * i, 32 * i + 32) for i in range(4 * warpgroups)]
    if with_context:  # those that multiply
        warps[4:] = [range(128 * i, 128 * i + 128) for i in range(1, warpgroups)]
    for index in range(blocks // cluster):
        everybody = Cluster(index, cluster, 128 * warpgroups, shared_bytes, seed)
        with pytest.MonkeyPatch.context() as patch:
            for module in MODULES:
                patch.setattr(module, "ptx", Namespace(everybody.warps))
                for name in ("I32", "F32"):
                    if hasattr(module, name):
                        patch.setattr(module, name, getattr(Namespace, name))
            for rank, threads in itertools.product(range(cluster), warps):
                agent = Agent(everybody, rank, threads, eager=bool(seed % 2))
                everybody.running[rank] += 1
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
