"""A small-scale check: how far a folder of samples is from a folder of real images, under features of your choice."""

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tim.evaluation.extract import Extraction, Features
from tim.evaluation.inputs import find_images
from tim.evaluation.metrics import distance, kernel_distance, precision_recall
from tim.evaluation.results import columns, describe_samples, keeping
from tim.evaluation.samples import sampled_images

COLUMNS = {"frechet_distance": "Fréchet", "kernel_distance": "KID", "precision": "precision", "recall": "recall"}
ORDER = ("frechet_distance", "kernel_distance", "kernel_distance_std", "precision", "recall")  # in the result


def select(folder: Path, patterns: Sequence[str], allow_partial: bool = False) -> dict[str, list[Path]]:
    """Samples of a folder for each pattern of relative paths, e.g. '*-Step-4-*'; all of them without any.

    Raises:
        FileNotFoundError, ValueError: see `sampled_images`; when none matches a pattern.
    """
    files = sampled_images(folder, allow_partial)
    if not patterns:
        return {folder.name: files}
    rows = {p: [f for f in files if fnmatch(f.relative_to(folder).as_posix(), p)] for p in patterns}
    empty = [p for p, own in rows.items() if not own]
    if empty:
        raise ValueError(
            f"no image of {folder} matches {empty[0]!r}; patterns are of paths such as {files[0].relative_to(folder)}"
        )
    return rows


def compare_folders(
    real: Path, samples: Sequence[Path], patterns: Sequence[str], how: Extraction, allow_partial: bool = False
) -> dict[str, Any] | None:
    """Fréchet distance, kernel distance, precision and recall of each folder (and pattern) of samples.

    Returns:
        the scores by row and the facts on the main process, None on the others; `failed` says by row what went wrong.

    Raises:
        FileNotFoundError, ValueError: for folders without images or with incomplete samples, or real images that cannot be
            read (named).
    """
    real_files = find_images(real)
    chosen = [(folder, label, files) for folder in samples for label, files in select(folder, patterns, allow_partial).items()]
    reference = how.run_files(real_files, "real")
    found: dict[str, tuple[Path, list[Path], Features]] = {}
    failed: dict[str, str] = {}
    names = [folder.name for folder in samples]
    for folder, label, files in chosen:
        name = folder.name if names.count(folder.name) == 1 else str(folder)
        name = f"{name}: {label}" if patterns and len(samples) > 1 else label if patterns else name
        with keeping(failed, name):
            found[name] = (folder, files, how.run_files(files, label))
    if not how.state.is_main_process:
        return None
    rows = {
        name: _scores(own, reference, how, name, failed) | describe_samples(folder, files)
        for name, (folder, files, own) in found.items()
    }
    facts = {"features": how.extractor.name, **how.extractor.identity, "reference": describe_samples(real, real_files)}
    return {"scores": rows, **facts, "failed": failed}


def _scores(samples: Features, real: Features, how: Extraction, row: str, failed: dict[str, str]) -> dict[str, Any]:
    """The scores of a row, None where `failed` says why there is none."""
    a, b = samples.array("features"), real.array("features")
    scores: dict[str, float | None] = dict.fromkeys(ORDER)
    with keeping(failed, f"{row}: Fréchet distance"):
        what = f"{row}: {how.extractor.name}"
        scores["frechet_distance"] = distance(samples.statistics("features"), real.statistics("features"), what)
    with keeping(failed, f"{row}: KID"):
        scores["kernel_distance"], scores["kernel_distance_std"] = kernel_distance(a, b)
    with keeping(failed, f"{row}: precision and recall"):
        manifold = precision_recall(a, b, device=how.state.device)
        scores["precision"], scores["recall"] = manifold.precision, manifold.recall
    return scores


def table(result: dict[str, Any]) -> str:
    """The scores as text, headed by the name of the features."""
    rows = [
        [name, row["n"], *("n/a" if row[key] is None else f"{row[key]:.4g}" for key in COLUMNS)]
        for name, row in result["scores"].items()
    ]
    formats = [f"<{max(map(len, result['scores']))}", ">8", *[">10"] * len(COLUMNS)]
    return f"features: {result['features']}\n" + columns([["", "images", *COLUMNS.values()], *rows], formats)
