"""The next micro-batch is read, and copied to the GPU, while the present one is computed."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Literal, cast, get_args

import torch

from tim.data.batch import Batch
from tim.distributed import to_device

# What is computed with; whatever decides something is read on the host.
Moved = Literal["latent", "image", "features", "label", "dropped", "noise", "posterior", "guidance"]
MOVED: tuple[Moved, ...] = get_args(Moved)


class Prefetcher:
    """Iterates over batches, one ahead: a thread takes the next from the loader and copies it on a stream of its own.

    On a CPU nothing is copied. The order of batches is the loader's; its errors are raised where the batch is due.
    No other part of a step copies a batch: what the device is to have of it is in `MOVED`.

    Args:
        loader: yields micro-batches, their tensors in pinned memory when `device` is a GPU.
        device: where the tensors of `MOVED` go.
        complete: adds to a batch what its step needs besides, in the thread and on its stream, which alone wait for what it
            reads.
    """

    def __init__(
        self, loader: Iterable[Batch], device: torch.device, complete: Callable[[Batch], Batch] = lambda batch: batch
    ) -> None:
        self._batches = iter(loader)  # here, since workers should be started by the main thread
        self._device, self._complete = device, complete
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._waited = 0.0
        self._marks: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._next = self._thread.submit(self._fetch)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        began, before = time.perf_counter(), self._mark() if self._stream else None
        fetched = self._next.result()
        if fetched is None:
            raise StopIteration
        batch, copied = fetched
        self._next = self._thread.submit(self._fetch)
        if before is None or copied is None:
            self._waited += time.perf_counter() - began
            return batch
        current = torch.cuda.current_stream(self._device)
        current.wait_event(copied)
        for value in batch.values():
            if isinstance(value, torch.Tensor) and value.device.type == "cuda":
                value.record_stream(current)  # else its memory could be reused before the step has read it
        self._marks.append((before, self._mark()))
        return batch

    def close(self) -> None:
        """End the loader's workers. Left to the end of Python they would be waited for, and they do not hear its SIGTERM."""
        self._thread.shutdown(cancel_futures=True)
        getattr(self._batches, "_shutdown_workers", lambda: None)()

    def waited(self) -> float:
        """Seconds since the last call in which the device had nothing to compute because data was missing.

        On a GPU this is the time between the end of the work that was queued when a batch was asked for and the arrival of
        the batch, by the device's own clock. Nothing waits for the clock: what it has not told yet is counted next time.
        """
        while self._marks and self._marks[0][1].query():
            before, after = self._marks.popleft()
            self._waited += before.elapsed_time(after) / 1000
        waited, self._waited = self._waited, 0.0
        return waited

    def _mark(self) -> torch.cuda.Event:
        """A place in the work that the device has been given."""
        mark = torch.cuda.Event(enable_timing=True)
        mark.record(torch.cuda.current_stream(self._device))
        return mark

    def _fetch(self) -> tuple[Batch, torch.cuda.Event | None] | None:
        """In the thread: the next batch and the event of its copy; None at the end."""
        batch = next(self._batches, None)
        if batch is None:
            return None
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            batch = self._complete(batch)
            moved = {key: to_device(batch[key], self._device) for key in MOVED if key in batch}
        return cast(Batch, {**batch, **moved}), self._stream.record_event() if self._stream else None
