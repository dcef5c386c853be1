"""DPG-Bench on a folder of images: match them with the questions, collect the answers, write scores and answers."""

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from PIL import Image

from tim.evaluation.dpg.judges import load_judge
from tim.evaluation.dpg.scoring import (
    Answers,
    Question,
    Questions,
    answer_rows,
    read_answers,
    read_questions,
    result_text,
    score_answers,
)
from tim.evaluation.inputs import find_images, image_size, shown, some
from tim.evaluation.results import check_continuable, describe_samples, judge_images, write_result
from tim.files import sha256, write_json, write_text
from tim.images import open_rgb

DETAILS = ".detail.json"  # end of the name of the file of all answers


@dataclass(frozen=True)
class Settings:
    """What is evaluated, by whom, and where results go.

    Attributes:
        folder: of the images, `{prompt id}.png`.
        res_path: the result file; provenance and answers go beside it.
        csv: the questions.
        pic_num: images in every file.
        resolution: pixels along each side of one image, None for whatever the file gives.
        vqa_model, dtype, batch_size: the judge, see `load_judge`.
        answers: a file of ready answers instead of a judge.
    """

    folder: Path
    res_path: Path
    csv: Path
    pic_num: int = 4
    resolution: int | None = None
    vqa_model: str = "mplug"
    dtype: str = "float32"
    batch_size: int = 16
    answers: Path | None = None

    def beside(self, suffix: str) -> Path:
        """A file beside the result file: its name without `.txt`, and `suffix`."""
        return self.res_path.with_name(self.res_path.name.removesuffix(".txt") + suffix)


class Found(NamedTuple):
    """Answers and where they come from.

    Attributes:
        answers: by image, crop and proposition.
        facts: about them, for the result.
        judge: the name in the result file of a judge that is not the official one.
    """

    answers: Answers
    facts: dict[str, Any]
    judge: str | None = None


def evaluate_folder(settings: Settings, state: PartialState) -> str | None:
    """Score a folder; write the result file and, beside it, `.json` (scores, provenance) and `.detail.json` (answers).

    A judge's answers are kept in `.parts`, from where an interrupted call is continued.

    Returns:
        the text of the result file on the main process, None on the others.

    Raises:
        FileNotFoundError, ValueError: for images, questions, answers, a judge or a result file that cannot be used.
    """
    side = grid_side(settings.pic_num)
    with warnings.catch_warnings():
        if not state.is_main_process:
            warnings.simplefilter("ignore")  # the main process says it
        questions = read_questions(settings.csv)
        images, missing = match_images(settings.folder, questions)
    names = [path.name for path in images]
    if settings.answers is None:
        check_grids(images, side, settings.resolution)
        found = ask_judge(names, questions, side, settings, state)
    else:
        found = ready_answers(settings.answers, settings)
    if found is None or not state.is_main_process:
        return None
    try:
        scores = score_answers(questions, found.answers, names, settings.pic_num)
    except ValueError as error:  # a judge leaves no question out, a file may
        raise ValueError(f"{settings.answers}: {error}") from error
    text = result_text(scores, settings.folder, settings.res_path, found.judge)
    rows = answer_rows(questions, found.answers, names, settings.pic_num)
    write_json(settings.beside(DETAILS), rows)
    kinds = Counter(row["answer"] if row["answer"] in ("yes", "no") else "other" for row in rows)
    facts = {
        "score": scores.score,
        "categories_level_1": scores.broad,
        "categories_level_2": scores.detailed,
        "n": len(images),
        "crops": settings.pic_num,
        "questions": scores.questions,
        "answers": {kind: kinds[kind] for kind in ("yes", "no", "other")},
        "prompts": len(questions),
        "prompts_without_image": missing,
        **found.facts,
        "csv": {"path": str(settings.csv), "sha256": sha256(settings.csv)},
        "samples": describe_samples(settings.folder, images),
    }
    write_result(settings.beside(".json"), "dpg", facts)
    write_text(settings.res_path, text)
    return text


