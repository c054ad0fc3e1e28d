"""Admission, growth, preemption, chunks and shared pages, without a model."""

import random

import pytest

from qserve_jax.runtime.batch import full_calls
from qserve_jax.runtime.detokenizer import IncrementalDetokenizer
from qserve_jax.runtime.page_table import PagePool
from qserve_jax.runtime.sampling_params import SamplingParams
from qserve_jax.runtime.scheduler import Chunk, Scheduler
from qserve_jax.runtime.sequence import Sequence


def sequence(index: int, prompt: int | list[int], limit: int = 1) -> Sequence:
    """One with this prompt (or one of its own of this length) and at most `limit` tokens."""
    ids = [1000 * index + i for i in range(prompt)] if isinstance(prompt, int) else prompt
    detokenizer = IncrementalDetokenizer(None)
    return Sequence(index, 0, ids, SamplingParams(), 0, limit, (), detokenizer)


def make(num_pages, sequences, *, places=8, budget=1024, share=True, in_pieces=False, salted=False):
    pool = PagePool(num_pages, page_size=8)
    scheduler = Scheduler(
        pool, places, budget, share_prefixes=share, in_pieces=in_pieces, salted=salted
    )
    scheduler.waiting.extend(sequences)
    return pool, scheduler


def run(scheduler, plan):
    """What a device would bring: a token for each chunk that samples, then for each step."""
    for chunk in plan.chunks:
        if chunk.samples:
            chunk.sequence.redeem((1, 1))
            chunk.sequence.append(7, None)
    for s in plan.decoding:
        for _ in range(min(plan.steps, s.steps_left)):
            s.append(7, None)
    for s in [s for s in scheduler.running if s.done]:
        scheduler.share_generated(s)
        scheduler.drop(s)


def schedule(scheduler, steps=4, waiting_steps=64):
    """The plan, no call being on its way."""
    plan = scheduler.schedule(steps, waiting_steps, drained=True)
    assert plan is not None
    return plan


def admitted(plan):
    return [c.sequence.index for c in plan.chunks]


def test_admits_in_order_while_pages_and_places_last():
    pool, scheduler = make(5, [sequence(0, 9), sequence(1, 25), sequence(2, 8)], places=2)
    assert admitted(schedule(scheduler)) == [0]  # 1 needs 4 pages; 2 does not overtake it
    assert pool.free_pages == 3
    scheduler.drop(scheduler.running[0])
    assert admitted(schedule(scheduler)) == [1]  # and one stays free, for those that run
    scheduler.drop(scheduler.running[0])
    assert admitted(schedule(scheduler)) == [2] and pool.free_pages == 4
    scheduler.waiting.extend(sequence(i, 3) for i in range(3, 6))
    assert admitted(schedule(scheduler)) == [3]  # two places
    assert [s.index for s in scheduler.running] == [2, 3]


def test_pages_grow_with_what_is_generated():
    pool, scheduler = make(9, [sequence(0, 8, limit=40)])
    used = []
    while scheduler.waiting or scheduler.running:
        plan = schedule(scheduler)
        used.append(9 - pool.free_pages)
        for s in plan.decoding:  # every step appends the token before it
            before = len(s.prompt) + len(s.tokens) + s.pending - 1
            assert len(s.pages) * 8 >= before + min(plan.steps, s.steps_left)
        run(scheduler, plan)
    assert used[0] == 2 and used[-1] == 6 and used == sorted(used)
    assert pool.free_pages == 9


def test_steps_are_what_is_needed_and_few_while_others_wait():
    _, scheduler = make(64, [sequence(0, 8, limit=9), sequence(1, 8, limit=30)], places=1)
    assert schedule(scheduler, 64, 4).steps == 4
    _, scheduler = make(64, [sequence(0, 8, limit=9)])
    assert schedule(scheduler, 64, 4).steps == 8  # the first token is prefill's
    _, scheduler = make(64, [sequence(0, 8, limit=9), sequence(1, 40, limit=9)], budget=16)
    assert schedule(scheduler, 64, 4).steps == 1  # a prompt waits for its next chunk
    plan = scheduler.schedule(64, 4, drained=True, between=0)
    assert plan is not None and plan.chunks and plan.decoding and plan.steps == 0


