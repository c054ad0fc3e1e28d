"""Turns of threads, and a Ctrl-C at any moment of them."""

import random
import signal
import threading
import time

import pytest

from qserve_jax.runtime.turns import WAKE_SECONDS, Turns


@pytest.fixture
def interrupts():
    """A function that has KeyboardInterrupt raised after so many seconds, wherever we are then."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_one_works_and_nobody_waits_for_the_turn():
    turns, seen = Turns(), []
    assert turns.take(lambda: seen.append(turns.take(lambda: seen.append("within"))))
    assert seen == [False]
    with pytest.raises(OSError):
        turns.take(lambda: open("/no such file"))
    assert turns.take(lambda: None)
    turns.wait()  # for nobody: at once


def test_who_waits_is_woken_by_the_end_of_the_turn():
    turns, begun, go_on = Turns(), threading.Event(), threading.Event()

    def work():
        begun.set()
        go_on.wait()

    worker = threading.Thread(target=lambda: turns.take(work))
    worker.start()
    begun.wait()
    assert not turns.take(lambda: None)
    threading.Timer(0.05, go_on.set).start()
    start = time.monotonic()
    turns.wait()
    assert 0.04 < time.monotonic() - start < WAKE_SECONDS / 2
    worker.join()


def test_no_interruption_keeps_the_turn(interrupts):
    rng, turns = random.Random(0), Turns()
    for _ in range(4000):
        try:
            interrupts(rng.uniform(2e-6, 2e-4))
            while True:
                assert turns.take(lambda: None)
        except KeyboardInterrupt:
            pass
        assert turns.take(lambda: None), "a turn is taken, and nobody at work"


def test_a_thread_goes_on_whatever_interrupts_another(interrupts):
    rng, turns, steps, over = random.Random(0), Turns(), [], threading.Event()

    def run():
        while not over.is_set():
            if turns.take(lambda: steps.append(1)):
                time.sleep(0)
            else:
                turns.wait()

    other = threading.Thread(target=run)
    other.start()
    for _ in range(400):
        before = len(steps)
        try:
            interrupts(rng.uniform(1e-5, 2e-3))
            while True:
                if not turns.take(lambda: None):
                    turns.wait()
        except KeyboardInterrupt:
            pass
        waited = time.monotonic() + 3 * WAKE_SECONDS
        while len(steps) == before and time.monotonic() < waited:
            time.sleep(1e-4)
        assert len(steps) > before, "the other thread stands still"
    over.set()
    other.join()
