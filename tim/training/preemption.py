"""Leaving a run in good order: signals and the time limit, agreed between all processes."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

EXIT_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: stopped with a checkpoint; run the same command again to continue
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
WALLTIME = 255  # in the place of a signal's number
SAVE_GUESS = 60.0  # seconds, until a save has been timed; never more than a twentieth of the limit


class Preemption:
    """Whether to leave after this step. A context manager: it handles the signals while it is open.

    The processes exchange one integer per step over gloo, on the CPU: the exchange starts with the step and is read at
    its end, so that it costs no waiting and never involves the GPU. What reaches one process during a step makes all
    of them leave at the end of the next one at the latest, the same for all.

    Args:
        group: gloo group of all processes; None for a single one.
        walltime: seconds from now by which the last checkpoint must stand; None for no limit.
    """

    def __init__(self, group: dist.ProcessGroup | None, walltime: float | None) -> None:
        self.group, self.walltime = group, walltime
        self.began = self.step_began = time.monotonic()
        self.slowest_step, self.slowest_save = 0.0, 0.0
        self.received = 0
        self.flag = torch.zeros(1, dtype=torch.int64)
        self.exchange: dist.Work | None = None
        self.previous: dict[int, Any] = {}  # handlers of the signals before

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self.previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def begin_step(self) -> None:
        """Tell the others whether this process wants to leave."""
        self.step_began = time.monotonic()
        if self.group is not None:
            self.flag.fill_(self._wanted())
            self.exchange = dist.all_reduce(self.flag, dist.ReduceOp.MAX, group=self.group, async_op=True)

    def end_step(self) -> str | None:
        """Why all processes leave now, or None."""
        if self.exchange is None:
            number = self._wanted()
        else:
            self.exchange.wait()
            number = int(self.flag)
        self.slowest_step = max(self.slowest_step, time.monotonic() - self.step_began)
        if number == 0:
            return None
        return "the time limit training.walltime" if number == WALLTIME else signal.Signals(number).name

    def saved(self, seconds: float) -> None:
        """Note how long a save took, to leave early enough for the last one."""
        self.slowest_save = max(self.slowest_save, seconds)

    def _wanted(self) -> int:
        """The signal that this process received, WALLTIME when a step and a save more would not fit, or 0."""
        if self.received or self.walltime is None:
            return self.received
        save = 1.5 * self.slowest_save or min(SAVE_GUESS, self.walltime / 20)
        needed = 2 * self.slowest_step + save
        return WALLTIME if time.monotonic() - self.began + needed > self.walltime else 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; the second Ctrl-C ends the process at once."""
        if number == signal.SIGINT and self.received == signal.SIGINT:
            os._exit(128 + number)  # whatever is half-written is no checkpoint
        self.received = number
        if number == signal.SIGINT and (self.group is None or dist.get_rank() == 0):
            # print() may be interrupted in its own lock by this very handler.
            os.write(2, b"\nleaving after this step with a checkpoint; once more to stop at once\n")


def ignore_signals(worker: int) -> None:
    """For data workers: a signal to the whole process group is the trainer's to answer."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
