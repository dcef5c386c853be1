"""DPG-Bench without images and models: its questions, the answers to them, and the scores of these."""

import csv
import io
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tim.evaluation.inputs import shown
from tim.files import read_json, read_text

COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
DOWNLOAD = "bash tools/download_benchmarks.sh --only dpg fetches it"
ROW = ("image", "crop", "proposition_id", "answer")  # what a row of answers must have
YES = "yes"  # the only answer that counts


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


Questions = Mapping[str, Sequence[Question]]  # by prompt id, the stem of the image file's name
Answers = Mapping[tuple[str, int, int], str]  # by image file's name, crop, proposition


def read_questions(path: Path) -> dict[str, list[Question]]:
    """Questions by prompt id, in the file's order.

    As in the official scores, the first data row does not count, and where the rows of a prompt are in several blocks, the
    last block alone counts.

    Raises:
        FileNotFoundError: when there is no such file; the message says how to get it.
        ValueError: when it lacks a column, or a row is no question; the message names the row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no questions {path}; {DOWNLOAD}")
    found: dict[str, dict[int, Question]] = {}
    twice, again, before = [], [], ""
    for row, where in _rows(path):
        item, question = _parse(row, where)
        if item != before:  # a new block, which takes the place of an earlier one
            again += [item] * (item in found)
            found[item] = {}
        own, before = found[item], item
        if question.proposition in own:
            twice.append(f"{item} {question.proposition}")
        own[question.proposition] = question
    if not found:
        raise ValueError(f"{path} holds no questions after its first row; {DOWNLOAD}")
    orphans = [f"{item} {q.proposition}" for item, own in found.items() for q in own.values() if not own.keys() >= {*q.parents}]
    for names, what in (
        (again, "prompts are in several blocks of rows; the last one counts"),
        (twice, "propositions twice; the last one counts"),
        (orphans, "propositions with a parent that is not asked; it bars nothing"),
    ):
        if names:
            warnings.warn(f"{path}: {len(names)} {what}: {shown(names)}", stacklevel=2)
    return {item: list(own.values()) for item, own in found.items()}


def _rows(path: Path) -> Iterator[tuple[dict[str, str | None], str]]:
    """Rows of the questions but the first, which the official scorer skips, and where each is, for messages."""
    with io.StringIO(read_text(path)) as file:
        reader = csv.DictReader(file)
        try:
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(
                    f"{path} has no column {', '.join(missing)}; DPG-Bench's dpg_bench.csv is expected, {DOWNLOAD}"
                )
            next(reader, None)
            for row in reader:
                yield row, f"{path} line {reader.line_num}"
        except csv.Error as error:
            raise ValueError(f"{path} is no CSV after line {reader.line_num}: {error}; {DOWNLOAD}") from error


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


def answer_rows(questions: Questions, answers: Answers, images: Iterable[str], crops: int) -> list[dict[str, Any]]:
    """The answers about images, ordered by image, crop and question.

    Returns:
        rows with image (file name), crop (0-based, row-major), proposition_id, question, answer.
    """
    return [
        {
            "image": image,
            "crop": crop,
            "proposition_id": question.proposition,
            "question": question.text,
            "answer": answers[image, crop, question.proposition],
        }
        for image in images
        for crop in range(crops)
        for question in questions[Path(image).stem]
    ]


def read_answers(path: Path) -> Answers:
    """Answers by image, crop and proposition of a file in the form of `answer_rows`.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no such file, or answers a question in two ways; the message names the row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file of answers {path}")
    rows = read_json(path)
    if not isinstance(rows, list):
        raise ValueError(f"{path} is no list of answers")
    answers: dict[tuple[str, int, int], str] = {}
    for number, row in enumerate(rows):
        values: tuple[Any, ...] = tuple(row.get(name) for name in ROW) if isinstance(row, dict) else ()
        if tuple(map(type, values)) != (str, int, int, str):
            raise ValueError(f"{path}: entry {number} has no image, crop, proposition_id and answer: {row!r}")
        image, crop, proposition, answer = values
        if answers.setdefault((image, crop, proposition), answer) != answer:
            raise ValueError(f"{path}: image {image}, crop {crop}, proposition {proposition} has two different answers")
    return answers


