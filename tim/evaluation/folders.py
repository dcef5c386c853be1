"""A small-scale check: how far a folder of samples is from a folder of real images, under features of your choice."""

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tim.evaluation.extract import Extraction, Features
from tim.evaluation.inputs import find_images
from tim.evaluation.metrics import distance, kernel_distance, precision_recall
from tim.evaluation.results import columns, describe_samples

COLUMNS = {"frechet_distance": "Fréchet", "kernel_distance": "KID", "precision": "precision", "recall": "recall"}


def select(folder: Path, patterns: Sequence[str]) -> dict[str, list[Path]]:
    """Images of a folder for each pattern of relative paths, e.g. '*-Step-4-*'; all of them without any.

    Raises:
        FileNotFoundError, ValueError: when there is no image, or none that matches a pattern.
    """
    files = find_images(folder)
    if not patterns:
        return {folder.name: files}
    rows = {p: [f for f in files if fnmatch(f.relative_to(folder).as_posix(), p)] for p in patterns}
    empty = [p for p, own in rows.items() if not own]
    if empty:
        raise ValueError(
            f"no image of {folder} matches {empty[0]!r}; patterns are of paths such as {files[0].relative_to(folder)}"
        )
    return rows


def compare_folders(real: Path, samples: Sequence[Path], patterns: Sequence[str], how: Extraction) -> dict[str, Any] | None:
    """Fréchet distance, kernel distance, precision and recall of each folder (and pattern) of samples.

    Returns:
        the scores by row and the facts on the main process, None on the others.

    Raises:
        FileNotFoundError, ValueError: for folders without images, or images that cannot be read (named).
    """
    real_files = find_images(real)
    chosen = [(folder, label, files) for folder in samples for label, files in select(folder, patterns).items()]
    reference = how.run_files(real_files, "real")
    found = [(folder, label, files, how.run_files(files, label)) for folder, label, files in chosen]
    if not how.state.is_main_process:
        return None
    rows, names = {}, [folder.name for folder in samples]
    for folder, label, files, own in found:
        name = folder.name if names.count(folder.name) == 1 else str(folder)
        name = f"{name}: {label}" if patterns and len(samples) > 1 else label if patterns else name
        rows[name] = _scores(own, reference, how) | describe_samples(folder, files)
    facts = {"features": how.extractor.name, **how.extractor.identity, "reference": describe_samples(real, real_files)}
    return {"scores": rows, **facts}


def _scores(samples: Features, real: Features, how: Extraction) -> dict[str, Any]:
    a, b = samples.array("features"), real.array("features")
    mean, std = kernel_distance(a, b)
    manifold = precision_recall(a, b, device=how.state.device)
    return {
        "frechet_distance": distance(samples.statistics("features"), real.statistics("features"), how.extractor.name),
        "kernel_distance": mean,
        "kernel_distance_std": std,
        "precision": manifold.precision,
        "recall": manifold.recall,
    }


def table(result: dict[str, Any]) -> str:
    """The scores as text, headed by the name of the features."""
    rows = [[name, row["n"], *(f"{row[key]:.4g}" for key in COLUMNS)] for name, row in result["scores"].items()]
    formats = [f"<{max(map(len, result['scores']))}", ">8", *[">10"] * len(COLUMNS)]
    return f"features: {result['features']}\n" + columns([["", "images", *COLUMNS.values()], *rows], formats)
