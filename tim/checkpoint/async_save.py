"""Writing checkpoints at once, or in a thread while training goes on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Saver:
    """Does one piece of writing after the other.

    Args:
        background: write in a thread; otherwise `submit` returns when the work is done.
    """

    def __init__(self, background: bool) -> None:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None
        self.pending: Future | None = None

    def submit(self, write: Callable[[], Any]) -> None:
        """Wait for the piece before, then do this one. What it reads must not change until `wait` returns.

        Raises:
            Exception: whatever the piece before (in a thread) or this one (at once) raised.
        """
        self.wait()
        if self.pool is None:
            write()
        else:
            self.pending = self.pool.submit(write)

    def wait(self) -> None:
        """Return when everything submitted is done; raises its error."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, then end the thread."""
        try:
            self.wait()
        finally:
            if self.pool is not None:
                self.pool.shutdown()
