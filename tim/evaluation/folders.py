"""A small-scale check: how far a folder of samples is from a folder of real images, under features of your choice."""

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from accelerate import PartialState

from tim.evaluation.extract import BATCH, CACHE, Features, extract
from tim.evaluation.features import FeatureNetwork
from tim.evaluation.inputs import ImageFiles, find_images
from tim.evaluation.metrics import distance, kernel_distance, precision_recall, streaming_statistics
from tim.evaluation.record import describe_samples

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


def compare_folders(
    real: Path,
    samples: Sequence[Path],
    patterns: Sequence[str],
    features: FeatureNetwork,
    state: PartialState,
    cache: Path = CACHE,
    batch_size: int = BATCH,
    workers: int | None = None,
) -> dict[str, Any] | None:
    """Fréchet distance, kernel distance, precision and recall of each folder (and pattern) of samples.

    Returns:
        the scores by row and the facts on the main process, None on the others.

    Raises:
        FileNotFoundError, ValueError: for folders without images, or images that cannot be read (named).
    """

    def run(files: list[Path], desc: str) -> Features:
        images = ImageFiles(files, features.transform)
        return extract(images, features.network, features.identity, state, cache, batch_size, workers, desc)

    real_files = find_images(real)
    chosen = [(folder, label, files) for folder in samples for label, files in select(folder, patterns).items()]
    reference = run(real_files, "real")
    found = [(folder, label, files, run(files, label)) for folder, label, files in chosen]
    if not state.is_main_process:
        return None
    rows, names = {}, [folder.name for folder in samples]
    for folder, label, files, own in found:
        name = folder.name if names.count(folder.name) == 1 else str(folder)
        name = f"{name}: {label}" if patterns and len(samples) > 1 else label if patterns else name
        rows[name] = _scores(own, reference, features.name, state) | describe_samples(folder, files)
    facts = {"features": features.name, **features.identity, "reference": describe_samples(real, real_files)}
    return {"scores": rows, **facts}


def _scores(samples: Features, real: Features, name: str, state: PartialState) -> dict[str, Any]:
    statistics = [streaming_statistics(lambda own=own: own.parts("features")) for own in (samples, real)]
    a, b = samples.array("features"), real.array("features")
    mean, std = kernel_distance(a, b)
    manifold = precision_recall(a, b, device=state.device)
    return {
        "frechet_distance": distance(*statistics, name),
        "kernel_distance": mean,
        "kernel_distance_std": std,
        "precision": manifold.precision,
        "recall": manifold.recall,
    }


def table(result: dict[str, Any]) -> str:
    """The scores as text, headed by the name of the features."""
    width = max(len(name) for name in result["scores"])
    lines = [
        f"features: {result['features']}",
        " ".join([" " * width, f"{'images':>8}", *(f"{c:>10}" for c in COLUMNS.values())]),
    ]
    for name, row in result["scores"].items():
        lines.append(" ".join([f"{name:<{width}}", f"{row['n']:>8}", *(f"{row[key]:>10.4g}" for key in COLUMNS)]))
    return "\n".join(lines)
