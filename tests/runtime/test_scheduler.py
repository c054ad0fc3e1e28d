"""Admission, retirement and pages, without a model."""

import pytest

from qserve_jax.runtime.detokenizer import IncrementalDetokenizer
from qserve_jax.runtime.page_table import PagePool
from qserve_jax.runtime.sampling_params import SamplingParams
from qserve_jax.runtime.scheduler import Scheduler
from qserve_jax.runtime.sequence import Sequence


def sequence(index: int, length: int) -> Sequence:
    """One whose longest length is `length`."""
    return Sequence(
        index, 0, [1], SamplingParams(), 0, length - 1, (), IncrementalDetokenizer(None)
    )


def test_admits_in_order_while_pages_and_places_last():
    pool = PagePool(num_pages=4, page_size=8)
    scheduler = Scheduler([sequence(0, 9), sequence(1, 17), sequence(2, 8)], pool, 8)
    assert [s.index for s in scheduler.admit()] == [0]  # 1 needs 3 pages; 2 does not overtake it
    assert pool.free_pages == 2 and len(scheduler.running[0].pages) == 2
    scheduler.running[0].finish_reason = "stop"
    assert scheduler.retire() and pool.free_pages == 4
    assert [s.index for s in scheduler.admit()] == [1, 2]
    assert not scheduler.retire() and pool.free_pages == 0
    scheduler.close()
    assert pool.free_pages == 4


def test_places_bound_the_batch():
    pool = PagePool(num_pages=9, page_size=8)
    scheduler = Scheduler([sequence(i, 8) for i in range(5)], pool, 2)
    assert len(scheduler.admit()) == 2 and len(scheduler.admit()) == 0


def test_pages_are_never_shared():
    pool = PagePool(num_pages=6, page_size=8)
    scheduler = Scheduler([sequence(i, 16) for i in range(3)], pool, 8)
    pages = [page for s in scheduler.admit() for page in s.pages]
    assert sorted(pages) == list(range(6))


def test_who_can_never_run_is_told():
    pool = PagePool(num_pages=2, page_size=8)
    held = pool.allocate(1)
    scheduler = Scheduler([sequence(0, 16)], pool, 8)
    with pytest.raises(RuntimeError, match="needs 2 pages and 1 of 2 are free"):
        scheduler.admit()
    assert held is not None
    pool.release(held)
    assert len(scheduler.admit()) == 1
