"""Measure many things within a time limit: whatever one of them does, the others are measured, and what is measured is kept."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tim.benchmarks.isolation import Case, Record, Worker, attempt
from tim.files import lock, read_json, write_json

MACHINE = "machine"  # the group that tells where the rest was measured


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