def test_long_prompts_come_in_chunks_and_short_ones_together():
    sequences = [sequence(0, 70, 5), sequence(1, 5, 5), sequence(2, 16, 5), sequence(3, 17, 5)]
    _, scheduler = make(64, sequences, budget=40)  # 32 tokens are the longest chunk
    seen = []
    for _ in range(5):
        plan = schedule(scheduler, steps=1)
        seen.append([(c.sequence.index, c.start, c.end, c.samples) for c in plan.chunks])
        assert {s.index for s in plan.decoding} == {
            s.index for s in scheduler.running if s.prefilled
        }
        run(scheduler, plan)
    assert seen == [
        [(0, 0, 32, False)],
        [(0, 32, 64, False)],
        [(0, 64, 70, True), (1, 0, 5, True)],  # two rows of 16; a third would make four
        [(2, 0, 16, True)],  # beside it, the next one would make two rows of 32
        [(3, 0, 17, True)],
    ]


def test_prompts_fill_the_rows_of_a_call_in_pieces():
    """Of 256 tokens, so that a row is not padded to the longest prompt."""
    lengths = [600, 10, 1030, 300, 513]
    sequences = [sequence(i, length, 5) for i, length in enumerate(lengths)]
    _, scheduler = make(512, sequences, budget=4096, in_pieces=True)
    plan = schedule(scheduler)
    edges = [(c.sequence.index, c.start, c.end) for c in plan.chunks]
    first = [(0, 0, 256), (0, 256, 512), (0, 512, 600), (1, 0, 10), (2, 0, 256), (2, 256, 512)]
    assert edges[:6] == first and len(edges) == 14
    assert [c.samples for c in plan.chunks] == [c.end == c.sequence.goal for c in plan.chunks]
    assert plan.decoding == [c.sequence for c in plan.chunks if c.samples]
    assert [s.computed for s in sequences] == lengths and scheduler.shared_tokens == 0


def test_a_prompt_in_pieces_goes_on_in_the_next_call():
    _, scheduler = make(512, [sequence(0, 700), sequence(1, 300)], budget=512, in_pieces=True)
    seen = []
    for _ in range(3):
        plan = schedule(scheduler, steps=1)
        seen.append([(c.sequence.index, c.start, c.end) for c in plan.chunks])
        run(scheduler, plan)
    expected = [(0, 512, 700), (1, 0, 256)]
    assert seen == [[(0, 0, 256), (0, 256, 512)], expected, [(1, 256, 300)]]


def test_rows_are_cut_into_calls_where_padding_costs_more():
    def sizes(rows, length):
        chunks = [Chunk(sequence(0, 8), 0, length, False)] * rows
        calls = full_calls(chunks)
        assert [c for call in calls for c in call] == chunks
        return [len(call) for call in calls]

    assert sizes(32, 256) == [32] and sizes(31, 256) == [31]  # a padded row is cheaper than a call
    assert sizes(5, 256) == [4, 1] and sizes(22, 200) == [16, 4, 2]
    assert sizes(22, 30) == [22] and sizes(3, 1024) == [2, 1] and sizes(3, 256) == [3]


def test_the_last_gives_way_and_comes_back_first():
    pool, scheduler = make(6, [sequence(i, 8, limit=30) for i in range(3)])
    order = []
    for _ in range(100):
        plan = schedule(scheduler)
        order += admitted(plan)
        run(scheduler, plan)
        if not (scheduler.waiting or scheduler.running):
            break
    assert scheduler.preemptions > 0 and order[:2] == [0, 1] and order[-1] == 2
    assert pool.free_pages == 6


