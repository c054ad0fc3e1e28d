"""The wgmma kernel's ring of copies, emulated: its own code, with warps in any order.

Producer and consumers run as on the GPU, but for the multiplication: each warp (or warpgroup that
multiplies) is a thread of Python, of which one runs at a time, and which stops wherever the kernel
touches a barrier or shared memory. Who goes on, and which copy lands, is drawn at random; now and
then one is much slower than the others. Barriers count phases as the PTX ISA says.
"""

import contextlib
import dataclasses
import functools
import threading
import types
from typing import Any

import numpy as np
import pytest

from qserve_jax.pallas_kernels.w4a8_matmul import (
    mosaic_sm90,
    sm90_exchange,
    sm90_thread,
    sm90_tiles,
)
from qserve_jax.pallas_kernels.w4a8_matmul.sm90_config import Sm90Config
from qserve_jax.pallas_kernels.w4a8_matmul.sm90_rules import choose_config
from tests.pallas_kernels.w4a8_cases import SHAPES

BASE = 4096  # where shared memory begins


class Predicate(int):
    def __invert__(self):
        return Predicate(not self)

    def __and__(self, other):
        return Predicate(int(self) & other)


class Word(int):
    """An I32 with its value."""

    def is_(self, other):
        return Predicate(int(self) == other)

    def __lt__(self, other):
        return Predicate(int(self) < other)

    def __gt__(self, other):
        return Predicate(int(self) > other)


def _operator(name):
    return lambda self, other: Word(getattr(int, name)(self, other))


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "and", "xor", "floordiv", "mod"):
    setattr(Word, f"__{_name}__", _operator(f"__{_name}__"))
for _name in ("rshift", "lshift", "or"):
    setattr(Word, f"__{_name}__", _operator(f"__{_name}__"))


@dataclasses.dataclass(frozen=True)
class Address:
    value: int = 0

    def advance(self, index, stride):
        return Address(self.value + index * stride)


@dataclasses.dataclass
class Barrier:
    """An mbarrier: phases done, and what the present one still waits for."""

    arrivals: int
    phases: int = 0
    pending: int = 0
    bytes: int = 0

    def __post_init__(self):
        self.pending = self.arrivals

    def arrive(self, count=1, expected=0):
        self.pending -= count
        self.bytes += expected
        assert self.pending >= 0, "more arrivals than the barrier was made for"
        self._turn()

    def complete(self, count):
        self.bytes -= count
        self._turn()

    def _turn(self):
        if self.pending == 0 and self.bytes == 0:
            self.phases, self.pending = self.phases + 1, self.arrivals

    def passes(self, parity):
        """What mbarrier.try_wait.parity says: of the present phase and the last one only."""
        return self.phases % 2 != parity


class Stopped(Exception):
    """Another thread has failed."""


