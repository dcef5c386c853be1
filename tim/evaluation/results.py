"""Results: collecting them image by image, writing them as JSON with their provenance, showing them as text."""

import importlib.metadata
import itertools
import json
import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState

from tim.evaluation.inputs import some, stamp
from tim.evaluation.samples import read_run
from tim.files import read_json, write_json
from tim.resumable import map_items

logger = logging.getLogger(__name__)
PACKAGES = (
    *("tim", "torch", "torchvision", "numpy", "pillow", "scipy"),
    *("torch-fidelity", "transformers", "open_clip_torch", "timm"),
)
Item = TypeVar("Item")


def versions() -> dict[str, str]:
    """Versions of Python and of those of `PACKAGES` that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_samples(folder: Path, files: Sequence[Path]) -> dict[str, Any]:
    """What is known of a folder of generated images: path, number, file formats, and settings of the sampling run."""
    return {
        "path": str(folder),
        "n": len(files),
        "image_format": sorted({path.suffix.lstrip(".").lower() for path in files}),
        "run": read_run(folder),
    }


@contextmanager
def keeping(failed: dict[str, str], what: str) -> Iterator[None]:
    """Note in `failed` why one part of a result cannot be computed; the others are kept."""
    try:
        yield
    except (ValueError, MemoryError, torch.OutOfMemoryError) as error:
        failed[what] = str(error) or type(error).__name__


def write_result(path: Path, protocol: str, facts: dict[str, Any]) -> None:
    """Write a result with its protocol's name and the versions behind it; other scores that are there are kept beside.

    Args:
        path: `.json` file.
        protocol: name of the protocol, e.g. 'adm'.
        facts: scores, n, resize, weights' sha256, inputs.
    """
    result = {"protocol": protocol, **facts, "versions": versions()}
    if path.is_file() and _scores(path) != _of_scores(result):
        free = next(aside for k in itertools.count(1) if not (aside := path.with_name(f"{path.name}.{k}")).exists())
        path.replace(free)
        logger.warning("%s held another result, which is now %s", path, free)
    write_json(path, result)


def warn_of_replacing(path: Path) -> None:
    """Say that a file is there already."""
    if path.exists():
        logger.warning("%s was there already and is replaced", path)


def _scores(path: Path) -> Any:
    """What two results must share to be the same; None for other files."""
    with suppress(ValueError, AttributeError):
        return _of_scores(read_json(path))
    return None


def _of_scores(result: dict[str, Any]) -> list[Any]:
    return json.loads(json.dumps([result.get(key) for key in ("protocol", "scores", "score", "n")]))


def columns(rows: Sequence[Sequence[object]], formats: Sequence[str]) -> str:
    """Rows of cells as text, each column in its format, such as `<12` or `>8`."""
    return "\n".join(" ".join(f"{cell:{how}}" for cell, how in zip(row, formats, strict=True)) for row in rows)


def check_continuable(results: Sequence[Path], parts: Path) -> None:
    """Refuse result files whose run cannot be continued, because the judgements they were made of are gone.

    Raises:
        ValueError: names the file.
    """
    for result in results:
        if result.exists() and not parts.is_dir():
            raise ValueError(
                f"{result} is there already, from a run that this one cannot continue; delete it or choose another"
            )


def judge_images(
    folder: Path,
    items: Mapping[str, Item],
    judge: Callable[[str, Item], dict[str, Any]],
    parts: Path,
    identity: dict[str, Any],
    state: PartialState,
    desc: str,
) -> tuple[list[dict[str, Any]], float] | None:
    """Judge images one by one with all processes; run again, it continues where it was interrupted.

    Args:
        folder: of all images.
        items: by the image's path within the folder, what the judge must know of it.
        judge: path within the folder and item to a JSON-able judgement.
        parts: folder of the judgements, see `map_items`.
        identity: what judgements depend on besides image and item.
        state: the processes that share the images.
        desc: title of the progress bar.

    Returns:
        the judgements in order and images per second and process; None on other processes than the main.

    Raises:
        ValueError: names images that have changed since they were judged; or see `map_items`.
    """

    def timed(name: str, item: Item) -> dict[str, Any]:
        began, before = time.perf_counter(), stamp(folder / name)
        return {**judge(name, item), "stamp": before, "seconds": time.perf_counter() - began}

    judged = map_items(list(items.items()), lambda batch: [timed(*pair) for pair in batch], parts, identity, state, desc=desc)
    if judged is None:
        return None
    changed = [name for name, found in zip(items, judged, strict=True) if found["stamp"] != stamp(folder / name)]
    if changed:
        raise ValueError(f"{folder}: {some(changed)} images have changed since they were judged; delete {parts}")
    return judged, len(judged) / sum(found["seconds"] for found in judged)
