"""The meetings of the kernel that sums over ranks, emulated: its own code, in any order.

Each thread that meets others is a thread of Python, of which one runs at a time (test_w4a8_ring.py
has the scheduler); one more stands for the rest of its block. Flags travel to other ranks for as
long as they like, loads of a row take a while, and as soon as a rank's kernel has ended, its
partial is overwritten, and the next launch follows. Only a few blocks fit on a GPU at a time.
"""

import contextlib
import functools
import types

import pytest

from qserve_jax.pallas_kernels.sum_norm_quantize import mosaic
from qserve_jax.pallas_kernels.sum_norm_quantize.api import ROW_WORDS
from tests.pallas_kernels.test_w4a8_ring import Warps, Word

OVERWRITTEN = "overwritten"


class Place:
    """A byte address on a rank."""

    def __init__(self, ref, rank, offset=0):
        self.ref, self.rank, self.offset = ref, rank, offset

    def advance(self, index, stride):
        return Place(self.ref, self.rank, self.offset + int(index) * stride)


class Gpu:
    """Of a rank: which launches its blocks are in, what its partial holds, its flags."""

    def __init__(self, first, rows):
        self.flags = {ROW_WORDS * 4 * row: first for row in range(rows)}  # the launches so far
        self.partial = OVERWRITTEN
        self.launched, self.started, self.ended, self.loading = 0, set(), {}, 0


def emulate(seed, monkeypatch, *, ranks=2, grids=(3, 1, 3), slots=2, first=0, order=None):
    """Launches of so many rows each, of which `slots` run at a time.

    first: launches counted before. order: of the blocks, by rank and number of rows.
    """
    warps = Warps(seed)
    rows, lanes = max(grids), ranks + 1
    gpus = [Gpu(first, rows) for _ in range(ranks)]
    met, order = {}, order or (lambda rank, count: list(range(count)))

    def me():
        return warps.mine.agent

    def sync_block(*_):
        """Of all threads of the block."""
        key = me().rank, me().row
        turn = met.get(key, 0) // lanes
        met[key] = met.get(key, 0) + 1
        warps.pause(lambda: met[key] >= (turn + 1) * lanes)

    @contextlib.contextmanager
    def when(condition):
        me().conditions.append(bool(condition))
        yield
        me().conditions.pop()

    def raise_flag(place, value):
        def land():
            gpus[place.rank].flags[place.offset] = value % 2**32

        if all(me().conditions):
            warps.copies.append(land)
        warps.pause()

    def wait_for_flag(place, value):
        assert place.rank == me().rank
        if all(me().conditions):
            flags = gpus[place.rank].flags
            warps.pause(lambda: flags.get(place.offset) == value % 2**32)

    def store_global(place, values):
        if all(me().conditions) and place.ref == "flags":
            gpus[place.rank].flags[place.offset] = values[0] % 2**32

    def load_part(p, t, source, v):
        """What is read is this launch's until the last word has come."""
        assert source.ref == "partial" and source.offset == me().row * 4 * 128
        theirs = gpus[source.rank]
        theirs.loading += 1
        for _ in range(3):
            assert theirs.partial == me().launch, f"{theirs.partial} in launch {me().launch}"
            warps.pause()
        theirs.loading -= 1
        return []

    ptx = types.SimpleNamespace(
        constant=Word,
        minimum=lambda a, b: Word(min(a, b)),
        float_bits=Word,
        warp_sum=lambda x: x,
        own_rank=lambda context: Word(me().rank),
        address_on=lambda context, ref, rank: Place(ref, int(rank)),
        global_address=lambda ref: Place(ref, me().rank),
        load_flag=lambda place: Word(gpus[place.rank].flags[place.offset]),
        **{"when": when, "sync_block": sync_block, "store_global": store_global},
        **{"raise_flag": raise_flag, "wait_for_flag": wait_for_flag},
    )

    def meet(*_):
        sync_block()
        return Word(0)

    arithmetic = types.SimpleNamespace(
        _Thread=lambda p, shared: types.SimpleNamespace(
            row=Word(me().row), index=Word(me().lane), vectors=[Word(0)]
        ),
        _itemsize=lambda dtype: 4,
        _load_row=lambda p, t, x: [[]],
        _normalized=meet,
        _scale=meet,
        _store_codes=lambda *_: Word(0),
        _all_warps=meet,
        _tree=lambda combine, items: Word(0),
    )
    monkeypatch.setattr(mosaic, "ptx", ptx)
    monkeypatch.setattr(mosaic, "rows", arithmetic)
    monkeypatch.setattr(mosaic, "_load_part", load_part)
    for name in ("_weights", "_sum", "_store_row"):
        monkeypatch.setattr(mosaic, name, lambda *_: [])
    problem = types.SimpleNamespace(width=128, dtype="float32", vectors=1, threads=128)
    refs = "partial residual flags scale x codes step sum shared barriers".split()

    def fits(gpu, rank, row, launch):
        """Whether the block is on the GPU, or comes next and has a place there."""
        if gpu.launched <= launch:
            return False
        queue = order(rank, grids[launch])
        before = queue[: queue.index(row)]
        running = [r for r in gpu.started if gpu.ended.get((launch, r), 0) < lanes]
        fresh = len(running) < slots and gpu.started >= set(before)
        return row in gpu.started or fresh

    def block(rank, row, lane):
        gpu = gpus[rank]
        me().rank, me().row, me().lane = rank, row, lane
        for launch, count in enumerate(grids):
            if row >= count:
                continue
            warps.pause(functools.partial(fits, gpu, rank, row, launch))
            gpu.started.add(row)
            me().launch = launch
            mosaic._body(problem, None, ranks, None, *refs)
            gpu.ended[launch, row] = gpu.ended.get((launch, row), 0) + 1

    def stream(rank):
        """A matmul writes the partial, the kernel runs, and what comes next writes there too."""
        gpu = gpus[rank]
        for launch, count in enumerate(grids):
            assert gpu.loading == 0, "written while a rank reads it"
            gpu.partial = launch
            warps.pause()
            gpu.started.clear()
            gpu.launched += 1
            done = [(launch, row) for row in range(count)]
            warps.pause(lambda done=done: all(gpu.ended.get(key, 0) == lanes for key in done))
            assert gpu.loading == 0, "written while a rank reads it"
            gpu.partial = OVERWRITTEN
            warps.pause()

    for rank in range(ranks):
        warps.start(rank, functools.partial(stream, rank))
        for row in range(rows):
            for lane in range(lanes):
                warps.start(rank, functools.partial(block, rank, row, lane))
    warps.run()
    counted = [gpu.flags[ROW_WORDS * 4 * row] for gpu in gpus for row in range(rows)]
    expected = [(first + sum(row < n for n in grids)) % 2**32 for row in range(rows)]
    assert counted == ranks * expected


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("case", [
    {}, {"slots": 1}, {"ranks": 3, "grids": (2, 2), "slots": 2}, {"first": 2**32 - 2},
    {"grids": (1, 1, 1, 1)},
])  # fmt: skip
def test_every_row_is_read_when_it_is_there_and_before_it_is_overwritten(case, seed, monkeypatch):
    emulate(seed, monkeypatch, **case)