class Warps:
    """Threads of which one runs at a time, and copies on their way."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.agents = []
        self.copies = []
        self.mine = threading.local()
        self.back = threading.Semaphore(0)
        self.error = None
        self.at_barrier = {}

    def start(self, block, run):
        agent = types.SimpleNamespace(block=block, go=threading.Semaphore(0), done=False)
        agent.conditions = []
        agent.ready = lambda: True
        agent.weight = float(self.rng.choice([1, 1, 0.02]))

        def main():
            self.mine.agent = agent
            try:
                self._wait_for_turn(agent)
                run()
            except Stopped:
                pass
            except BaseException as error:
                self.error = self.error or error
            agent.done = True
            self.back.release()

        agent.thread = threading.Thread(target=main, daemon=True)
        agent.thread.start()
        self.agents.append(agent)

    def _wait_for_turn(self, agent):
        agent.go.acquire()
        if self.error is not None:
            raise Stopped

    def pause(self, ready=lambda: True):
        """Let others run, until `ready` and chosen."""
        agent = self.mine.agent
        agent.ready = ready
        self.back.release()
        self._wait_for_turn(agent)
        agent.ready = lambda: True

    def run(self):
        copy_weight = float(self.rng.choice([3, 0.1]))
        while self.error is None:
            ready = [a for a in self.agents if not a.done and a.ready()]
            weights = np.array([a.weight for a in ready] + [copy_weight] * bool(self.copies))
            if not weights.size:
                if not all(a.done for a in self.agents):
                    self.error = AssertionError("deadlock")
                break
            choice = self.rng.choice(len(weights), p=weights / weights.sum())
            if choice == len(ready):  # in any order
                try:
                    self.copies.pop(self.rng.integers(len(self.copies)))()
                except AssertionError as error:
                    self.error = error
                continue
            ready[choice].go.release()
            self.back.acquire()
        for agent in self.agents:
            agent.go.release()
            agent.thread.join()
        if self.error is not None:
            raise self.error


class Block:
    """The shared memory of one: barriers, and what each slot holds."""

    def __init__(self, p):
        slots, config = p.config.slots, p.config
        warps = 4 * config.row_warpgroups * config.cluster
        self.barriers = [Barrier(1) for _ in range(slots)] + [Barrier(warps) for _ in range(slots)]
        self.barriers += [Barrier(1) for _ in range(p.memory.barriers - 2 * slots)]
        self.holds = [{} for _ in range(slots)]
        self.readers = [0] * slots
        self.running = 4 + config.warpgroups
        self.sums = {}  # what other blocks have sent: address -> four words


@dataclasses.dataclass
class Product:
    """What a warpgroup multiplied of a slot: the boxes of x there, where the weights came from, and
    of the tokens so many from an offset on. part: what the epilogue takes it for."""

    boxes: dict
    weights: int
    offset: int = -1
    tokens: int = -1
    part: Any = dataclasses.field(default=None, compare=False)


def label(block, row_group, k_group, register):
    """A sum of a warpgroup's, which shows in the sum over blocks."""
    return 1000 * (10 * row_group + k_group) + register + 1 << 20 * block