def match_images(folder: Path, questions: Questions) -> tuple[list[Path], list[str]]:
    """Images with questions, sorted, and the prompts that have no image. Warns of whatever has no counterpart.

    Raises:
        FileNotFoundError, ValueError: when there are no images, none with questions, or two of one prompt.
    """
    files = [path for path in find_images(folder) if path.parent == folder]
    images = [path for path in files if path.stem in questions]
    if not images:
        names = shown(list(questions))
        raise ValueError(f"{folder} holds no image of a prompt; files must be named by prompt, such as {names}, and .png")
    by_prompt: dict[str, Path] = {}
    for path in images:
        if (other := by_prompt.setdefault(path.stem, path)) != path:
            raise ValueError(f"{other} and {path} belong to the same prompt; remove one")
    stray = [path.name for path in files if path.stem not in questions]
    if stray:
        warnings.warn(f"{folder}: {some(stray)} of {len(files)} images without questions do not count", stacklevel=2)
    missing = [prompt for prompt in questions if prompt not in by_prompt]
    if missing:
        warnings.warn(
            f"{folder}: {some(missing)} of {len(questions)} prompts without an image; the score is over the others",
            stacklevel=2,
        )
    return images, missing


def ready_answers(path: Path, settings: Settings) -> Found:
    """The answers of a file.

    Raises:
        FileNotFoundError, ValueError: when it cannot be read, or the results would overwrite it.
    """
    if path.absolute() == settings.beside(DETAILS).absolute():
        raise ValueError(f"--res-path {settings.res_path} would overwrite the results that {path} belongs to; choose another")
    return Found(read_answers(path), {"judge": {"answers": str(path), "sha256": sha256(path)}})


def ask_judge(names: Sequence[str], questions: Questions, side: int, settings: Settings, state: PartialState) -> Found | None:
    """A judge's answers about the images of these names; None on other processes than the main.

    Raises:
        ValueError: when an image cannot be read or changes meanwhile, or earlier results are in the way.
    """
    parts = settings.beside(".parts")
    check_continuable(settings.res_path, parts)
    with state.main_process_first():  # one process downloads
        judge = load_judge(settings.vqa_model, state.device, settings.dtype, settings.batch_size)

    def ask(name: str, asked: Sequence[Question]) -> dict[str, Any]:
        texts = [question.text for question in asked]
        return {"answers": [judge(crop, texts) for crop in cut_grid(open_rgb(settings.folder / name), side)]}

    identity = {"judge": judge.identity, "csv": sha256(settings.csv), "pic_num": settings.pic_num}
    asked = {name: questions[Path(name).stem] for name in names}
    found = judge_images(settings.folder, asked, ask, parts, identity, state, "dpg")
    if found is None:
        return None
    judged, speed = found
    answers = {
        (name, crop, question.proposition): answer
        for name, judgement in zip(names, judged, strict=True)
        for crop, crop_answers in enumerate(judgement["answers"])
        for question, answer in zip(asked[name], crop_answers, strict=True)
    }
    facts = {"judge": judge.identity, "images_per_second_and_process": speed}
    return Found(answers, facts, None if judge.is_official else judge.name)


def grid_side(pic_num: int) -> int:
    """Images along a side of the grid.

    Raises:
        ValueError: when `pic_num` is no square.
    """
    side = math.isqrt(max(pic_num, 0))
    if side < 1 or side**2 != pic_num:
        raise ValueError(f"--pic-num must be a square (1, 4, 9, ...), as images form a square grid; got {pic_num}")
    return side


def check_grids(files: Sequence[Path], side: int, resolution: int | None = None) -> None:
    """Make sure that every image can be cut into side x side equal parts; reads headers only.

    Args:
        resolution: pixels along each side of a part, None for whatever the image gives.

    Raises:
        ValueError: names the images that cannot, or that cannot be read.
    """
    wrong = []
    for path in files:
        width, height = image_size(path)
        whole = (resolution * side,) * 2 if resolution else (width // side * side, height // side * side)
        if (width, height) != whole:
            wrong.append(f"{path} ({width}x{height})")
    if wrong:
        of = f" of {resolution}x{resolution}" if resolution else ""
        raise ValueError(f"not {side}x{side} equal images{of} (--pic-num, --resolution): {shown(wrong)}")


def cut_grid(image: Image.Image, side: int) -> list[Image.Image]:
    """The side x side images of a grid, row by row."""
    width, height = image.width // side, image.height // side
    corners = [(column * width, row * height) for row in range(side) for column in range(side)]
    return [image.crop((x, y, x + width, y + height)) for x, y in corners]
