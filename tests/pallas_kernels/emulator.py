"""A GPU in numpy: twins of the intrinsics, that run a whole grid of a kernel's body in lockstep.

A register is an array of one number per thread of the grid, so that a statement of the body runs
for all of them at once; `when` and `loop` say by masks who takes part. Memory is bytes: each
operand and output an array of its own, out of whose bounds no active thread may read or write, and
shared memory one array per block, full of NaN at the start. Copies land as soon as they are asked
for (`eager`: what is overwritten too early is found) or as late as they may (what is read too early
is found). Warps of a block move together, so no race between them shows: see meetings.py.
"""

import contextlib
import dataclasses
import types
from typing import Any

import jax.numpy as jnp
import numpy as np

from qserve_jax.pallas_kernels.paged_attention import (
    decode_codes,
    decode_merge,
    decode_page,
    decode_query,
    decode_thread,
    mosaic_decode,
    mosaic_mma,
    mosaic_sm90,
)

MODULES = (
    *(decode_codes, decode_merge, decode_page, decode_query, decode_thread),
    *(mosaic_decode, mosaic_mma, mosaic_sm90),
)
POISON = 0x7FC07FC0  # NaN as f32, bf16 (twice) and, as 0x7FC0, f16


def unsigned(value: Any) -> Any:
    if isinstance(value, Register):
        return value.value
    return np.uint32(int(value) & 0xFFFFFFFF)


