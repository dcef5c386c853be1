"""DPG-Bench's questions: propositions of a prompt, which others they depend on, and their categories."""

import csv
import warnings
from dataclasses import dataclass
from pathlib import Path

from tim.evaluation.inputs import SHOWN

COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
DOWNLOAD = "bash tools/download_benchmarks.sh --only dpg fetches it"


@dataclass(frozen=True)
class Question:
    """A question about a prompt's image.

    Attributes:
        proposition: its number within the prompt.
        text: what the judge is asked.
        parents: propositions without which this one counts as failed.
        category: level-2 category, e.g. `attribute - color`.
    """

    proposition: int
    text: str
    parents: tuple[int, ...]
    category: str

    @property
    def broad_category(self) -> str:
        """Level-1 category, e.g. `attribute`."""
        return self.category.partition("-")[0].strip()


def read_questions(path: Path) -> dict[str, list[Question]]:
    """Questions by prompt id, in the file's order. The first data row does not count, as in the official scores.

    Raises:
        FileNotFoundError: when there is no such file; the message says how to get it.
        ValueError: when it lacks a column, or a row is no question; the message names the row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no questions {path}; {DOWNLOAD}")
    found: dict[str, dict[int, Question]] = {}
    twice = []
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} has no column {', '.join(missing)}; DPG-Bench's dpg_bench.csv is expected, {DOWNLOAD}")
        next(reader, None)
        for row in reader:
            item, question = _parse(row, f"{path} line {reader.line_num}")
            own = found.setdefault(item, {})
            if question.proposition in own:
                twice.append(f"{item} {question.proposition}")
            own[question.proposition] = question
    if not found:
        raise ValueError(f"{path} holds no questions after its first row; {DOWNLOAD}")
    orphans = [f"{item} {q.proposition}" for item, own in found.items() for q in own.values() if not own.keys() >= {*q.parents}]
    for names, what in ((twice, "twice; the last one counts"), (orphans, "with a parent that is not asked; it bars nothing")):
        if names:
            shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
            warnings.warn(f"{path}: {len(names)} propositions {what}: {shown}", stacklevel=2)
    return {item: list(own.values()) for item, own in found.items()}


def _parse(row: dict[str, str | None], where: str) -> tuple[str, Question]:
    item, number, dependency, label, text = (row[name] or "" for name in COLUMNS)
    try:
        parents = tuple(int(n) for n in dependency.split(","))
        question = Question(int(number), text.strip(), tuple(n for n in parents if n), label.partition("(")[0].strip())
    except ValueError:
        raise ValueError(
            f"{where}: proposition_id {number!r} and dependency {dependency!r} must be numbers such as 3 and '1, 2'"
        ) from None
    if not (item and question.text and question.category):
        raise ValueError(f"{where}: item_id, tuple and question_natural_language must not be empty")
    return item, question
