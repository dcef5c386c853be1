"""What a sampling run has left: the images that are its own, and whether they are all there."""

import itertools
import math
import re
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tim.evaluation.inputs import SHOWN, find_images, shown, some
from tim.files import read_json, run_record
from tim.listing import list_folders

# Paths of images without their suffix, as the samplers number them: of classes, of own prompts, of GenEval.
NUMBERED = (r"(\d{6})", r"(\d{5})-(\d{2})", r"(\d{5})/samples/(\d{5})")
BY_CATEGORY = r"[^/]+/[^/]+"  # of MJHQ-30K
COUNTS = ("num_fid_samples", "images_per_prompt")  # in a record's settings
OVER = "the score is over what is there"
REMEDY = "run the same sampling command again, or measure what is there with --allow-partial"


def read_run(folder: Path) -> dict[str, Any] | None:
    """The record of the sampling run that filled a folder, beside it or beside what it is a link to; None without one.

    Raises:
        ValueError: names a record that is damaged.
    """
    for path in (run_record(folder.absolute()), run_record(folder.resolve()), folder / "run.json"):
        if path.is_file():
            return _read_record(path)
    return None


def _read_record(path: Path) -> dict[str, Any] | None:
    """A sampling run's record, None for other JSON."""
    try:
        record = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; {REMEDY.split(',')[0]}, or delete it") from error
    settings = record.get("settings") if isinstance(record, dict) and "complete" in record else None
    is_run = isinstance(settings, dict) and all(isinstance(settings.get(key, 1), int) for key in COUNTS)
    return record if is_run else None


def find_runs(folder: Path) -> dict[Path, dict[str, Any]]:
    """Records of sampling runs by the folder they filled: of this folder, else of those below it, each of them once."""
    if own := read_run(folder):
        return {folder: own}
    once: dict[Path, Path] = {}
    for filled in sorted(list_folders(folder, deep=True), key=lambda path: path.resolve() != path.absolute()):
        once.setdefault(filled.resolve(), filled)
    return {filled: record for filled in sorted(once.values()) if (record := read_run(filled))}


def sampled_images(folder: Path, allow_partial: bool = False, layouts: Sequence[str] = NUMBERED) -> list[Path]:
    """Images that sampling runs have drawn into a folder or below it, sorted; strays among them are named and left out.

    A folder that no run of ours has filled counts whole, unless half of its images lie as in one of `layouts`.

    Args:
        allow_partial: warn instead of raising when sampling is not finished.
        layouts: patterns of paths without suffix; their groups are numbers from 0.

    Raises:
        FileNotFoundError: when there is no such folder.
        ValueError: when it holds no image, or fewer than were to be drawn.
    """
    files = find_images(folder)
    runs = find_runs(folder)
    images: list[Path] = []
    for filled in runs or [folder]:
        inside = files if filled == folder else [path for path in files if path.is_relative_to(filled)]
        own, numbers = _in_layout(filled, inside, layouts)
        images += own
        if numbers is not None:
            check_numbers(filled, numbers, allow_partial)
        check_complete(filled, runs.get(filled), len(own), allow_partial, alone=numbers is not None)
    kept = set(images)
    stray = [path.relative_to(folder).as_posix() for path in files if path not in kept and not _is_overview(path, runs)]
    if stray:
        warnings.warn(f"{folder}: {some(stray)} of {len(files)} images are no samples and do not count", stacklevel=2)
    return [path for path in files if path in kept]


def _is_overview(path: Path, runs: Collection[Path]) -> bool:
    """Whether an image is one that the samplers put together of others: of a run, of prompts by steps, of GenEval's prompt."""
    grid = re.fullmatch(r"(.+-)?grid-\d+x\d+", path.stem) or (path.stem == "grid" and path.parent.name.isdecimal())
    return path.with_suffix("") in runs or bool(grid)


def _in_layout(
    folder: Path, files: Sequence[Path], layouts: Sequence[str]
) -> tuple[Sequence[Path], list[tuple[int, ...]] | None]:
    """The images in the layout that at least half of them follow, and their numbers; all and None when there is none."""
    for pattern in layouts:
        paths = {path: re.fullmatch(pattern, path.relative_to(folder).with_suffix("").as_posix()) for path in files}
        numbers = {path: tuple(map(int, match.groups())) for path, match in paths.items() if match}
        if numbers and 2 * len(numbers) >= len(files):
            return list(numbers), [own for own in numbers.values() if own] or None
    return files, None


def check_numbers(folder: Path, numbers: Collection[tuple[int, ...]], allow_partial: bool, what: str = "images") -> None:
    """Make sure that images are numbered from 0 without gaps: (image,), or (prompt, image).

    Raises:
        ValueError: names the first that are missing, unless `allow_partial`; or tells of two with the same number.
    """
    if len(there := set(numbers)) < len(numbers):
        raise ValueError(f"{folder}: {len(numbers) - len(there)} {what} have the number of another one; remove the copies")
    counts = [max(column) + 1 for column in zip(*there, strict=True)]
    if missing := math.prod(counts) - len(there):
        enough = len(there) + SHOWN + 1  # to find the first gaps; a folder named by a date would make it billions
        every = itertools.product(*(range(min(count, enough)) for count in counts))
        gaps = ("-".join(map(str, number)) for number in every if number not in there)
        first = shown(list(itertools.islice(gaps, SHOWN + 1)))
        refuse_partial(f"{folder}: sampling has gaps, {missing} ({first}) {what} are missing", allow_partial)


def check_complete(
    folder: Path, record: dict[str, Any] | None, images: int, allow_partial: bool = False, alone: bool = True
) -> None:
    """Make sure that a sampling run is finished and that its images are still there.

    Args:
        record: see `read_run`.
        images: how many there are.
        alone: every file is one image, rather than all images of a prompt.

    Raises:
        ValueError: says what is missing, unless `allow_partial`.
    """
    if record is None:
        return
    if record.get("complete") is not True:
        refuse_partial(f"{folder}: sampling is not finished ({images} images are there)", allow_partial)
        return
    settings = record["settings"]
    wanted = settings.get("num_fid_samples") or 0
    if not alone:
        wanted //= settings.get("images_per_prompt") or 1
    if images < wanted:
        refuse_partial(f"{folder} holds {images} of the {wanted} images that sampling has drawn", allow_partial)


def check_prompts(folder: Path, missing: str, allow_partial: bool) -> None:
    """A benchmark's prompts without an image: only said where a finished sampling run has drawn a part of them.

    Raises:
        ValueError: where no run tells, unless `allow_partial`.
    """
    if read_run(folder) is None:
        refuse_partial(f"{folder}: {missing}", allow_partial)
    else:
        warnings.warn(f"{folder}: {missing}; {OVER}", stacklevel=3)


def refuse_partial(problem: str, allow_partial: bool) -> None:
    """ValueError for incomplete samples, a warning when they are allowed."""
    if not allow_partial:
        raise ValueError(f"{problem}; {REMEDY}")
    warnings.warn(f"{problem}; {OVER}", stacklevel=3)
