"""Numpy twins of the intrinsics: a kernel's own code, all its threads in lockstep.

A register is an array with an element per thread. A branch runs both ways under masks, and a loop's
count must be the same in all threads. Every access is checked: alignment, bounds, memory that
nobody has written, two threads that write different words to one place, and shared memory that
threads pass on to each other without meeting in between.
"""

import contextlib
import types

import jax.numpy as jnp
import numpy as np


class Twin:
    """A register with the values of all threads."""

    def __init__(self, values):
        self.values = np.asarray(values)


def _values(x):
    """uint32 of a register or number."""
    return x.values if isinstance(x, Twin) else np.uint32(int(x) & 0xFFFFFFFF)


class Predicate(Twin):
    def __and__(self, other):
        return Predicate(self.values & other.values)

    def __invert__(self):
        return Predicate(~self.values)


class I32(Twin):
    def is_(self, other):
        return Predicate(self.values == _values(other))

    def __lt__(self, other):
        return Predicate(self.values.view(np.int32) < np.int32(_values(other).view(np.int32)))

    def __gt__(self, other):
        return Predicate(self.values.view(np.int32) > np.int32(_values(other).view(np.int32)))


def _integer(op, swap=False):
    def apply(self, other):
        a, b = _values(self), _values(other)
        return I32(np.asarray(op(*((b, a) if swap else (a, b))), np.uint32))

    return apply


for _name, _op in {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "floordiv": np.floor_divide,
    "mod": np.remainder,
    "lshift": np.left_shift,
    "rshift": np.right_shift,
}.items():
    setattr(I32, f"__{_name}__", _integer(_op))
    if _name in ("add", "sub", "mul", "and", "or", "xor"):
        setattr(I32, f"__r{_name}__", _integer(_op, swap=True))


def _float(op):
    def apply(self, other):
        with np.errstate(all="ignore"):
            return F32(op(self.values, other.values))

    return apply


class F32(Twin):
    __add__, __sub__ = _float(np.add), _float(np.subtract)
    __mul__, __truediv__ = _float(np.multiply), _float(np.divide)

    def __gt__(self, other):
        return Predicate(self.values > other.values)


def _halves(word):
    """f16[threads, 2], low first."""
    return np.ascontiguousarray(word.values).view(np.float16).reshape(-1, 2)


def _word(halves):
    return I32(np.ascontiguousarray(halves).view(np.uint32).reshape(-1))


class Memory:
    """Bytes that threads share. `fixed`: a word is written once (or again with the same value)."""

    def __init__(self, data, *, filled=True, fixed=True):
        data = np.ascontiguousarray(data)
        self.words = np.frombuffer(bytearray(data.tobytes()), np.uint32)
        self.dtype, self.shape, self.fixed = data.dtype, data.shape, fixed
        self.filled = np.full(len(self.words), filled)
        self.changed = np.zeros(len(self.words), bool)
        # Of each word, who wrote and read it last, and after how many meetings of the block.
        self.writer, self.written, self.reader, self.read = np.full((4, len(self.words)), -1)

    def array(self):
        return np.frombuffer(self.words.tobytes(), self.dtype).reshape(self.shape)


class Address:
    def __init__(self, memory, offset):
        self.memory, self.offset = memory, offset

    def advance(self, index, stride):
        return Address(self.memory, self.offset + _values(index).astype(np.int64) * stride)