def test_nobody_gives_way_while_calls_are_on_their_way():
    pool, scheduler = make(4, [sequence(0, 7, limit=20), sequence(1, 7, limit=20)], share=False)
    run(scheduler, schedule(scheduler, steps=8))
    run(scheduler, schedule(scheduler, steps=1))
    assert len(scheduler.running) == 2 and pool.free_pages == 0
    assert scheduler.schedule(4, 4, drained=False) is None and len(scheduler.running) == 2
    plan = schedule(scheduler)
    assert [s.index for s in plan.decoding] == [0]
    last = scheduler.waiting[0]
    assert (last.index, last.pages, last.computed) == (1, [], 0)
    while scheduler.running and scheduler.running[0].index == 0:
        run(scheduler, plan)
        plan = schedule(scheduler)
    chunk = plan.chunks[0]  # of what it had, all but its last token; the next one is no first
    assert (chunk.start, chunk.end, chunk.samples) == (0, 7 + len(last.tokens) - 1, False)


def test_full_pages_are_shared_and_the_last_token_is_computed():
    prefix = list(range(16))
    pool, scheduler = make(
        32, [sequence(0, prefix + [50]), sequence(1, prefix + [60]), sequence(2, prefix)]
    )
    plan = schedule(scheduler)
    # In the same call: rows append before they read.
    assert [(c.start, c.end) for c in plan.chunks] == [(0, 17), (16, 17), (8, 16)]
    first, second, third = (c.sequence for c in plan.chunks)
    assert second.pages[:2] == first.pages[:2] and third.pages[:1] == first.pages[:1]
    assert third.pages[1] != first.pages[1] and second.pages[2] != first.pages[2]
    assert scheduler.shared_tokens == 24
    for s in (first, second, third):
        scheduler.drop(s)
    assert pool.free_pages == 32


def test_without_sharing_no_page_has_two_owners():
    _, scheduler = make(32, [sequence(i, list(range(20))) for i in range(3)], share=False)
    pages = [page for c in schedule(scheduler).chunks for page in c.sequence.pages]
    assert len(set(pages)) == len(pages) == 9


@pytest.mark.parametrize("generated", [10, 16])
def test_what_was_generated_is_shared_too(generated):
    """The full pages of what was cached: the last token of all never is."""
    _, scheduler = make(32, [sequence(0, 8, limit=generated)])
    run(scheduler, schedule(scheduler, steps=16))
    again = [*range(8), *[7] * (generated + 1)]
    scheduler.waiting.append(sequence(1, again))
    (chunk,) = schedule(scheduler).chunks
    assert chunk.start == 16  # of 17 and of 23


def test_salted_pages_are_those_of_sequences_as_long():
    """With dynamic NTK a key depends on how long its sequence may become."""
    text = list(range(20))
    sequences = [sequence(i, text, limit) for i, limit in enumerate((5, 5, 6))]
    _, scheduler = make(32, sequences, salted=True)
    chunks = schedule(scheduler).chunks
    assert [(c.sequence.index, c.start) for c in chunks] == [(0, 0), (1, 16), (2, 0)]


@pytest.mark.parametrize("share", [False, True])
def test_any_load_ends_with_all_pages_free(share):
    rng = random.Random(1)
    for _ in range(20):
        sequences = [
            sequence(
                i, [rng.randrange(2) for _ in range(rng.randrange(1, 60))], rng.randrange(1, 60)
            )
            for i in range(15)
        ]
        pool, scheduler = make(16, sequences, places=4, budget=rng.choice([16, 64]), share=share)
        for _ in range(2000):
            plan = schedule(scheduler, steps=rng.randrange(1, 9))
            for chunk in plan.chunks:  # within what the sequence owns, and nobody else writes there
                assert chunk.end <= len(chunk.sequence.pages) * 8
            run(scheduler, plan)
            if not (scheduler.waiting or scheduler.running):
                break
        assert pool.free_pages == 16
        assert all(len(s.tokens) == s.limit for s in sequences)
