"""Answers as a file: one row an image, crop and question, which can be scored again without images and models."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tim.evaluation.dpg.questions import Question

KEY = ("image", "crop", "proposition_id")


def answer_rows(
    questions: Mapping[str, Sequence[Question]], answers: Mapping[tuple[str, int, int], str], images: Iterable[str], crops: int
) -> list[dict[str, Any]]:
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


def read_answers(path: Path) -> dict[tuple[str, int, int], str]:
    """Answers by image, crop and proposition of a file in the form of `answer_rows`.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no such file, or answers a question in two ways; the message names the row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file of answers {path}")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} is no list of answers")
    answers: dict[tuple[str, int, int], str] = {}
    for number, row in enumerate(rows):
        key = tuple(row.get(name) for name in KEY) if isinstance(row, dict) else ()
        if tuple(map(type, key)) != (str, int, int) or not isinstance(row.get("answer"), str):
            raise ValueError(f"{path}: entry {number} has no image, crop, proposition_id and answer: {row!r}")
        if answers.setdefault(key, row["answer"]) != row["answer"]:
            raise ValueError(f"{path}: image {key[0]}, crop {key[1]}, proposition {key[2]} has two different answers")
    return answers