def signed(value: Any) -> Any:
    return np.asarray(unsigned(value)).view(np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Register:
    value: Any


def _operator(op):
    def apply(self, other):
        with np.errstate(over="ignore"):
            return I32(np.asarray(op(self.value, unsigned(other)), np.uint32))

    return apply


class I32(Register):
    __add__ = __radd__ = _operator(np.add)
    __mul__ = __rmul__ = _operator(np.multiply)
    __and__ = __rand__ = _operator(np.bitwise_and)
    __or__ = __ror__ = _operator(np.bitwise_or)
    __xor__ = __rxor__ = _operator(np.bitwise_xor)
    __sub__ = _operator(np.subtract)
    __rsub__ = _operator(lambda a, b: np.subtract(b, a))
    __floordiv__ = _operator(np.floor_divide)
    __mod__ = _operator(np.remainder)
    __lshift__ = _operator(np.left_shift)
    __rshift__ = _operator(np.right_shift)

    def __lt__(self, other):
        return Predicate(signed(self) < signed(other))

    def __gt__(self, other):
        return Predicate(signed(self) > signed(other))

    def is_(self, other):
        return Predicate(self.value == unsigned(other))


class Predicate(Register):
    def __and__(self, other):
        return Predicate(self.value & other.value)

    def __invert__(self):
        return Predicate(~self.value)


def _float_operator(op):
    def apply(self, other):
        with np.errstate(all="ignore"):
            return F32(op(self.value, other.value))

    return apply


class F32(Register):
    __add__ = _float_operator(np.add)
    __sub__ = _float_operator(np.subtract)
    __mul__ = _float_operator(np.multiply)

    def __gt__(self, other):
        return Predicate(self.value > other.value)


@dataclasses.dataclass(frozen=True)
class Address:
    memory: np.ndarray  # bytes
    offset: Any  # int64 per thread

    def advance(self, index, stride):
        return Address(self.memory, self.offset + unsigned(index).astype(np.int64) * stride)


def fused(a, b, c, dtype):
    """a * b + c rounded once: exact enough in float64 for f16 and f32."""
    with np.errstate(all="ignore"):
        return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(dtype)


HALVES = {"float16": np.float16, "bfloat16": jnp.bfloat16}


def as_halves(word: I32, dtype: str) -> np.ndarray:
    """[threads, 2], low first."""
    return np.ascontiguousarray(word.value).view(np.uint16).reshape(-1, 2).view(HALVES[dtype])


def from_halves(halves: np.ndarray) -> I32:
    return I32(np.ascontiguousarray(halves).view(np.uint16).view(np.uint32).reshape(-1))


class Gpu:
    """The intrinsics; `module` has their names, for monkeypatching `ptx`."""

    def __init__(self, blocks: int, threads: int, cluster: int, shared_bytes: int, eager: bool):
        self.count, self.threads, self.cluster = blocks * threads, threads, cluster
        self.eager = eager
        self.block = np.arange(self.count) // threads
        self.index = np.arange(self.count) % threads
        self.shared = np.full((blocks, shared_bytes // 4), POISON, np.uint32).view(np.uint8)
        self.active = np.ones(self.count, bool)
        self.barriers: dict[tuple[int, int], list[int]] = {}  # arrivals, pending, bytes, phases
        self.bulk: list[Any] = []  # copies under way: (block, barrier, bytes, land)
        self.groups: list[list[Any]] = []  # of cp.async, oldest first; the last is open
        self.open: list[Any] = []
        names = [name for name in dir(self) if not name.startswith("_")]
        self.module = types.SimpleNamespace(**{n: getattr(self, n) for n in names})
        self.module.I32, self.module.F32, self.module.Address = I32, F32, Address

    # Registers

    def constant(self, value):
        return I32(np.full(self.count, unsigned(value), np.uint32))

    def constant_float(self, value):
        return F32(np.full(self.count, value, np.float32))

    def select(self, condition, yes, no):
        return I32(np.where(condition.value, unsigned(yes), unsigned(no)))

    def select_float(self, condition, yes, no):
        return F32(np.where(condition.value, yes.value, no.value))

    def minimum(self, a, b):
        return I32(np.minimum(signed(a), signed(b)).view(np.uint32))

    def maximum(self, a, b):
        return I32(np.maximum(signed(a), signed(b)).view(np.uint32))

    def float_maximum(self, a, b):
        return F32(np.maximum(a.value, b.value))

    def multiply_add(self, a, b, c):
        return F32(fused(a.value, b.value, c.value, np.float32))

    def exp2(self, x):
        with np.errstate(all="ignore"):
            return F32(np.exp2(x.value))

    def reciprocal(self, x):
        with np.errstate(all="ignore"):
            return F32(np.float32(1) / x.value)

    def to_float(self, value):
        return F32(signed(value).astype(np.float32))

    def float_bits(self, x):
        return I32(np.ascontiguousarray(x.value).view(np.uint32))

    def opaque(self, word):
        return word

    # Packed

    def words_of(self, values, dtype):
        if dtype == "float32":
            return [self.float_bits(v) for v in values]
        pairs = zip(values[::2], values[1::2], strict=True)
        with np.errstate(all="ignore"):
            return [
                from_halves(np.stack([a.value, b.value], -1).astype(HALVES[dtype]))
                for a, b in pairs
            ]

    def pack_halves(self, low, high, dtype):
        return self.words_of([low, high], dtype)[0]

    def floats_of(self, words, dtype):
        if dtype == "float32":
            return [F32(w.value.view(np.float32)) for w in words]
        return [value for w in words for value in self.unpack_halves(w, dtype)]

    def unpack_halves(self, word, dtype):
        halves = as_halves(word, dtype).astype(np.float32)
        return F32(halves[:, 0]), F32(halves[:, 1])

    def add_halves(self, a, b):
        with np.errstate(all="ignore"):
            return from_halves(as_halves(a, "float16") + as_halves(b, "float16"))

    def multiply_add_halves(self, a, b, c):
        a, b, c = (as_halves(x, "float16") for x in (a, b, c))
        return from_halves(fused(a, b, c, np.float16))

    def masked_or(self, word, mask, bits):
        return (word & mask) | bits

    def pick_bytes(self, a, b, selector):
        octets = np.stack([x.value for x in (a, b)], -1).view(np.uint8)  # [threads, 8]
        picked = [octets[:, selector >> 4 * i & 15] for i in range(4)]
        return I32(np.ascontiguousarray(np.stack(picked, -1)).view(np.uint32).reshape(-1))

    # Warps

    def thread_index(self):
        return I32(self.index.astype(np.uint32))

    def warp_index(self):
        return I32((self.index // 32).astype(np.uint32))

    def block_index(self):
        return I32(self.block.astype(np.uint32))

    def cluster_rank(self):
        return I32((self.block % self.cluster).astype(np.uint32))

    def _warps(self, value):
        self._whole_warps()
        return np.broadcast_to(value, self.count).reshape(-1, 32)

    def _whole_warps(self):
        """What the threads of a warp do together, all of them must."""
        active = self.active.reshape(-1, 32)
        assert (active.any(1) == active.all(1)).all(), "a part of a warp"

    def exchange(self, value, lanes):
        return type(value)(self._warps(value.value)[:, np.arange(32) ^ lanes].reshape(-1))

    def value_of_lane(self, value, lane):
        lanes = self._warps(unsigned(lane)) % 32
        found = np.take_along_axis(self._warps(value.value), lanes.astype(int), 1)
        return type(value)(found.reshape(-1))

    def any_lane(self, condition):
        any_ = self._warps(condition.value).any(1, keepdims=True)
        return Predicate(np.broadcast_to(any_, (len(any_), 32)).reshape(-1))

    def transpose_halves(self, word):
        """movmatrix: lane l holds row l // 4, columns 2 (l % 4) and the next."""
        halves = np.ascontiguousarray(self._warps(word.value)).view(np.uint16).reshape(-1, 8, 8)
        return from_halves(halves.transpose(0, 2, 1))

    def mma_halves(self, acc, a, b, dtype):
        """By the maps of the PTX ISA for m16n8k16."""
        lanes = np.arange(32)
        g, c = lanes // 4, lanes % 4
        matrix_a = np.zeros((self.count // 32, 16, 16), np.float32)
        matrix_b = np.zeros((self.count // 32, 16, 8), np.float32)
        for half in range(2):
            for i, word in enumerate(a):
                values = as_halves(word, dtype)[:, half].reshape(-1, 32)
                matrix_a[:, g + 8 * (i % 2), 2 * c + 8 * (i // 2) + half] = values
            for i, word in enumerate(b):
                values = as_halves(word, dtype)[:, half].reshape(-1, 32)
                matrix_b[:, 2 * c + 8 * i + half, g] = values
        self._whole_warps()
        with np.errstate(all="ignore"):
            product = matrix_a @ matrix_b
        return [
            F32(r.value + product[:, g + 8 * (i // 2), 2 * c + i % 2].reshape(-1))
            for i, r in enumerate(acc)
        ]

    def load_matrix(self, address, offset=0):
        """ldmatrix: lane l names row l % 8 of matrix l // 8, and gets word l % 4 of row l // 4 of
        each."""
        self._whole_warps()
        rows = self.load_shared(address, offset, count=4)
        matrices = np.stack([w.value for w in rows], -1).reshape(-1, 4, 32)
        return [I32(np.ascontiguousarray(matrices[:, i]).reshape(-1)) for i in range(4)]

    def mma_s8(self, acc, a, b):
        """By the maps of the PTX ISA for m16n8k32; float32 holds such sums exactly."""
        self._whole_warps()
        left = np.stack([w.value for w in a]).view(np.int8).reshape(2, 2, -1, 8, 4, 4)
        right = np.stack([w.value for w in b]).view(np.int8).reshape(2, -1, 8, 4, 4)
        left = left.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 32)  # [row half, g], [k half, c, i]
        right = right.transpose(1, 0, 3, 4, 2).reshape(-1, 32, 8)
        product = left.astype(np.float32) @ right.astype(np.float32)
        product = product.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
        words = product.astype(np.int32).view(np.uint32)
        return [r + I32(word) for r, word in zip(acc, words, strict=True)]

    # Control

    @contextlib.contextmanager
    def when(self, condition):
        before = self.active
        self.active = before & condition.value
        yield
        self.active = before

    def branch_values(self, condition, kept, changed):
        with self.when(condition):
            found = changed() if self.active.any() else kept
        pairs = zip(found, kept, strict=True)
        return [type(k)(np.where(condition.value, f.value, k.value)) for f, k in pairs]

    def loop(self, count, carry, body):
        before = self.active
        for i in range(int(signed(count)[before].max(initial=0))):
            runs = Predicate(before & (i < signed(count)))
            self.active = runs.value
            after = body(self.constant(i), list(carry))
            pairs = zip(after, carry, strict=True)
            carry = [type(o)(np.where(runs.value, n.value, o.value)) for n, o in pairs]
        self.active = before
        return carry

    def sync_warp(self):
        self._whole_warps()

    def sync_block(self, threads, barrier=1):
        assert self.active.all() and threads == self.threads

    def sync_cluster(self):
        assert self.active.all()

    meet_cluster = sync_cluster

    # Memory

    def global_address(self, ref):
        return Address(ref, np.zeros(self.count, np.int64))

    def shared_address(self, ref):
        return self.constant(ref)  # "shared": 0, "barriers": beyond it

    def _bytes(self, memory, offset, size):
        """Indices [active threads, size] of aligned bytes within `memory`."""
        start = np.broadcast_to(offset, self.count)[self.active]
        assert not (start % min(size, 16)).any(), "misaligned"
        inside = (start >= 0) & (start + size <= memory.shape[-1])
        assert inside.all(), "out of bounds"
        return start[:, None] + np.arange(size)

    def _loaded(self, octets, count, kind):
        words = np.full((self.count, count), POISON, np.uint32)
        words[self.active] = np.ascontiguousarray(octets).view(np.uint32)
        dtype = np.float32 if kind is F32 else np.uint32
        return [kind(np.ascontiguousarray(words[:, i]).view(dtype)) for i in range(count)]

    def load_global(self, address, *, count=1, kind=I32):
        where = self._bytes(address.memory, address.offset, 4 * count)
        return self._loaded(address.memory[where], count, kind)

    def load_words(self, source, size):
        return [
            w for i in range(0, size, 16) for w in self.load_global(source.advance(i, 1), count=4)
        ]

    def load_shared(self, address, offset=0, *, count=1, kind=I32):
        where = self._bytes(self.shared, address.value.astype(np.int64) + offset, 4 * count)
        return self._loaded(self.shared[self.block[self.active, None], where], count, kind)

    def _store(self, words):
        return np.stack([w.value for w in words], -1)[self.active].view(np.uint8)

    def store_shared_words(self, address, values, offset=0):
        where = self._bytes(self.shared, address.value.astype(np.int64) + offset, 4 * len(values))
        self.shared[self.block[self.active, None], where] = self._store(values)

    def store_shared(self, address, value, offset=0):
        word = self.float_bits(value) if isinstance(value, F32) else value
        self.store_shared_words(address, [word], offset)

    def store_words(self, target, words):
        for i, word in enumerate(words):
            self.store_global(target.advance(self.constant(i), 4), [word])

    def store_global(self, address, words):
        where = self._bytes(address.memory, address.offset, 4 * len(words))
        address.memory[where] = self._store(words)

    def address_in_block(self, address, rank):
        block = self.block // self.cluster * self.cluster + rank
        return address, block

    def load_cluster(self, where, offset=0, *, count=1):
        address, block = where
        octets = self._bytes(self.shared, address.value.astype(np.int64) + offset, 4 * count)
        return self._loaded(self.shared[block[self.active, None], octets], count, F32)

    # Copies by the threads. Groups are those of the whole grid: all threads commit and wait.

    def copy_16_bytes(self, target, source, *, offset=0, source_offset=0, filled=16):
        reads = np.broadcast_to(unsigned(filled), self.count) > 0
        self._copy(target, offset, source, source_offset, 16, reads)

    def copy_4_bytes(self, target, source):
        self._copy(target, 0, source, 0, 4, np.ones(self.count, bool))

    def _copy(self, target, offset, source, source_offset, size, reads):
        """Zeros where it does not read."""
        to = self._bytes(self.shared, target.value.astype(np.int64) + offset, size)
        octets, block = np.zeros(to.shape, np.uint8), self.block[self.active, None]
        with self.when(Predicate(reads)):
            at = self._bytes(source.memory, source.offset + source_offset, size)
        octets[reads[self.active]] = source.memory[at]

        def land():
            self.shared[block, to] = octets

        self.open.append(land)
        if self.eager:
            land()

    def commit_copies(self):
        self.groups.append(self.open)
        self.open = []

    def wait_copies(self, pending):
        while len(self.groups) > pending:
            for land in self.groups.pop(0):
                if not self.eager:
                    land()

    def wait_all_copies(self):
        self.commit_copies()
        self.wait_copies(0)

    # mbarriers and bulk copies, thread by thread

    def _each(self, barrier):
        for thread in np.flatnonzero(self.active):
            yield thread, (int(self.block[thread]), int(barrier.value[thread]))

    def init_barrier(self, barrier, arrivals):
        for _, key in self._each(barrier):
            assert key not in self.barriers
            self.barriers[key] = [arrivals, arrivals, 0, 0]

    def publish_barriers(self):
        pass

    def fence_reads(self):
        pass

    def _change(self, key, arrivals=0, count=0):
        state = self.barriers[key]
        state[1] -= arrivals
        state[2] += count
        assert state[1] >= 0, "more arrivals than the barrier was made for"
        if state[1] == 0 and state[2] == 0:
            state[1], state[3] = state[0], state[3] + 1

    def arrive(self, barrier):
        for _, key in self._each(barrier):
            self._change(key, arrivals=1)

    def expect_bytes(self, barrier, count):
        for _, key in self._each(barrier):
            self._change(key, arrivals=1, count=count)

    def copy_to_shared(self, target, source, count, barrier):
        for thread, key in self._each(barrier):
            block, to, start = self.block[thread], int(target.value[thread]), source.offset[thread]
            assert 0 <= start and start + count <= len(source.memory), "out of bounds"
            octets = source.memory[start : start + count].copy()

            def land(block=block, to=to, octets=octets, key=key):
                self.shared[block, to : to + count] = octets
                self._change(key, count=-count)

            if self.eager:
                land()
            else:
                self.bulk.append((key, land))

    def finish(self):
        assert not self.bulk, "a copy that no one waited for"

    def wait(self, barrier, parity):
        keys = {(key, int(parity.value[thread])) for thread, key in self._each(barrier)}
        landing = [entry for entry in self.bulk if entry[0] in {key for key, _ in keys}]
        for entry in landing:  # only what is waited for
            self.bulk.remove(entry)
            entry[1]()
        for key, phase in keys:
            assert self.barriers[key][3] % 2 != phase, "waits for ever"


def launch(
    monkeypatch,
    body,
    inputs,
    out,
    *,
    eager,
    blocks,
    cluster,
    warpgroups,
    shared_bytes,
    barriers,
    **_,
):
    """`intrinsics.launch` on the emulated GPU: arrays in, an array out that was full of NaN."""
    gpu = Gpu(blocks, 128 * warpgroups, cluster, shared_bytes, eager)
    size = int(np.prod(out.shape)) * out.dtype.itemsize
    poison = np.full(-(-size // 4), POISON, np.uint32).view(np.uint8)[:size].copy()
    refs = [np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in inputs]
    with monkeypatch.context() as patch:
        for module in MODULES:
            if hasattr(module, "ptx"):
                patch.setattr(module, "ptx", gpu.module)
            for name, twin in (("F32", F32), ("I32", I32)):
                if hasattr(module, name):
                    patch.setattr(module, name, twin)
        body(*refs, poison, 0, *([shared_bytes] if barriers else []))
    gpu.finish()
    return jnp.asarray(poison.view(out.dtype).reshape(out.shape))