def without(event):
    wait = mosaic._Meeting.wait

    def some(self, asked):
        if asked != event:
            wait(self, asked)

    return "wait", some


BROKEN = {
    "nobody waits until all are ready": without(mosaic.READY),
    "nobody waits until all are done": without(mosaic.DONE),
    "launches are not counted": ("close", lambda self: None),
}
FOUND = "in launch|written while"


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_meeting_is_found(how, monkeypatch):
    monkeypatch.setattr(mosaic._Meeting, *BROKEN[how])
    with pytest.raises(AssertionError, match=FOUND):
        for seed in range(20):
            emulate(seed, monkeypatch)


def test_done_before_the_block_has_loaded_is_found(monkeypatch):
    announce = mosaic._Meeting.announce

    def early(self, event):
        announce(self, event)
        if event == mosaic.READY:
            announce(self, mosaic.DONE)

    monkeypatch.setattr(mosaic._Meeting, "announce", early)
    with pytest.raises(AssertionError, match=FOUND):
        for seed in range(20):
            emulate(seed, monkeypatch)


def test_blocks_that_start_in_different_orders_would_wait_for_ever(monkeypatch):
    """Why rows must start in the same order where not all fit."""
    with pytest.raises(AssertionError, match="deadlock"):
        emulate(0, monkeypatch, slots=1, order=lambda rank, n: [*range(n)][:: 1 - 2 * rank])
