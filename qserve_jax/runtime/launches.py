"""Launches in order, by a thread of their own where launching takes as long as what is launched.

A Ctrl-C can leave a `threading.Condition` locked (turns.py), so nothing here waits on one, nor do
we use the futures and executors that do.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable
from queue import SimpleQueue

EXIT_SECONDS = 5.0
"""What the end of the process waits for launches on their way: a thread that comes back from XLA
to a Python that has ended takes the process down."""


class Launched[T]:
    """What a launch brings, once it is done."""

    def __init__(self, work: Callable[[], T]):
        self._work: Callable[[], T] | None = work
        self._brought: list[T] = []
        self._error: BaseException | None = None
        self._pending = threading.Lock()
        self._pending.acquire()

    def run_here(self) -> None:
        """Launch, and raise what it raises."""
        work = self._work
        try:
            if work is not None:
                self._brought.append(work())
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._work = None
            self._pending.release()

    def cancel(self) -> None:
        """Where it has not begun it never does, and has no result."""
        self._work = None

    def exception(self) -> BaseException | None:
        """What it raised. Waits for it."""
        with self._pending:
            return self._error

    def result(self) -> T:
        """Waits for it; raises what it raised, once: errors hold the frames that hold this."""
        if (error := self.exception()) is not None:
            self._error = None
            raise error
        return self._brought[0]


class Launcher:
    """Launches what it is given, one after the other. in_thread: by a thread of its own, which ends
    with the launcher."""

    def __init__(self, in_thread: bool):
        self._queue: SimpleQueue[Launched | None] | None = None
        if in_thread:
            self._queue = SimpleQueue()
            thread = threading.Thread(target=_serve, args=(self._queue,), daemon=True)
            _threads[thread] = self._queue
            thread.start()
            weakref.finalize(self, self._queue.put, None)

    def launch[T](self, work: Callable[[], T]) -> Launched[T]:
        """Without a thread: here and now, and raises what work() raises."""
        launched = Launched(work)
        if self._queue is None:
            launched.run_here()
        else:
            self._queue.put(launched)
        return launched


def _serve(queue: SimpleQueue[Launched | None]) -> None:
    while (launched := queue.get()) is not None:
        try:
            launched.run_here()
        except BaseException:  # whoever asks for its result is told
            pass
        del launched  # and what it holds


_threads: weakref.WeakKeyDictionary[threading.Thread, SimpleQueue] = weakref.WeakKeyDictionary()


@atexit.register
def _end_threads() -> None:
    end, threads = time.monotonic() + EXIT_SECONDS, list(_threads.items())
    for _, queue in threads:
        while not queue.empty():  # what has not begun never does
            queue.get()
        queue.put(None)
    for thread, _ in threads:
        thread.join(max(end - time.monotonic(), 0))
