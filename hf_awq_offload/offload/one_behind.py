"""Does one thing at a time in a thread, at most one behind the caller."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class OneBehind:
    """Runs calls in their order in one thread. A call that is given waits for the one before it.

    A call that runs out of memory in the thread, beside whatever else is at work, is repeated by `wait`. The thread
    starts at once: later, a limit on memory may leave no room for its stack.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str):
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._pool.submit(int).result()
        self._running: tuple[Callable[[], object], Future[Any]] | None = None

    def start(self, call: Callable[[], object]) -> None:
        """Starts `call`, which may be repeated, once the one before it has ended; raises what that one raised."""
        self.wait()
        self._running = call, self._pool.submit(call)

    def wait(self) -> None:
        """Waits for what was started; raises what it raised, once."""
        if self._running is None:
            return
        call, future = self._running
        try:
            future.result()
        except MemoryError:
            call()
        finally:
            if future.done():  # or else the wait was interrupted
                self._running = None

    def close(self) -> None:
        """Lets what was started end, and ends the thread."""
        self._pool.shutdown(wait=True)
