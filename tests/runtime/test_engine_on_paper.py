"""The engine before a device whose cache holds the tokens themselves, and whose next token is a
hash of what a row's pages hold: who reads or writes another's page gets other tokens."""

import itertools
import random
import sys
import threading
from collections import deque
from typing import Any

import numpy as np
import pytest

from qserve_jax import LLM, QuantConfig, SamplingParams
from qserve_jax.benchmarks.dummy import dummy_model
from qserve_jax.models import ModelConfig
from qserve_jax.runtime import batch, device_calls, engine, scheduler
from qserve_jax.runtime.engine import Engine
from qserve_jax.runtime.sampling import SampleOutput

TINY = ModelConfig("llama", 256, 128, 128, 1, 2, 1, 64, 256)
WEIGHTS = np.random.default_rng(0).integers(1, 10**6, 256)


def next_token(tokens) -> int:
    return int((np.asarray(tokens) + 1) @ WEIGHTS[: len(tokens)] % TINY.vocab_size)


def expected(prompt: list[int], params: SamplingParams) -> list[int]:
    tokens: list[int] = []
    limit, stops = params.max_tokens or 0, set(params.stop_token_ids or ())
    while len(tokens) < limit and not set(tokens[-1:]) & stops:
        tokens.append(next_token(prompt + tokens))
    return tokens


