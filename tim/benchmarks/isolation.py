"""Measure one thing without harm to the next: an error becomes a line, and a process that dies or hangs is started anew."""

import multiprocessing
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SPAWN = multiprocessing.get_context("spawn")  # a forked process could not use a GPU
Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Something to measure: `run(**keywords)` returns numbers and words by name.

    Attributes:
        group: the table that its line belongs to.
        clean: called after a failure; when that fails too, the process is of no more use.
        seconds: after which something must be wrong with it.
    """

    group: str
    name: str
    run: Callable[..., Record]
    keywords: Record = field(default_factory=dict)
    clean: Callable[[], None] | None = None
    seconds: float = 150


def attempt(case: Case) -> tuple[Record, bool]:
    """What was measured, or an `error`; and whether this process can go on."""
    try:
        return case.run(**case.keywords), True
    except Exception as error:
        record = {"error": describe(error)}
    try:
        if case.clean is not None:
            case.clean()
    except Exception:
        return record, False
    return record, True


def describe(error: Exception) -> str:
    """An error in a line, with the place in this repository that it came through last."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # without the one that caught it
    frames = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT / "tim")]
    place = f" ({Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno})" if frames else ""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}{place}"


class Worker:
    """A process that measures case after case: a GPU in disorder, or a crash, ends it and not the suite."""

    def __init__(self) -> None:
        self._process: Any = None

    def measure(self, case: Case, seconds: float) -> Record:
        """The record of a case, which is given up after some seconds."""
        if self._process is None:
            self._connection, theirs = SPAWN.Pipe()
            self._process = SPAWN.Process(target=_serve, args=(theirs,))
            self._process.start()
            theirs.close()  # else the end of the process would not be noticed
        try:
            self._connection.send(case)
            if not self._connection.poll(seconds):
                self.close()
                return {"error": f"stopped after {seconds:.0f} s"}
            record, healthy = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            record, healthy = {"error": f"its process ended with code {self._process.exitcode}"}, False
        if not healthy:
            self.close()
        return record

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None


def _serve(connection: Any) -> None:
    """Measure what is asked for until nobody asks any more."""
    while True:
        try:
            case = connection.recv()
        except EOFError:
            return
        connection.send(attempt(case))
