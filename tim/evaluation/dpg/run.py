"""DPG-Bench on a folder of images: match them with the questions, collect the answers, write scores and answers."""

import logging
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
from tim.evaluation.samples import check_complete, check_prompts, read_run
from tim.files import sha256, write_json, write_text
from tim.images import open_rgb

logger = logging.getLogger(__name__)
CROPS = 4  # images in the official grid
DETAILS = ".detail.json"  # end of the name of the file of all answers


@dataclass(frozen=True)
class Settings:
    """What is evaluated, by whom, and where results go.

    Attributes:
        folder: of the images, `{prompt id}.png`.
        res_path: the result file; provenance and answers go beside it.
        csv: the questions.
        pic_num: images of every file that are judged, the first in row order; None for all that sampling has put there.
        resolution: pixels along each side of one image, None for whatever the file gives.
        vqa_model, dtype, batch_size: the judge, see `load_judge`.
        answers: a file of ready answers instead of a judge.
        allow_partial: score what is there of samples that are not complete.
    """

    folder: Path
    res_path: Path
    csv: Path
    pic_num: int | None = None
    resolution: int | None = None
    vqa_model: str = "mplug"
    dtype: str = "float32"
    batch_size: int = 16
    answers: Path | None = None
    allow_partial: bool = False

    def beside(self, suffix: str) -> Path:
        """A file beside the result file: its name without `.txt`, and `suffix`."""
        return self.res_path.with_name(self.res_path.name.removesuffix(".txt") + suffix)