class Machine:
    """`ptx` for the threads of some blocks: indices of them, each of `threads` threads."""

    def __init__(self, blocks, threads, shared_bytes=0):
        self.block = np.repeat(np.asarray(blocks, np.uint32), threads)
        self.thread = np.tile(np.arange(threads, dtype=np.uint32), len(blocks))
        self.mask = np.ones(len(self.thread), bool)
        self.shared = Memory(np.zeros(shared_bytes, np.uint8), filled=False, fixed=False)
        self.meetings = 0

    def namespace(self):
        """What takes the place of `intrinsics` in a kernel's file."""
        own = (name for name in dir(self) if not name.startswith("_"))
        found = types.SimpleNamespace(**{name: getattr(self, name) for name in own})
        found.I32, found.F32, found.Address, found.Predicate = I32, F32, Address, Predicate
        return found

    # Threads

    def block_index(self):
        return I32(self.block)

    def thread_index(self):
        return I32(self.thread)

    def warp_index(self):
        return I32(self.thread // 32)

    def exchange(self, value, lanes):
        self._whole_warps()
        return type(value)(value.values[np.arange(len(self.thread)) ^ lanes])

    def any_lane(self, condition):
        self._whole_warps()
        return Predicate(condition.values.reshape(-1, 32).any(1).repeat(32))

    def sync_block(self, threads, barrier=1):
        assert self.mask.all() and threads == self.thread.max() + 1
        self.meetings += 1

    def _whole_warps(self):
        warps = self.mask.reshape(-1, 32)
        assert (warps.all(1) | ~warps.any(1)).all(), "half a warp at a convergent instruction"

    @contextlib.contextmanager
    def when(self, condition):
        before = self.mask
        self.mask = before & condition.values
        yield
        self.mask = before

    def branch(self, condition, yes, no):
        for side, body in ((condition, yes), (~condition, no)):
            with self.when(side):
                if self.mask.any():
                    body()

    def branch_values(self, condition, kept, changed):
        with self.when(condition):
            found = changed() if self.mask.any() else kept
        pairs = zip(found, kept, strict=True)
        return [type(k)(np.where(condition.values, f.values, k.values)) for f, k in pairs]

    def loop(self, count, carry, body):
        counts = np.unique(np.broadcast_to(count.values, self.mask.shape)[self.mask])
        assert len(counts) == 1, "threads that loop differently often"
        for i in range(int(counts[0].astype(np.int32))):
            carry = body(self.constant(i), carry)
        return carry

    # Matrices, by the maps of the PTX ISA. g = lane // 4, c = lane % 4.

    def load_matrix(self, address, offset=0, *, transposed=False):
        """Lane l names row l % 8 of matrix l // 8, and gets a word of each."""
        self._whole_warps()
        rows = self.load_shared(address, offset, count=4)
        rows = np.stack([word.values for word in rows], -1).view(np.uint16)
        matrices = rows.reshape(-1, 4, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        lanes = np.arange(32)
        pairs = matrices.reshape(-1, 4, 8, 4, 2)[:, :, lanes // 4, lanes % 4]
        return [_word(pairs[:, i].reshape(-1, 2)) for i in range(4)]

    def mma_halves(self, acc, a, b, dtype):
        assert dtype == "float16"
        self._whole_warps()
        lanes = np.arange(32)
        g, c = lanes // 4, lanes % 4
        left = np.zeros((len(self.thread) // 32, 16, 16), np.float32)
        right = np.zeros((len(self.thread) // 32, 16, 8), np.float32)
        for half in range(2):
            for i, word in enumerate(a):
                values = _halves(word)[:, half].reshape(-1, 32)
                left[:, g + 8 * (i % 2), 2 * c + 8 * (i // 2) + half] = values
            for i, word in enumerate(b):
                right[:, 2 * c + 8 * i + half, g] = _halves(word)[:, half].reshape(-1, 32)
        with np.errstate(all="ignore"):
            product = left @ right
        at = [product[:, g + 8 * (i // 2), 2 * c + i % 2].reshape(-1) for i in range(4)]
        return [F32(r.values + x) for r, x in zip(acc, at, strict=True)]

    # Registers

    def constant(self, value):
        return I32(np.full(len(self.thread), value & 0xFFFFFFFF, np.uint32))

    def constant_float(self, value):
        return F32(np.full(len(self.thread), value, np.float32))

    def select(self, condition, yes, no):
        return I32(np.where(condition.values, _values(yes), _values(no)))

    def select_float(self, condition, yes, no):
        return F32(np.where(condition.values, yes.values, no.values))

    def minimum(self, a, b):
        a, b = (np.asarray(_values(x)).view(np.int32) for x in (a, b))
        return I32(np.minimum(a, b).view(np.uint32))

    def maximum(self, a, b):
        a, b = (np.asarray(_values(x)).view(np.int32) for x in (a, b))
        return I32(np.maximum(a, b).view(np.uint32))

    def float_minimum(self, a, b):
        return F32(np.minimum(a.values, b.values))

    def float_maximum(self, a, b):
        return F32(np.maximum(a.values, b.values))

    def multiply_add(self, a, b, c):
        with np.errstate(all="ignore"):
            exact = a.values.astype(np.float64) * b.values + c.values
            return F32(exact.astype(np.float32))

    def float_bits(self, x):
        return I32(x.values.view(np.uint32))

    def bits_float(self, x):
        return F32(x.values.view(np.float32))

    def to_float(self, x):
        return F32(x.values.view(np.int32).astype(np.float32))

    def exp2(self, x):
        with np.errstate(all="ignore"):
            found = np.exp2(x.values.astype(np.float64)).astype(np.float32)
        return F32(np.where(found < 2.0**-126, np.float32(0), found))

    def reciprocal(self, x):
        return F32(np.float32(1) / x.values)

    def opaque(self, word):
        return word

    # Halves and bytes

    def pack_halves(self, low, high, dtype):
        with np.errstate(over="ignore"):
            parts = [x.values.astype(jnp.dtype(dtype)).view(np.uint16) for x in (low, high)]
        low, high = (part.astype(np.uint32) for part in parts)
        return I32(low | high << 16)

    def unpack_halves(self, word, dtype):
        halves = word.values.view(np.uint16).view(jnp.dtype(dtype)).astype(np.float32)
        return F32(halves[::2].copy()), F32(halves[1::2].copy())

    def low_bytes(self, a, b, c, d):
        low = [x.values & 0xFF for x in (a, b, c, d)]
        return I32(low[0] | low[1] << 8 | low[2] << 16 | low[3] << 24)

    def masked_or(self, word, mask, bits):
        return (word & mask) | bits

    def pick_bytes(self, a, b, selector):
        octets = np.stack([a.values, b.values], -1).view(np.uint8)  # [threads, 8]
        picked = [octets[:, selector >> 4 * i & 15] for i in range(4)]
        return I32(np.ascontiguousarray(np.stack(picked, -1)).view(np.uint32).reshape(-1))

    def add_halves(self, a, b):
        with np.errstate(all="ignore"):
            return _word(_halves(a) + _halves(b))

    def multiply_add_halves(self, a, b, c):
        """Exact in float64, and so rounded once."""
        a, b, c = (_halves(x).astype(np.float64) for x in (a, b, c))
        with np.errstate(all="ignore"):
            return _word((a * b + c).astype(np.float16))

    def floats_of(self, words, dtype):
        if dtype == "float32":
            return [self.bits_float(w) for w in words]
        return [x for w in words for x in self.unpack_halves(w, dtype)]

    def words_of(self, values, dtype):
        if dtype == "float32":
            return [self.float_bits(v) for v in values]
        pairs = zip(values[::2], values[1::2], strict=True)
        return [self.pack_halves(low, high, dtype) for low, high in pairs]

    # Memory

    def global_address(self, memory):
        return Address(memory, np.zeros(len(self.thread), np.int64))

    def load_global(self, address, *, count=1, kind=I32):
        return self._load(address, count, kind)

    def store_global(self, address, values):
        self._store(address, values)

    def load_words(self, source, size):
        parts = (self.load_global(source.advance(i, 16), count=4) for i in range(size // 16))
        return [word for part in parts for word in part]

    def store_words(self, target, words):
        size = next(size for size in (4, 2, 1) if len(words) % size == 0)
        for i in range(0, len(words), size):
            self.store_global(target.advance(i, 4), words[i : i + size])

    def load_shared(self, address, offset=0, *, count=1, kind=I32):
        return self._load(self._shared(address, offset), count, kind)

    def store_shared(self, address, value, offset=0):
        self._store(self._shared(address, offset), [value])

    def store_shared_words(self, address, values, offset=0):
        self._store(self._shared(address, offset), values)

    def shared_address(self, ref):
        return self.constant(0)

    def _shared(self, address, offset):
        return Address(self.shared, address.values.astype(np.int64) + offset)

    def _place(self, address, count):
        """Indices of the first words, of the threads that act, and those threads."""
        threads = np.flatnonzero(self.mask)
        at = np.broadcast_to(address.offset, self.mask.shape)[threads]
        assert not (at % (4 * count)).any(), "misaligned"
        first = at // 4
        assert ((first >= 0) & (first + count <= len(address.memory.words))).all(), "out of bounds"
        return first, threads

    def _load(self, address, count, kind):
        memory, (first, threads) = address.memory, self._place(address, count)
        found = []
        for i in range(count):
            at = first + i
            assert memory.filled[at].all(), "read before it was written"
            if memory is self.shared:
                passed = (memory.written[at] == self.meetings) & (memory.writer[at] != threads)
                assert not passed.any(), "read without meeting the writer"
                again = (memory.read[at] == self.meetings) & (memory.reader[at] != threads)
                memory.reader[at] = np.where(again, len(self.thread), threads)  # several
                memory.read[at] = self.meetings
            word = np.zeros(len(self.mask), np.uint32)
            word[threads] = memory.words[at]
            found.append(I32(word) if kind is I32 else F32(word.view(np.float32)))
        return found

    def _store(self, address, values):
        memory, (first, threads) = address.memory, self._place(address, len(values))
        for i, value in enumerate(values):
            at = first + i
            words = np.broadcast_to(value.values, self.mask.shape)[threads].view(np.uint32)
            if memory.fixed:
                again = memory.changed[at]
                assert (memory.words[at][again] == words[again]).all(), "written twice"
            else:
                for when, who in ((memory.read, memory.reader), (memory.written, memory.writer)):
                    passed = (when[at] == self.meetings) & (who[at] != threads)
                    assert not passed.any(), "written without meeting who read or wrote before"
            memory.words[at] = words
            assert (memory.words[at] == words).all(), "two threads write different words"
            memory.filled[at] = memory.changed[at] = True
            memory.written[at], memory.writer[at] = self.meetings, threads