@dataclass(frozen=True)
class Scores:
    """Scores of a folder of images.

    Attributes:
        score: mean over the images, in percent.
        images: by file name, the score in [0, 1] of every crop.
        broad, detailed: by level-1 and level-2 category, the share of yes in percent.
        questions: number of questions asked about one crop of every image.
    """

    score: float
    images: dict[str, list[float]]
    broad: dict[str, float]
    detailed: dict[str, float]
    questions: int


def score_crop(questions: Sequence[Question], said_yes: Mapping[int, bool]) -> float:
    """Share of the questions that hold with all their parents.

    Failures are handed on in the order of the questions: a parent further down counts as it was answered.
    """
    holds = dict(said_yes)
    # in one pass, as the official scorer does, although a parent that fails later would take this question with it
    for question in questions:
        if not all(holds.get(parent, True) for parent in question.parents):
            holds[question.proposition] = False
    return sum(holds.values()) / len(holds)


def score_answers(questions: Questions, answers: Answers, images: Sequence[str], crops: int) -> Scores:
    """Score images by the answers about them.

    A category's score is the share of yes among the answers about each image's last crop, whatever became of their
    parents: so did the official scorer, and its published category scores.

    Args:
        questions: by prompt id.
        answers: of every image, crop and question.
        images: file names, `{prompt id}.*`, each with questions.
        crops: parts that an image is cut into.

    Raises:
        ValueError: names image, crop and proposition of a missing answer.
    """
    scores: dict[str, list[float]] = {}
    broad: dict[str, list[bool]] = {}
    detailed: dict[str, list[bool]] = {}
    for image in images:
        asked = questions[Path(image).stem]
        yes = [{q.proposition: _answer(answers, image, crop, q.proposition) == YES for q in asked} for crop in range(crops)]
        scores[image] = [score_crop(asked, said) for said in yes]
        for question in asked:
            said_yes = yes[-1][question.proposition]
            broad.setdefault(question.broad_category, []).append(said_yes)
            detailed.setdefault(question.category, []).append(said_yes)
    return Scores(
        score=float(np.mean([np.mean(own) for own in scores.values()])) * 100,
        images=scores,
        broad=_percent(broad),
        detailed=_percent(detailed),
        questions=sum(map(len, detailed.values())),
    )


def _answer(answers: Answers, image: str, crop: int, proposition: int) -> str:
    try:
        return answers[image, crop, proposition]
    except KeyError:
        raise ValueError(f"no answer for image {image}, crop {crop}, proposition {proposition}") from None


def _percent(said_yes: dict[str, list[bool]]) -> dict[str, float]:
    return {category: sum(own) / len(own) * 100 for category, own in sorted(said_yes.items())}


def result_text(scores: Scores, folder: Path, res_path: Path, judge: str | None = None) -> str:
    """The result file: a line an image (crops, mean), the categories, the score.

    Args:
        folder: of the images, as the user gave it.
        res_path: of the result file, as the user gave it.
        judge: named in a line of its own when it is not the official one, whose scores it must not be compared with.
    """
    lines = [f"{folder / name}, {', '.join(map(str, [*own, float(np.mean(own))]))}" for name, own in scores.images.items()]
    lines.append(f"Model: {folder.absolute().name}")
    if judge is not None:
        lines.append(f"VQA model: {judge}")
    for level, categories in (("L1", scores.broad), ("L2", scores.detailed)):
        lines += [f"{level} category scores:", *(f"\t{name}: {value}" for name, value in categories.items())]
    lines += [f"Image path: {folder}", f"Save results to: {res_path}", f"DPG-Bench score: {scores.score}"]
    return "\n".join(lines) + "\n"
