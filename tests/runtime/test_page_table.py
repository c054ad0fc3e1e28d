"""Pages: handed out, shared, forgotten; never two owners that do not know of each other."""

import random

from qserve_jax.runtime.page_table import PagePool, page_keys


def keys_of(tokens, page_size=4, salt=0):
    keys = []
    page_keys(tokens, page_size, keys, salt)
    return keys


def take(pool, count):
    pages = pool.allocate(count)
    assert pages is not None
    return pages


def test_keys_stand_for_the_whole_beginning():
    a, b = keys_of([1, 2, 3, 4, 5, 6, 7, 8, 9]), keys_of([1, 2, 3, 0, 5, 6, 7, 8])
    assert len(a) == 2 and len(set(a + b)) == 4  # the second pages hold the same tokens
    assert keys_of([1, 2, 3, 4]) == a[:1]
    assert keys_of([1, 2, 3, 4], salt=1) != a[:1]
    known = a[:1]
    page_keys([1, 2, 3, 4, 5, 6, 7, 8], 4, known)
    assert known == a


def test_a_shared_page_is_free_when_its_last_user_is_gone():
    pool = PagePool(4, 4)
    keys = keys_of(range(8))
    pages = take(pool, 2)
    for page, key in zip(pages, keys, strict=True):
        pool.publish(page, key)
    assert pool.share(keys) == pages and pool.share(keys_of([9, 9, 9, 9])) == []
    pool.release(pages)
    assert pool.free_pages == 2
    pool.release(pages)
    assert pool.free_pages == 4
    assert pool.share(keys) == pages and pool.free_pages == 2  # the contents are still there


def test_the_longest_unused_goes_first_and_of_a_text_its_end():
    pool = PagePool(4, 4)
    old, new = keys_of(range(8)), keys_of(range(50, 58))
    for keys in (old, new):
        pages = take(pool, 2)
        for page, key in zip(pages, keys, strict=True):
            pool.publish(page, key)
        pool.release(pages)
    taken = take(pool, 1)
    assert len(pool.share(old)) == 1
    take(pool, 1)
    assert pool.free_pages == 1  # all but one of `new`
    assert len(pool.share(new)) == 1 and pool.allocate(1) is None
    assert taken is not None


def test_a_second_page_of_the_same_contents_is_not_known():
    pool = PagePool(2, 4)
    keys = keys_of(range(4))
    first, second = take(pool, 2)
    pool.publish(first, keys[0])
    pool.publish(second, keys[0])
    pool.release([second])
    assert pool.share(keys) == [first]


def test_a_cleared_pool_has_all_pages_and_knows_none():
    pool = PagePool(4, 4)
    used, unused = take(pool, 2), take(pool, 1)
    for page, key in zip(used + unused, (b"x", b"y", b"z"), strict=True):
        pool.publish(page, key)
    pool.release(unused)
    pool.clear()
    assert pool.free_pages == 4
    assert [pool.share([key]) for key in (b"x", b"y", b"z")] == [[], [], []]
    assert sorted(take(pool, 4)) == [0, 1, 2, 3]


def test_random_use_never_loses_or_doubles_a_page():
    rng, pool = random.Random(0), PagePool(12, 2)
    held = []
    for _ in range(3000):
        if held and rng.random() < 0.5:
            pool.release(held.pop(rng.randrange(len(held))))
        else:
            keys = keys_of([rng.randrange(2) for _ in range(8)], 2)
            pages = pool.share(keys)
            more = pool.allocate(len(keys) - len(pages))
            if more is None:
                pool.release(pages)
                continue
            for page, key in zip(pages + more, keys, strict=True):
                pool.publish(page, key)
            held.append(pages + more)
        used = {page for pages in held for page in pages}
        assert pool.free_pages == 12 - len(used)
        assert all(len(set(pages)) == len(pages) for pages in held)
    for pages in held:
        pool.release(pages)
    assert pool.free_pages == 12
    assert sorted(take(pool, 12)) == list(range(12))
