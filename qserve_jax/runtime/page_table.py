"""The host's book of cache pages: who uses them, and which hold the beginning of a known text.

A full page whose tokens are known has a key, the hash of its tokens and of all before them. A page
that nobody uses any more keeps its contents until the room is needed, the longest unused first, so
that a sequence that begins the same way can share it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np


def page_keys(tokens: Sequence[int], page_size: int, known: list[bytes], salt: int = 0) -> None:
    """Extend `known`, keys of the first pages of `tokens`, to all its full pages.

    salt: sequences share pages only with others of the same.
    """
    for page in range(len(known), len(tokens) // page_size):
        before = known[-1] if known else str(salt).encode()
        own = np.asarray(tokens[page * page_size : (page + 1) * page_size], np.int32).tobytes()
        known.append(hashlib.blake2b(before + own, digest_size=16).digest())


class PagePool:
    """Page ids 0..num_pages-1, handed out and taken back. Several may use a page that has a key."""

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages, self.page_size = num_pages, page_size
        self.clear()

    def clear(self) -> None:
        """Nobody uses any page, and the contents of all are lost."""
        self._free = list(range(self.num_pages - 1, -1, -1))
        self._users = [0] * self.num_pages
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._unused: dict[int, None] = {}  # pages with a key and no user, longest unused first

    @property
    def free_pages(self) -> int:
        """Pages that nobody uses."""
        return len(self._free) + len(self._unused)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold num_tokens tokens."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` page ids, or None when fewer are free."""
        if count > self.free_pages:
            return None
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._users[page] = 1
        return pages

    def _evict(self) -> int:
        page = next(iter(self._unused))
        del self._unused[page], self._page_of[self._key_of.pop(page)]
        return page

    def release(self, pages: Sequence[int]) -> None:
        """Give pages back. Of a text, the end is forgotten before the beginning."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._key_of:
                self._unused[page] = None
            else:
                self._free.append(page)

    def publish(self, page: int, key: bytes) -> None:
        """The page holds what `key` stands for, or will before anyone can read it."""
        if key not in self._page_of:  # else another page does, and this one will be free again
            self._page_of[key] = page
            self._key_of[page] = key

    def share(self, keys: Iterable[bytes]) -> list[int]:
        """Pages that hold the longest known beginning of `keys`, now used once more each."""
        pages = []
        for key in keys:
            if (page := self._page_of.get(key)) is None:
                break
            self._unused.pop(page, None)
            self._users[page] += 1
            pages.append(page)
        return pages
