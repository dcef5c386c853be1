"""Files of preprocessed latents: `<class>/<name>.safetensors` with `latent` (2, C, h, w), image and mirror, and `label`."""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from tim.data.folders import class_folders, list_tensors
from tim.files import write_tensors

FLOATS = ("F32", "F16", "BF16", "F64")  # safetensors' words for the dtypes a latent may have


def write_latent(path: Path, latent: Tensor, label: int) -> None:
    """Write one file so that it is either whole or absent.

    Args:
        latent: image and mirror (2, C, h, w), shifted and scaled.

    Raises:
        OSError: when what reached the disk is not what was written.
    """
    write_tensors(path, {"latent": latent.contiguous(), "label": torch.tensor(label)}, find_corruption)


def find_corruption(path: Path, check: Callable[[Any], Any] | None = None) -> str | None:
    """Why a file is no latent file, or None; reads the header, and compares the size of the file with it.

    Args:
        check: of the open file, in place of that for latents; ValueError when it holds something else.
    """
    try:
        with safe_open(path, framework="pt") as f:
            (check or _header)(f)
    except (SafetensorError, OSError, ValueError) as error:
        return str(error)
    return None


def read_latent(path: Path) -> tuple[Tensor, int]:
    """`latent` (2, C, h, w) as it is stored, and `label`.

    Raises:
        ValueError: when the file is damaged; the message says how.
    """
    try:
        with safe_open(path, framework="pt") as f:
            _header(f)
            return f.get_tensor("latent"), int(f.get_tensor("label"))
    except (SafetensorError, OSError) as error:
        raise ValueError(str(error)) from error


def _header(f: Any) -> None:
    """ValueError when the tensors of an open file are not those of a latent file."""
    names = set(f.keys())
    if not {"latent", "label"} <= names:
        raise ValueError(f"holds {', '.join(sorted(names)) or 'nothing'} instead of latent and label")
    latent, label = f.get_slice("latent"), f.get_slice("label")
    shape, dtype = tuple(latent.get_shape()), latent.get_dtype()
    if len(shape) != 4 or shape[0] != 2 or 0 in shape or dtype not in FLOATS:
        raise ValueError(f"latent is {shape} {dtype} instead of (2, C, h, w) of floats")
    if label.get_shape() not in ([], [1]) or label.get_dtype()[0] not in "IU":
        raise ValueError(f"label is {label.get_shape()} {label.get_dtype()} instead of one integer")


def moments(latent: Tensor) -> Tensor:
    """Count, sum and sum of squares of each channel of a latent (2, C, h, w): (3, C) float64, to be added up over latents."""
    values = latent.double()
    total = values.sum((0, 2, 3))
    return torch.stack([torch.full_like(total, values[:, 0].numel()), total, values.square().sum((0, 2, 3))])


def mean_std(sums: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel from added `moments` (3, C); empty lists when nothing was counted."""
    count, total, squares = sums[:, sums[0] > 0]
    mean = total / count
    return mean.tolist(), (squares / count - mean.square()).clamp(min=0).sqrt().tolist()


@dataclass
class LatentReport:
    """What a folder of latents holds.

    Attributes:
        labels: class folder -> label -> files. shapes: `CxHxW` -> files. moments: channels -> `moments`, added up.
        problems: a line for each damaged file or folder.
        leftovers: unfinished files of an interrupted run, which nothing reads.
    """

    bytes: int = 0
    leftovers: int = 0
    shapes: Counter = field(default_factory=Counter)
    dtypes: Counter = field(default_factory=Counter)
    labels: dict[str, Counter] = field(default_factory=dict)
    moments: dict[int, Tensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The report for people."""
        lines = [f"{self.shapes.total()} whole files in {len(self.labels)} classes, {self.bytes / 1e9:.3g} GB"]
        for title, counts in (("shape", self.shapes), ("dtype", self.dtypes)):
            lines += [f"{title} {name}: {n} files" for name, n in counts.most_common(10)]
            if len(counts) > 10:
                lines.append(f"... {len(counts) - 10} more {title}s")
        if len(self.shapes) > 1:
            lines.append("native resolution: the class-conditional trainer takes latents of one shape only")
        own = [next(iter(counts)) for counts in self.labels.values() if counts]
        order = "the order of the folder names" if own == list(range(len(own))) else "a numbering of their own"
        lines.append(f"labels follow {order}")
        for channels, sums in sorted(self.moments.items()):
            for c, (m, s) in enumerate(zip(*mean_std(sums), strict=True)):
                lines.append(f"channel {c} of {channels}: mean {m:+.4f}, std {s:.4f}")
        if self.leftovers:
            lines.append(f"{self.leftovers} unfinished files of an interrupted run; preprocess again, or delete .*.part")
        return "\n".join([*lines, f"{len(self.problems)} problems", *(f"  {p}" for p in self.problems)])


def check_latents(latent_dir: str | Path, workers: int = 4) -> LatentReport:
    """Read every latent file under a folder.

    Args:
        workers: threads that read.

    Raises:
        FileNotFoundError: when there is no such folder, or no class folder in it.
    """
    report = LatentReport()
    folders = class_folders(str(latent_dir))
    with ThreadPoolExecutor(workers) as pool:
        for folder in tqdm(folders, unit=" classes", desc="reading", disable=None):
            _check_class(report, folder, pool)
    report.problems += _label_problems(report.labels)
    if len(report.moments) > 1:
        report.problems.append(f"channels differ between files: {', '.join(map(str, sorted(report.moments)))}")
    return report


def _check_class(report: LatentReport, folder: Path, pool: ThreadPoolExecutor) -> None:
    """Enter the files of a class into the report."""
    paths, labels = list_tensors(folder), Counter[int]()
    report.leftovers += len(list(folder.glob(".*.part")))
    report.labels[folder.name] = labels
    for path, content in zip(paths, pool.map(_read_finite, paths), strict=True):
        if isinstance(content, str):
            report.problems.append(f"{path}: {content}")
            continue
        latent, label = content
        labels[label] += 1
        report.bytes += path.stat().st_size
        report.shapes["x".join(map(str, latent.shape[1:]))] += 1
        report.dtypes[str(latent.dtype).removeprefix("torch.")] += 1
        channels = latent.shape[1]
        report.moments[channels] = moments(latent) + report.moments.get(channels, 0)
    if not labels:
        report.problems.append(f"{folder}: no whole latent file in this class")


def _read_finite(path: Path) -> tuple[Tensor, int] | str:
    """Latent and label of a file, or what is wrong with it."""
    try:
        latent, label = read_latent(path)
    except ValueError as error:
        return str(error)
    return (latent, label) if torch.isfinite(latent).all() else "holds non-finite values"


def _label_problems(labels: dict[str, Counter]) -> Sequence[str]:
    """Folders whose files disagree on the label, and labels that two folders share."""
    problems: list[str] = []
    owner: dict[int, str] = {}
    for name, counts in labels.items():
        if len(counts) > 1:
            seen = ", ".join(f"{label} ({n} files)" for label, n in counts.most_common(5))
            problems.append(f"{name}: {len(counts)} different labels: {seen}")
        for label in counts:
            if label < 0:
                problems.append(f"{name}: label {label} is negative")
            if owner.setdefault(label, name) != name:
                problems.append(f"{name}: label {label} also belongs to {owner[label]}")
    return problems