def emulate(p, seed, monkeypatch, cluster=0, stored=None):
    """Runs a cluster -> what was multiplied: (block, row group, k group) -> [Product].

    stored: gets what the epilogue is given, (first token, sums), where there are k_blocks.
    """
    warps = Warps(seed)
    config, memory = p.config, p.memory
    blocks = [Block(p) for _ in range(config.cluster_blocks)]
    group_bytes = 4 * p.tile_bytes
    everybody = len(blocks) * (4 + config.warpgroups)
    arrived = []

    def mine():
        return blocks[warps.mine.agent.block]

    def barrier(address, block=None):
        return (mine() if block is None else blocks[block]).barriers[address // 8]

    def land(block, slot, key, tag, count, at):
        def copy():
            assert blocks[block].readers[slot] == 0, "a slot is overwritten while it is read"
            assert not blocks[block].sums, "sums are overwritten"
            blocks[block].holds[slot][key] = tag
            barrier(at, block).complete(count)

        return copy

    def copy_to_shared(target, source, count, at):
        slot, offset = divmod(target - BASE - memory.weights, memory.weight_bytes)
        assert all(warps.mine.agent.conditions)
        me = warps.mine.agent.block
        row, rest = divmod(offset, group_bytes)
        assert rest == 0 and count == group_bytes
        warps.copies.append(land(me, slot, ("w", row), int(source.value), count, at))
        warps.pause()

    def copy_tile_to_shared(target, x_map, row, column, at, *, blocks):
        if not all(warps.mine.agent.conditions):
            return
        slot, offset = divmod(target - BASE, memory.x_bytes)
        count = config.tokens // config.boxes * 128
        part, rest = divmod(offset, count)
        assert rest == 0 and blocks == config.cluster
        for block in range(blocks) if blocks > 1 else [warps.mine.agent.block]:
            tag = (int(row), int(column))
            warps.copies.append(land(block, slot, ("x", part), tag, count, at))
        warps.pause()

    def arrive_in_block(at, lane):
        assert lane == 0  # stands for lanes 0..cluster - 1, one for each block
        if all(warps.mine.agent.conditions):
            for block in range(config.cluster):
                barrier(at, block).arrive(4)
        warps.pause()

    @contextlib.contextmanager
    def when(condition):
        """The condition of lane 0; where it is false, nothing may be done but arrive, in vain."""
        conditions = warps.mine.agent.conditions
        conditions.append(bool(condition))
        yield
        conditions.pop()

    def loop(count, carry, body):
        for i in range(count):
            carry = body(Word(i), carry)
        return carry

    def wait(at, parity):
        found = barrier(at)
        warps.pause(lambda: found.passes(parity))

    def arrive(at):
        if all(warps.mine.agent.conditions):
            barrier(at).arrive(4)  # stands for the four warps of a warpgroup
        warps.pause()

    def sync_block(threads, at):
        """Those that have come are counted in rounds of `threads`; a warpgroup counts at once."""
        if all(warps.mine.agent.conditions):
            turn = warps.at_barrier.get(at, 0) // threads
            arrive_at_block(threads, at)
            warps.pause(lambda: warps.at_barrier[at] >= (turn + 1) * threads)

    def arrive_at_block(threads, at):
        if all(warps.mine.agent.conditions):
            warps.at_barrier[at] = warps.at_barrier.get(at, 0) + 128

    def wgmma_descriptor(address):
        warps.mine.product.offset = (address - BASE) % memory.x_bytes // 128
        return Word(0)

    def wgmma_s8(acc, a, descriptor):
        warps.mine.product.tokens = 2 * len(acc)
        return acc

    def expect_bytes(at, count):
        barrier(at).arrive(expected=count)
        warps.pause()

    def arrive_at_cluster():
        arrived.append(warps.mine.agent)
        assert arrived.count(warps.mine.agent) == 1
        warps.pause()

    def wait_for_cluster():
        warps.pause(lambda: len(arrived) == everybody)

    def meet_cluster():
        arrive_at_cluster()
        wait_for_cluster()

    def address_in_block(address, rank):
        return types.SimpleNamespace(address=address, block=rank)

    def send_words(target, words, at, offset):
        """Of a warpgroup's first thread; the others' are beside it."""
        if not all(warps.mine.agent.conditions):
            return
        assert target.block == at.block != warps.mine.agent.block
        there, address = blocks[target.block], target.address + offset

        def send():
            assert not any(there.readers), "a slot is overwritten while it is read"
            assert there.running, "sent to a block that has ended"
            assert memory.incoming <= address - BASE <= memory.columns - 2048
            assert there.sums.setdefault(address, words) is words, "sent twice to one place"
            barrier(at.address, target.block).complete(128 * 16)

        warps.copies.append(send)
        warps.pause()

    def load_shared(address, offset, count):
        assert count == 4
        return mine().sums[address + offset]

    ptx = types.SimpleNamespace(
        set_max_registers=lambda count, increase: None,
        constant=Word,
        select=lambda condition, yes, no: Word(yes if condition else no),
        minimum=lambda a, b: Word(min(a, b)),
        **{"when": when, "loop": loop, "wait": wait, "arrive": arrive},
        **{"expect_bytes": expect_bytes, "copy_to_shared": copy_to_shared},
        **{"copy_tile_to_shared": copy_tile_to_shared, "arrive_in_block": arrive_in_block},
        **{"sync_block": sync_block, "arrive_at_block": arrive_at_block},
        **{"wgmma_descriptor": wgmma_descriptor, "wgmma_s8": wgmma_s8},
        **{"arrive_at_cluster": arrive_at_cluster, "wait_for_cluster": wait_for_cluster},
        **{"meet_cluster": meet_cluster, "address_in_block": address_in_block},
        **{"send_words": send_words, "load_shared": load_shared},
        cluster_rank=lambda: Word(warps.mine.agent.block),
        wgmma_fence=lambda registers: registers,
        wgmma_commit=lambda: warps.pause(),
        wgmma_wait=lambda acc, a: acc,
    )
    for module in (mosaic_sm90, sm90_thread, sm90_exchange):
        monkeypatch.setattr(module, "ptx", ptx)
    seen = {}

    def load_weights(p, t, me, slot):
        """What the slot holds is what is multiplied; it must stay so until the release."""
        assert not mine().sums, "a slot is read that sums have overwritten"
        mine().readers[slot] += 1
        holds = mine().holds[slot]
        boxes = {part: tag for (kind, part), tag in holds.items() if kind == "x"}
        warps.mine.product = Product(boxes, holds["w", me.row_group], part=warps.mine.part)
        seen.setdefault(place_of(me), []).append(warps.mine.product)
        warps.pause()
        return [Word(0)] * 8, None

    release = mosaic_sm90._release

    def release_slot(p, t, slot):
        mine().readers[slot] -= 1
        release(p, t, slot)

    monkeypatch.setattr(mosaic_sm90, "_load_weights", load_weights)
    monkeypatch.setattr(mosaic_sm90, "_release", release_slot)

    def place_of(me):
        return warps.mine.agent.block, int(me.row_group), int(me.k_group)

    def thread(rank, warp):
        t = object.__new__(sm90_thread.Block)
        t.__dict__.update(
            warp=Word(warp),
            lane=Word(0),
            rank=Word(rank if config.cluster > 1 else 0),
            first_tile=Word(cluster),
            gmem={"w": Address()},
            x_map=None,
            shared=Word(BASE),
            _full=Word(0),
            _empty=Word(8 * config.slots),
        )
        t.tiles = t.count_tiles(p)
        return t

    def consumer(p, t):
        """A thread of Python stands for a warpgroup, and is its first one."""
        k_group, row_group = divmod(int(t.warp) // 4 - 1, config.row_warpgroups)
        groups = {"row_group": Word(row_group), "k_group": Word(k_group)}
        return types.SimpleNamespace(**groups, thread=Word(0))

    monkeypatch.setattr(mosaic_sm90, "Consumer", consumer)

    def epilogue(p, t, me, i, part):
        warps.mine.part = part
        return types.SimpleNamespace(store=store)

    def store(p, t, me, first, acc):
        if stored is not None:
            stored[place_of(me)] = int(first), [int(word) for word in acc]
        warps.pause()

    def exchange(p, t, me, acc):
        """Each of k_warpgroups has added up a share of the tokens."""
        size = config.tokens // config.k_warpgroups
        sums = [Word(label(*place_of(me), register)) for register in range(size // 2)]
        return me.k_group * size, sums

    monkeypatch.setattr(mosaic_sm90, "Epilogue", epilogue)
    monkeypatch.setattr(mosaic_sm90, "exchange", exchange)

    def run(role, p, t):
        getattr(mosaic_sm90, role)(p, t)
        mine().running -= 1

    for rank in range(config.cluster_blocks):
        starts = [("_produce", warp) for warp in range(4)]
        starts += [("_consume", 4 + 4 * group) for group in range(config.warpgroups)]
        for role, warp in starts:
            warps.start(rank, functools.partial(run, role, p, thread(rank, warp)))
    warps.run()
    return seen


def expected(p, rank, row, k_group):
    """Every chunk of every whole tile of cluster 0, once: of these channels and tokens."""
    config, cut = p.config, p.cut
    k_rank, rank = (0, rank) if config.k_blocks == 1 else (rank, 0)
    group_bytes = 4 * p.tile_bytes
    for tile in range(0, cut.whole, cut.clusters):
        first = tile % cut.token_tiles * config.tokens
        block = tile // cut.token_tiles * config.cluster + rank
        group = min(block * config.row_warpgroups + row, p.n // 64 - 1)
        for step in range(p.steps):
            chunk = (k_rank * p.steps + step) * config.k_warpgroups + k_group
            part = config.tokens // config.cluster
            x = {i: (first + i * part, chunk * 128) for i in range(config.cluster)}
            weights = (group * p.chunks + min(chunk, p.chunks - 1)) * group_bytes
            yield Product(x, weights, 0, config.tokens)


def problem(config, m, n, k):
    flags = {"per_group": False, "bias": False, "residual": None, "out_dtype": "bfloat16"}
    return sm90_thread.WgmmaProblem(m, n, k, None, **flags, config=config)


CASES = [  # m, n, k, config: K/128 odd, even, less than k_warpgroups; a last tile beyond N
    (64, 64, 128, Sm90Config(64, 1, 1, 4, 1)),
    (64, 33792, 640, Sm90Config(64, 1, 1, 5, 1)),
    (129, 33792, 896, Sm90Config(64, 2, 1, 7, 1)),
    (64, 192, 1152, Sm90Config(64, 4, 1, 5, 1)),
    (64, 50688, 1664, Sm90Config(64, 2, 2, 2, 1)),
    (64, 33792, 384, Sm90Config(64, 1, 2, 5, 1)),
    (64, 33792, 640, Sm90Config(64, 1, 4, 2, 1)),
    (128, 64, 384, Sm90Config(32, 1, 4, 3, 1)),
    (512, 50816, 640, Sm90Config(256, 2, 1, 5, 2)),
    (64, 67584, 384, Sm90Config(64, 2, 2, 3, 2)),
    (128, 67584, 640, Sm90Config(128, 4, 1, 4, 1)),
    (64, 38016, 640, Sm90Config(64, 3, 2, 4, 1)),
    (64, 67584, 640, Sm90Config(64, 4, 1, 5, 1, lead=4)),
    (64, 33792, 640, Sm90Config(64, 2, 1, 5, 2, lead=2)),
    (64, 16896, 256, Sm90Config(64, 2, 1, 5, 1, lead=3)),  # fewer chunks than the lead
]

TOGETHER = [  # the same with k_blocks: chunks that they divide, or not, or fewer than blocks
    (256, 256, 1024, Sm90Config(128, 2, 2, 3, 1, k_blocks=2)),
    (100, 192, 1152, Sm90Config(128, 2, 2, 4, 1, k_blocks=2)),
    (64, 192, 1152, Sm90Config(64, 2, 1, 5, 1, k_blocks=3)),  # parts of 24 tokens, which overlap
    (128, 64, 3712, Sm90Config(128, 2, 2, 2, 1, k_blocks=3)),
    (40, 64, 3840, Sm90Config(64, 1, 4, 2, 1, k_blocks=2)),
    (100, 64, 128, Sm90Config(64, 1, 2, 4, 1, k_blocks=4)),
    (20, 128, 1152, Sm90Config(32, 1, 2, 8, 1, k_blocks=2)),  # those of the rules
    (33, 128, 1152, Sm90Config(64, 1, 4, 4, 1, k_blocks=2)),
    (120, 64, 896, Sm90Config(128, 1, 2, 5, 1, k_blocks=2)),
    (256, 64, 896, Sm90Config(256, 2, 1, 5, 1, k_blocks=4)),
]

FINE = [  # m, n, k, blocks there are, config: the last round cut finer
    *[(m, 832, 640, 5, Sm90Config(64, 2, 1, 4, 1, 3)) for m in (64, 40)],  # 7 tiles: 5 and 2
    (64, 896, 256, 5, Sm90Config(64, 2, 1, 4, 1, 3)),  # the same, the 7th whole
    (64, 512, 256, 6, Sm90Config(64, 2, 1, 4, 1, 3)),  # none and 4: 3 and 1
    (64, 1408, 384, 8, Sm90Config(64, 2, 1, 4, 1, 3, 2)),  # 11: 8 and 3, which are 4 parts
    (128, 384, 256, 8, Sm90Config(64, 2, 1, 4, 1, 3)),  # none and 2 x 3
    (128, 320, 256, 8, Sm90Config(64, 2, 2, 2, 1, 3)),  # an odd number of channel groups
    *[(200, 576, 384, 16, Sm90Config(64, 2, 1, 5, 1, 2, lead)) for lead in (0, 3)],  # 16 and 4
    (64, 704, 384, 4, Sm90Config(64, 2, 1, 4, 1, 2)),  # 4 and 2
    (250, 448, 384, 16, Sm90Config(256, 2, 1, 4, 1, 1)),  # 4 in quarters, the last cut by M
    (64, 320, 384, 4, Sm90Config(64, 1, 4, 2, 1, 1)),  # 4 and 1
    (512, 1280, 384, 16, Sm90Config(256, 2, 1, 4, 2, 1)),  # 8 clusters: 8 and 2
    (256, 1472, 384, 8, Sm90Config(256, 2, 1, 4, 2, 2, 3)),  # 4 and 2
    (256, 640, 384, 8, Sm90Config(256, 1, 1, 5, 2, 1)),  # 4 and 1
]


@pytest.mark.parametrize("m, n, k, config", CASES)
def test_each_chunk_is_multiplied_once_whatever_the_order(m, n, k, config, monkeypatch):
    p = problem(config, m, n, k)
    mosaic_sm90.check_config(config, m, n, False)
    for seed in range(10):
        with monkeypatch.context() as patch:
            seen = emulate(p, seed, patch)
        assert len(seen) == config.cluster * config.warpgroups
        for (rank, row, k_group), found in seen.items():
            assert found == list(expected(p, rank, row, k_group))


@pytest.mark.parametrize("m, n, k, config", TOGETHER)
def test_blocks_add_their_sums_whatever_the_order(m, n, k, config, monkeypatch):
    """Each chunk once by one of them, and each sum of all of them in at least one epilogue."""
    p = problem(config, m, n, k)
    mosaic_sm90.check_config(config, m, n, False)
    share = config.tokens // config.k_warpgroups
    for seed in range(10):
        stored = {}
        with monkeypatch.context() as patch:
            seen = emulate(p, seed, patch, stored=stored)
        assert len(seen) == len(stored) == config.k_blocks * config.warpgroups
        products = [product for found in seen.values() for product in found]
        chunks = [product.boxes[0][1] // 128 for product in products]
        assert len(chunks) == config.row_warpgroups * len({*chunks}) and max(chunks) >= p.chunks - 1
        for (rank, row, k_group), found in seen.items():
            assert found == list(expected(p, rank, row, k_group))
        summed = {}
        for (_, row, k_group), (first, sums) in stored.items():
            at = summed.setdefault((row, k_group), set())
            for i, total in enumerate(sums):
                register = (first - k_group * share) // 2 + i
                blocks = range(config.k_blocks)
                assert total == sum(label(rank, row, k_group, register) for rank in blocks)
                at.add(register)
        assert all(at == {*range(share // 2)} for at in summed.values())


def count_products(p, monkeypatch, seed):
    """How often each [64 channels, token, chunk] that is stored was multiplied, by all blocks."""
    config, size = p.config, p.config.tokens // p.config.boxes
    count = np.zeros((p.n // 64, p.cut.token_tiles * config.tokens, p.chunks), int)
    for cluster in range(p.cut.clusters):
        with monkeypatch.context() as patch:
            seen = emulate(p, seed, patch, cluster)
        for (_, _, k_group), found in seen.items():
            for step, product in enumerate(found):
                chunk = step % p.steps * config.k_warpgroups + k_group
                token, group, _, quarters = product.part
                if group >= p.n // 64 or chunk >= p.chunks:  # not stored, or of zeros
                    continue
                assert product.weights == (group * p.chunks + chunk) * 4 * p.tile_bytes
                assert product.tokens == quarters * config.tokens // 4
                first = token - product.offset
                for i in range(product.offset, product.offset + product.tokens, 8):
                    assert product.boxes[i // size] == (first + i // size * size, chunk * 128)
                count[group, token : token + product.tokens, chunk] += 1
    return count


@pytest.mark.parametrize("m, n, k, sms, config", FINE)
def test_a_finer_last_round_leaves_nothing_out(m, n, k, sms, config, monkeypatch):
    monkeypatch.setattr(sm90_tiles, "SMS", sms)
    mosaic_sm90.check_config(config, m, n, False)
    p = problem(config, m, n, k)
    assert p.cut.last == config.last and p.cut.parts
    for seed in range(2):
        assert (count_products(p, monkeypatch, seed)[:, :m] == 1).all()


@pytest.mark.parametrize("config", [Sm90Config(64, 1, 1, 3, 1), Sm90Config(48, 1, 3, 2, 1)])
def test_a_ring_that_is_refused_fails(config, monkeypatch):
    """So the emulation can: a warp that copies comes two rounds ahead, to the same parity."""
    p = problem(config, 64, 64, 3840)
    with pytest.raises(ValueError, match="cannot run"):
        mosaic_sm90.check_config(config, 64, 64, False)
    failures = 0
    for seed in range(20):
        with monkeypatch.context() as patch:
            try:
                emulate(p, seed, patch)
            except (AssertionError, KeyError):
                failures += 1
    assert failures


def test_the_heuristic_s_rings_are_of_those_kinds():
    """A slot for each copying warp, and k_warpgroups that turn with the four warps."""
    for n, k in SHAPES:
        for m in (33, 64, 100, 128, 256, 1024, 4096):
            config = choose_config(m, n, k, True)
            assert config.slots >= 4 and config.k_warpgroups in (1, 2, 4)