class Grid(NamedTuple):
    """How many images lie side by side in a file, and one below the other."""

    columns: int
    rows: int


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
    questions = read_questions(settings.csv)
    images, missing = match_images(settings.folder, questions, settings.allow_partial)
    names = [path.name for path in images]
    crops, grid = _crops(settings)
    if settings.answers is None:
        if crops == 1 and settings.resolution and image_size(images[0]) == (settings.resolution,) * 2:
            grid = Grid(1, 1)  # a file is a single image
        check_grids(images, grid, settings.resolution)
        found = ask_judge(names, questions, grid, crops, settings, state)
    else:
        found = ready_answers(settings.answers, settings)
    if found is None or not state.is_main_process:
        return None
    try:
        scores = score_answers(questions, found.answers, names, crops)
    except ValueError as error:  # a judge leaves no question out, a file may
        raise ValueError(f"{settings.answers}: {error}") from error
    text = result_text(scores, settings.folder, settings.res_path, found.judge)
    rows = answer_rows(questions, found.answers, names, crops)
    if settings.answers is not None:
        check_same(settings, text)
    write_json(settings.beside(DETAILS), rows)
    kinds = Counter(row["answer"] if row["answer"] in ("yes", "no") else "other" for row in rows)
    facts = {
        "score": scores.score,
        "categories_level_1": scores.broad,
        "categories_level_2": scores.detailed,
        "n": len(images),
        "crops": crops,
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


def match_images(folder: Path, questions: Questions, allow_partial: bool = False) -> tuple[list[Path], list[str]]:
    """Images with questions, sorted, and the prompts that have no image. Warns of whatever has no counterpart.

    Raises:
        FileNotFoundError, ValueError: when there are no images, none with questions, two of one prompt, or when images are
            missing that sampling should have drawn, unless `allow_partial`.
    """
    files = find_images(folder)
    images = [path for path in files if path.parent == folder and path.stem in questions]
    if not images:
        names = shown(list(questions))
        raise ValueError(f"{folder} holds no image of a prompt; files must be named by prompt, such as {names}, and .png")
    by_prompt: dict[str, Path] = {}
    for path in images:
        if (other := by_prompt.setdefault(path.stem, path)) != path:
            raise ValueError(f"{other} and {path} belong to the same prompt; remove one")
    kept = set(images)
    stray = [path.relative_to(folder).as_posix() for path in files if path not in kept]
    if stray:
        warnings.warn(f"{folder}: {some(stray)} of {len(files)} images without questions do not count", stacklevel=2)
    check_complete(folder, read_run(folder), len(images), allow_partial, alone=False)
    missing = [prompt for prompt in questions if prompt not in by_prompt]
    if missing:
        check_prompts(folder, f"{some(missing)} of {len(questions)} prompts without an image", allow_partial)
    return images, missing


def ready_answers(path: Path, settings: Settings) -> Found:
    """The answers of a file.

    Raises:
        FileNotFoundError, ValueError: when it cannot be read, or the results would overwrite it.
    """
    if path.absolute() == settings.beside(DETAILS).absolute():
        raise ValueError(f"--res-path {settings.res_path} would overwrite the results that {path} belongs to; choose another")
    return Found(read_answers(path), {"judge": {"answers": str(path), "sha256": sha256(path)}})


def check_same(settings: Settings, text: str) -> None:
    """Refuse to write over another result than `text`.

    Raises:
        ValueError: names the file.
    """
    there = [path for path in (settings.res_path, settings.beside(DETAILS)) if path.exists()]
    same = settings.res_path.is_file() and settings.res_path.read_text(encoding="utf-8", errors="replace") == text
    if there and not same:
        raise ValueError(
            f"--res-path {settings.res_path} would overwrite {there[0]}, which is of other results; choose another"
        )


def ask_judge(
    names: Sequence[str], questions: Questions, grid: Grid, crops: int, settings: Settings, state: PartialState
) -> Found | None:
    """A judge's answers about the first crops of the images of these names; None on other processes than the main.

    Raises:
        ValueError: when an image cannot be read or changes meanwhile, or earlier results are in the way.
    """
    parts = settings.beside(".parts")
    check_continuable([settings.res_path, settings.beside(".json"), settings.beside(DETAILS)], parts)
    with state.main_process_first():  # one process downloads
        judge = load_judge(settings.vqa_model, state.device, settings.dtype, settings.batch_size)

    def ask(name: str, asked: Sequence[Question]) -> dict[str, Any]:
        texts = [question.text for question in asked]
        return {"answers": [judge(crop, texts) for crop in cut_grid(open_rgb(settings.folder / name), grid)[:crops]]}

    cut = grid if crops != grid.columns * grid.rows else None  # all images of a grid are told by their number
    identity = {"judge": judge.identity, "csv": sha256(settings.csv), "pic_num": crops, "grid": cut}
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


def _crops(settings: Settings) -> tuple[int, Grid]:
    """How many images of a file are judged, and the grid they are in; what is assumed is said."""
    record = read_run(settings.folder)
    sampled = record["settings"].get("images_per_prompt") if record else None
    crops = settings.pic_num
    if crops is None:
        crops = sampled or CROPS
        logger.info("--pic-num %d: all images of a prompt (the official script's default is 1)", crops)
    elif crops == 1 and not sampled and not settings.resolution and settings.answers is None:
        warnings.warn(
            "--pic-num 1 takes the upper left image of a 2x2 grid, as the official script; if files hold a single image, "
            "give its side as --resolution",
            stacklevel=3,
        )
    return crops, grid_of(crops, sampled)


def grid_of(pic_num: int, sampled: int | None = None) -> Grid:
    """The grid whose first `pic_num` images, row by row, are judged.

    Args:
        sampled: how many images sampling has put into a file; None makes it the official 2x2 for up to 4, else a square.

    Raises:
        ValueError: when such a grid does not hold `pic_num` images.
    """
    if sampled:
        if not 1 <= pic_num <= sampled:
            raise ValueError(
                f"--pic-num must lie between 1 and {sampled}, the images of a prompt that were drawn; got {pic_num}"
            )
        columns = math.ceil(math.sqrt(sampled))
        return Grid(columns, -(-sampled // columns))
    side = max(2, math.isqrt(max(pic_num, 0)))
    if not 1 <= pic_num <= 4 and side**2 != pic_num:
        raise ValueError(f"--pic-num must be 1 to 4, the first images of a 2x2 grid, or a square (9, 16, ...); got {pic_num}")
    return Grid(side, side)


def check_grids(files: Sequence[Path], grid: Grid, resolution: int | None = None) -> None:
    """Make sure that every image can be cut into equal parts; reads headers only.

    Args:
        resolution: pixels along each side of a part, None for whatever the image gives.

    Raises:
        ValueError: names the images that cannot, or that cannot be read.
    """
    wrong = []
    for path in files:
        size = image_size(path)
        whole = tuple((resolution or pixels // parts) * parts for pixels, parts in zip(size, grid, strict=True))
        if size != whole:
            wrong.append(f"{path} ({size[0]}x{size[1]})")
    if wrong:
        of = f" of {resolution}x{resolution}" if resolution else ""
        shape = f"{grid.columns}x{grid.rows}"
        raise ValueError(f"not {shape} equal images{of} (--pic-num, --resolution): {shown(wrong)}")


def cut_grid(image: Image.Image, grid: Grid) -> list[Image.Image]:
    """The images of a grid, row by row."""
    width, height = image.width // grid.columns, image.height // grid.rows
    corners = [(column * width, row * height) for row in range(grid.rows) for column in range(grid.columns)]
    return [image.crop((x, y, x + width, y + height)) for x, y in corners]
