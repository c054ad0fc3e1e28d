"""Threads take turns at one piece of work. No Ctrl-C, at whatever moment, keeps a turn taken."""

from __future__ import annotations

import threading
from collections.abc import Callable

WAKE_SECONDS = 1.0
"""Who waits looks by itself this often, should a Ctrl-C keep the last turn from waking it."""


class Turns:
    """One turn at a time, of whichever thread asks first.

    CPython raises KeyboardInterrupt after a call or a jump backwards, never between two plain
    loads and stores; and `with` on a lock written in C holds it or does not. The code below leans
    on both, where a `threading.Condition`, which is Python, can be left with its lock held.
    """

    def __init__(self):
        self._lock = threading.RLock()  # the garbage collector may close a stream within
        self._turn: object = None
        self._gates: list[threading.Lock] = []

    def take(self, work: Callable[[], object]) -> bool:
        """Do the work and return True, or False at once where somebody has the turn."""
        mine = object()
        try:
            with self._lock:
                if self._turn is None:
                    self._turn = mine
            if self._turn is not mine:
                return False
            work()
            return True
        finally:
            if self._turn is mine:
                self._turn = None  # first of all, before any call
                self._wake()

    def _wake(self) -> None:
        with self._lock:
            gates, self._gates = self._gates, []
        for gate in gates:
            gate.release()

    def wait(self) -> None:
        """Until the turn that somebody has is over."""
        gate = threading.Lock()
        gate.acquire()
        with self._lock:
            if self._turn is None:
                return
            self._gates.append(gate)
        gate.acquire(timeout=WAKE_SECONDS)