class Paper:
    """Takes the place of the two calls of an engine; `fails` says when one is interrupted."""

    def __init__(self, llm: LLM, fails=lambda: False):
        self.engine, self.fails = llm.engine, fails
        self.cells = np.full((llm.pool.num_pages, llm.pool.page_size), -1)
        self.last, self.length, self.left = np.zeros((3, llm.engine.device.max_num_seqs + 1), int)
        llm.engine.device._prefill = self.prefill  # pyright: ignore[reportAttributeAccessIssue]
        llm.engine.device._decode = self.decode  # pyright: ignore[reportAttributeAccessIssue]

    def place(self, table, position):
        size = self.cells.shape[1]
        assert table[position // size] >= 0, "a page that the row does not have"
        return table[position // size], position % size

    def choose(self, table, slot, stop_ids) -> int:
        token = next_token([self.cells[self.place(table, i)] for i in range(self.length[slot])])
        self.last[slot] = token
        self.left[slot] = 0 if token in stop_ids else self.left[slot] - 1
        return token

    def answer(self, cache, live, tokens):
        if self.fails():
            self.cells[:] = -1  # the call took the cache with it
            raise KeyboardInterrupt
        return cache, live, SampleOutput(tokens, np.ones_like(tokens, bool))  # pyright: ignore

    def prefill(self, model, params, cache, live, slots, tokens, state, query_lens, samples, **_):
        table, ends = np.asarray(state.block_table), np.asarray(state.context_lens)
        counts = ends if query_lens is None else query_lens
        slots = np.asarray(slots)
        owned = slots[slots < self.engine.device.max_num_seqs]
        assert len(set(owned)) == len(owned), "rows of a call write to one slot, in whatever order"
        for row, count in enumerate(counts):  # all rows append before any reads
            for i in range(count):
                self.cells[self.place(table[row], ends[row] - count + i)] = tokens[row, i]
        out = np.full((len(slots), 1), -1)
        for row, slot in enumerate(slots):
            self.last[slot], self.length[slot] = state.tokens[row], ends[row]
            self.left[slot] = state.remaining[row]
            if samples[row]:
                assert slot < self.engine.device.max_num_seqs and counts[row] > 0
                out[row] = self.choose(table[row], slot, state.stop_ids[row])
        return self.answer(cache, live, out)

    def decode(self, model, params, cache, live, slots, state, steps, idle, *, max_steps, **_):
        slots, table = np.asarray(slots), np.asarray(state.block_table)
        stop_ids, out = np.asarray(state.stop_ids), np.full((len(slots), max_steps), -1)
        for step in range(steps):
            rows = [r for r, s in enumerate(slots) if s < len(self.left) - 1 and self.left[s] > 0]
            for row in rows:
                slot = slots[row]
                self.cells[self.place(table[row], self.length[slot])] = self.last[slot]
                self.length[slot] += 1
            for row in rows:
                out[row, step] = self.choose(table[row], slots[row], stop_ids[row])
            going_on = sum(self.left[slots[row]] > 0 for row in rows)
            if len(slots) - going_on >= idle:
                break
        return self.answer(cache, live, out)


@pytest.fixture(autouse=True, params=[False, True], ids=["", "thread"])
def thread_launches(request, monkeypatch):
    """On a GPU a thread of their own launches the calls, elsewhere whoever has the turn."""
    monkeypatch.setattr(device_calls, "launching_waits", lambda _: request.param)
    return request.param


@pytest.fixture(scope="module")
def loaded():
    return dummy_model(TINY, QuantConfig())


def some_llm(loaded, rng: random.Random) -> LLM:
    """Of small sizes, often with no more pages than one request may need."""
    page_size, attends = (
        rng.choice([1, 4, 16, 24, 64]),
        rng.choice(["full", "quantized", "quantized"]),
    )
    needed = -(-160 // page_size)
    settings: dict[str, Any] = {
        "page_size": page_size,
        "num_pages": rng.choice([needed, needed + 1, 2 * needed, 5 * needed]),
        "max_num_seqs": rng.choice([1, 3, 8]),
        "max_num_batched_tokens": rng.choice([16, 48, 256]),
        "enable_prefix_caching": rng.random() < 0.7,
    }
    return LLM(loaded, max_model_len=160, attends=attends, **settings)


def some_requests(rng: random.Random, page_size: int):
    """Prompts that often share a beginning or end at a page's edge; limits of often one token."""
    base = [rng.randrange(256) for _ in range(80)]
    prompts, params = [], []
    for _ in range(rng.choice([1, 5, 20])):
        edges = [1, page_size, page_size + 1, 2 * page_size, rng.randrange(1, 81)]
        length = min(rng.choice(edges), 80)
        cut = rng.choice([0, length, rng.randrange(length + 1)])
        prompts.append(base[:cut] + [rng.randrange(256) for _ in range(length - cut)])
        stops = [rng.randrange(256) for _ in range(rng.choice([0, 0, 3, 40]))]
        limit = rng.choice([1, 2, 80, rng.randrange(1, 81)])
        params.append(SamplingParams(max_tokens=limit, stop_token_ids=stops))
    return prompts, params


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(scheduler, "PIECE", 16)
    monkeypatch.setattr(batch, "CALL_TOKENS", 32)
    monkeypatch.setattr(engine, "SEQUENCES_PER_PLACE", 3)


@pytest.fixture
def watched_is_checked(monkeypatch):
    """What the engine keeps of who listens is what a look at everybody would say."""
    kept = Engine._is_watched

    def checked(engine):
        here = [*engine.scheduler.running, *engine.scheduler.waiting]
        assert kept(engine) == any(s.listener is not None for s in here)
        return kept(engine)

    monkeypatch.setattr(Engine, "_is_watched", checked)


@pytest.mark.parametrize("seed", range(24))
def test_whatever_comes_and_goes(loaded, small_pieces, watched_is_checked, seed):
    rng = random.Random(seed)
    llm = some_llm(loaded, rng)
    Paper(llm)
    for _ in range(3):
        prompts, params = some_requests(rng, llm.pool.page_size)
        wanted = [expected(p, s) for p, s in zip(prompts, params, strict=True)]
        assert [o.token_ids for o in llm.generate(prompts, params)] == wanted
        streams = [llm.stream(p, s) for p, s in zip(prompts, params, strict=True)]
        told, open_ones = [[] for _ in prompts], set(range(len(prompts)))
        while open_ones:
            i = rng.choice(sorted(open_ones))
            piece = next(streams[i], None) if rng.random() < 0.9 else None
            told[i] += piece.token_ids if piece else []
            if piece is None:  # it has ended, or is left here
                streams[i].close()
                open_ones.discard(i)
        for tokens, all_of_them in zip(told, wanted, strict=True):
            assert tokens == all_of_them[: len(tokens)]
        assert llm.engine.idle and llm.pool.free_pages == llm.pool.num_pages
    assert sorted(llm.engine.scheduler._slots) == list(range(llm.engine.device.max_num_seqs))


def test_max_tokens_none_goes_on_to_the_limit_of_the_model(loaded):
    llm = LLM(loaded, num_pages=16, max_model_len=50)
    Paper(llm)
    (output,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=None))
    assert output.token_ids == expected([1, 2, 3], SamplingParams(max_tokens=47))
    assert output.finish_reason == "length"


@pytest.mark.parametrize("leaves", [False, True])
def test_nobody_watches_when_the_listeners_have_gone(loaded, watched_is_checked, leaves):
    llm = LLM(loaded, num_pages=16, max_num_seqs=4)
    Paper(llm)
    (unheard,) = llm.sequences([[1, 2]], SamplingParams(max_tokens=240))
    llm.engine.add([unheard])
    stream = llm.stream([[3]], SamplingParams(max_tokens=100 if leaves else 2))
    assert next(stream).token_ids
    if leaves:
        stream.close()
    assert list(stream) or leaves
    assert not unheard.done
    llm.engine.run_until(lambda: unheard.done)


def test_a_step_looks_at_nobody_who_waits(loaded):
    class Unread(deque):
        def __iter__(self):
            raise AssertionError("somebody goes through the queue")

    class Counted(list):
        reads = 0

        def __iter__(self):
            Counted.reads += 1
            return super().__iter__()

    llm = LLM(loaded, num_pages=8, max_num_seqs=2)
    Paper(llm)
    llm.engine.scheduler.waiting = Unread()
    prompts, params = [[1 + i % 7, 2] for i in range(40)], SamplingParams(max_tokens=3)
    wanted = [expected(p, params) for p in prompts]
    make = llm.sequences
    llm.sequences = lambda *args: Counted(make(*args))  # pyright: ignore[reportAttributeAccessIssue]
    assert [o.token_ids for o in llm.generate(prompts, params)] == wanted
    assert Counted.reads <= 5  # of the whole call, which took 20 steps and more
    told = [[] for _ in prompts]
    for piece in llm.stream(prompts, params):
        told[piece.index] += piece.token_ids
    assert told == wanted and Counted.reads <= 10


@pytest.mark.parametrize("seed", [*range(12), 42, 66, 126])  # in the last a call for nobody fails
def test_interruptions_at_any_call(loaded, small_pieces, watched_is_checked, seed):
    """Nothing is lost, made or said twice."""
    rng = random.Random(seed)
    llm = some_llm(loaded, rng)
    Paper(llm, fails=lambda: rng.random() < 0.1)
    prompts, params = some_requests(rng, llm.pool.page_size)
    sequences, told = llm.sequences(prompts, params), deque()
    for sequence in sequences:
        sequence.listener, sequence.streams = told.append, True
    llm.engine.add(sequences)
    while not llm.engine.idle:
        try:
            llm.engine.run_until(lambda: llm.engine.idle)
        except KeyboardInterrupt:
            pass
    wanted = [expected(p, s) for p, s in zip(prompts, params, strict=True)]
    heard = [[] for _ in prompts]
    for piece in told:
        heard[piece.index] += piece.token_ids
    assert [s.tokens for s in sequences] == heard == wanted
    assert llm.pool.free_pages == llm.pool.num_pages


class Interrupts:
    """Raises KeyboardInterrupt when a line of the engine's host code is run for the first time, and
    again some lines later. Keeps the lines it has seen."""

    FILES = ("engine.py", "device_calls.py", "launches.py", "scheduler.py", "page_table.py")

    def __init__(self, line: tuple[str, int] | None, again: int):
        self.line, self.again, self.left, self.seen = line, again, 0, {}

    def __call__(self, frame, event, _):
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if "qserve_jax/runtime/" not in path or not path.endswith(self.FILES):
            return None
        if event != "line" or name == "run_until":  # for that see test_turns.py
            return self
        here = path, frame.f_lineno
        if self.left > 0:
            self.left -= 1
        first = here == self.line and here not in self.seen
        self.seen[here] = True
        if first or self.left == 1:
            self.left = self.again if first else 0
            raise KeyboardInterrupt
        return self


def interrupted(llm: LLM, prompts, params, line=None, again=0) -> list[tuple[str, int]]:
    """Lines run until then, or to the end."""
    before, interrupts = sys.gettrace(), Interrupts(line, again)
    sys.settrace(interrupts)
    try:
        llm.generate(prompts, params)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return list(interrupts.seen)


@pytest.mark.parametrize("twice", [False, True])
def test_interruptions_at_any_line(loaded, small_pieces, twice):
    """What was interrupted has left nothing behind, and others go on with the right tokens."""
    rng = random.Random(0)
    settings: dict[str, Any] = {"page_size": 4, "max_num_seqs": 3, "max_num_batched_tokens": 32}
    llm = LLM(loaded, num_pages=11, max_model_len=40, **settings)
    Paper(llm)
    base = [rng.randrange(256) for _ in range(20)]
    prompts = [base[:12] + [i] for i in range(5)]
    params = [SamplingParams(max_tokens=n) for n in (2, 24, 20, 9, 3)]
    other_params = SamplingParams(max_tokens=12)
    lines = interrupted(llm, prompts, params)
    assert llm.stats.preemptions > 0 and len(lines) > 150
    for line in lines if not twice else rng.sample(lines, 60):
        (other,) = llm.sequences([base], other_params)
        llm.engine.add([other])
        interrupted(llm, prompts, params, line, rng.randrange(2, 60) if twice else 0)
        if not twice:  # else the request may not have been cancelled, and goes on
            assert set(llm.engine.scheduler.running) | {*llm.engine.scheduler.waiting} <= {other}
        llm.engine.run_until(lambda: llm.engine.idle)
        if not other.failures:  # of what was interrupted as its own tokens were read
            assert other.tokens == expected(base, other_params), line
        assert llm.pool.free_pages == 11 and not llm.engine._watched
        assert sorted(llm.engine.scheduler._slots) == [0, 1, 2]
    wanted = [expected(p, s) for p, s in zip(prompts, params, strict=True)]
    assert [o.token_ids for o in llm.generate(prompts, params)] == wanted


def interrupt_once_after(monkeypatch, owner, name, when=lambda *_: True):
    """The method is interrupted as it ends, the first time that when(its arguments)."""
    method, hits = getattr(owner, name), []

    def interrupted(*args):
        method(*args)
        if not hits and when(*args):
            hits.append(1)
            raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupted)
    return hits


def run_through(llm: LLM):
    while not llm.engine.idle:
        try:
            llm.engine.run_until(lambda: llm.engine.idle)
        except KeyboardInterrupt:
            pass
    assert llm.pool.free_pages == llm.pool.num_pages


def test_who_gives_way_is_not_lost(loaded, monkeypatch):
    llm = LLM(loaded, num_pages=11, max_model_len=40, page_size=4, max_num_seqs=3)
    Paper(llm)
    params = SamplingParams(max_tokens=24)
    sequences = llm.sequences([[i] * 12 for i in range(3)], params)
    hits = interrupt_once_after(monkeypatch, llm.engine.scheduler, "drop", lambda s: not s.done)
    llm.engine.add(sequences)
    run_through(llm)
    assert hits and [s.tokens for s in sequences] == [expected(s.prompt, params) for s in sequences]


def test_who_is_cancelled_does_not_come_back(loaded, monkeypatch):
    llm = LLM(loaded, num_pages=11, max_model_len=40, page_size=4, max_num_seqs=3)
    Paper(llm)
    (sequence,) = llm.sequences([[1, 2]], SamplingParams(max_tokens=30))
    llm.engine.add([sequence])
    llm.engine.run_until(lambda: sequence.tokens)
    monkeypatch.setattr(llm.engine.scheduler, "drop", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llm.engine.cancel([sequence])
    monkeypatch.undo()
    assert llm.engine.idle and sequence.finish_reason == "abort"
    run_through(llm)


def test_who_was_being_given_tokens_hears_of_the_interruption(loaded, monkeypatch):
    """Their text may lack some: an error is better than such a text, or than no end at all."""
    llm = LLM(loaded, num_pages=22, max_model_len=40, page_size=4, max_num_seqs=3)
    Paper(llm)
    params, told = SamplingParams(max_tokens=9), []
    one, other = llm.sequences([[1, 2]], params) + llm.sequences([[3, 4]], params)
    one.listener, one.streams = told.append, True
    hits = interrupt_once_after(monkeypatch, one.detokenizer, "add")
    llm.engine.add([one, other])
    run_through(llm)
    assert hits and told[-1].finish_reason == one.finish_reason == "error"
    assert "interrupted while its tokens were read" in str(one.failures[0])
    assert other.tokens == expected([3, 4], params) and not other.failures


def test_a_recovery_that_is_interrupted_is_begun_anew(loaded, monkeypatch):
    llm = LLM(loaded, num_pages=22, max_model_len=40, page_size=4, max_num_seqs=3)
    fails = [False, True]
    Paper(llm, fails=lambda: bool(fails) and fails.pop(0))
    params = SamplingParams(max_tokens=20)
    sequences = llm.sequences([[i] * 9 for i in range(3)], params)
    hits = interrupt_once_after(monkeypatch, llm.pool, "clear")
    llm.engine.add(sequences)
    run_through(llm)
    assert hits and [s.tokens for s in sequences] == [expected(s.prompt, params) for s in sequences]
    assert sorted(llm.engine.scheduler._slots) == [0, 1, 2]


def test_who_is_cancelled_within_the_last_step_goes(loaded):
    llm = LLM(loaded, num_pages=22, max_model_len=40, page_size=4, max_num_seqs=3)
    Paper(llm)
    (one,) = llm.sequences([[1, 2]], SamplingParams(max_tokens=3))
    (other,) = llm.sequences([[3, 4]], SamplingParams(max_tokens=30))
    one.listener = lambda _: llm.engine.cancel([other])
    llm.engine.add([one, other])
    llm.engine.run_until(lambda: one.done)
    assert llm.engine.idle and llm.pool.free_pages == 22


def test_tokens_are_read_while_the_next_call_runs(loaded, thread_launches):
    """XLA holds on to whoever launches a decode call until the device is done with it."""
    if not thread_launches:
        pytest.skip("nobody else launches")
    llm = LLM(loaded, num_pages=64, max_model_len=160, max_num_seqs=3)
    heard, calls, in_time = threading.Event(), itertools.count(1), []

    def third_call_is_slow() -> bool:
        if next(calls) == 3:
            in_time.append(heard.wait(timeout=30))
        return False

    Paper(llm, fails=third_call_is_slow)
    (one,) = llm.sequences([[1, 2]], SamplingParams(max_tokens=150, ignore_eos=True))
    one.listener = lambda piece: heard.set() if len(one.tokens) > 1 else None
    one.streams = True
    llm.engine.add([one])
    run_through(llm)
    assert in_time == [True] and one.tokens == expected([1, 2], one.params)


@pytest.mark.parametrize("short, most", [(1, 70), (2, 80)])
def test_who_waits_gets_places_that_are_free_already(loaded, short, most):
    """Those of sequences that end with prefill, or ended in the call before. The long ones wait
    behind short ones; where only places count that become free in a call, it takes 122 and 150."""
    llm = LLM(loaded, num_pages=64, max_model_len=160, max_num_seqs=9)
    Paper(llm)
    params = [SamplingParams(max_tokens=short if i % 9 else 60, ignore_eos=True) for i in range(54)]
    llm.generate([[i] for i in range(54)], params)
    assert llm.stats.decode_steps <= most


def test_places_are_no_more_than_pages(loaded):
    llm = LLM(loaded, num_pages=8, max_num_seqs=10**9)
    assert llm.engine.device.max_num_seqs == 8


def test_thousands_may_wait(loaded):
    """All get their tokens, places and pages come back,."""
    llm = LLM(loaded, num_pages=40, max_model_len=160, max_num_seqs=16)
    Paper(llm)
    prompts = [[i % 256] for i in range(2000)]
    params = [SamplingParams(max_tokens=1 + i % 5, ignore_eos=True) for i in range(2000)]
    outputs = llm.generate(prompts, params)
    assert [len(o.token_ids) for o in outputs] == [p.max_tokens for p in params]
    assert llm.pool.free_pages == 40 and llm.engine.idle
