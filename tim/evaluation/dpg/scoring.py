"""DPG-Bench's scores of ready answers: no image and no model is needed here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tim.evaluation.dpg.questions import Question

YES = "yes"  # the only answer that counts
Answers = Mapping[tuple[str, int, int], str]  # by image file's name, crop, proposition


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
    for question in questions:
        if not all(holds.get(parent, True) for parent in question.parents):
            holds[question.proposition] = False
    return sum(holds.values()) / len(holds)


def score_answers(questions: Mapping[str, Sequence[Question]], answers: Answers, images: Sequence[str], crops: int) -> Scores:
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


def summary(scores: Scores) -> dict[str, Any]:
    """What the record keeps of the scores."""
    return {"score": scores.score, "categories_level_1": scores.broad, "categories_level_2": scores.detailed}
