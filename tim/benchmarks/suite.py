"""Measure many things within a time limit: whatever one of them does, the others are measured, and what is measured is kept."""

import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tim.files import lock, read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
SPAWN = multiprocessing.get_context("spawn")  # a forked process could not use a GPU
MACHINE = "machine"  # the group that tells where the rest was measured
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
    clean: Callable[[], None] = lambda: None
    seconds: float = 150


def attempt(case: Case) -> tuple[Record, bool]:
    """What was measured, or an `error`; and whether this process can go on."""
    try:
        return case.run(**case.keywords), True
    except Exception as error:
        record = {"error": describe(error)}
    try:
        case.clean()
    except Exception:
        return record, False
    return record, True


def describe(error: Exception) -> str:
    """An error in a line, with the place in this repository that it came through last."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(ROOT / "tim")]
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


def run_suite(
    cases: Sequence[Case], out: Path, minutes: float, isolated: bool, show: Callable[[list[Record]], None]
) -> list[Record]:
    """Measure cases in their order, and write `out`/results.json after each.

    What the file holds already is not measured again, but for what failed.

    Args:
        isolated: measure in a process of its own.
        show: called with all records after each case.

    Returns:
        A record of each case: group, name, and numbers or `error`.

    Raises:
        ValueError: when the file is of another machine.
    """
    deadline, file, worker = time.monotonic() + 60 * minutes, out / "results.json", Worker()
    with lock(out):
        before = {record["name"]: record for record in (read_json(file) if file.is_file() else []) if "error" not in record}
        records: list[Record] = []
        try:
            for case in cases:
                head, left = {"group": case.group, "name": case.name}, deadline - time.monotonic()
                if case.group != MACHINE and case.name in before:
                    records.append(before[case.name])
                    continue
                if left <= 0:
                    records.append({**head, "error": "no time was left"})
                    continue
                seconds = min(left, case.seconds)
                records.append({**head, **(worker.measure(case, seconds) if isolated else attempt(case)[0])})
                if case.group == MACHINE:
                    _check_machine(before.get(case.name), records[-1], file)
                rest = [before[c.name] for c in cases[len(records) :] if c.name in before]
                write_json(file, records + rest)
                show(records)
        finally:
            worker.close()
        write_json(file, records)
    return records


def _check_machine(before: Record | None, now: Record, file: Path) -> None:
    """Refuse to mix results of two machines in a file."""
    for key in ("device", "torch"):
        if before is not None and before.get(key) != now.get(key):
            raise ValueError(f"{file} holds results of {before.get(key)}, this is {now.get(key)}; choose another --out")
