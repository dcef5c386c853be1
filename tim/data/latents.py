"""Files of preprocessed latents: `<class>/<name>.safetensors` with `latent` (2, C, h, w), image and mirror, and `label`."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load as load_safetensors
from torch import Tensor
from tqdm import tqdm

from tim.data.folders import SUFFIXES, class_folders
from tim.files import read_json, write_tensors
from tim.listing import check_plain, list_files

RECORD = "preprocess.json"  # beside the class folders: what the files depend on
# The dtypes that latents and labels may have, in safetensors' words; 8 bits are too few to number classes.
FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
INTEGERS = {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16"}
WORDS = {**FLOATS, **INTEGERS}


def write_latent(path: Path, latent: Tensor, label: int) -> None:
    """Write one file so that it is either whole or absent.

    Args:
        latent: image and mirror (2, C, h, w), shifted and scaled.

    Raises:
        OSError: when what reached the disk is not what was written.
    """
    write_tensors(path, {"latent": latent.contiguous(), "label": torch.tensor(label)}, find_corruption)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file; ValueError, which says why, when it cannot be read."""
    try:
        check_plain(path)
        with safe_open(path, framework="pt") as f:
            yield f
    except Exception as error:  # whatever a damaged header leads to
        raise ValueError(str(error)) from error


def find_corruption(path: Path, check: Callable[[Any], Any] | None = None) -> str | None:
    """Why a file is no latent file, or None; reads the header, and compares the size of the file with it.

    Args:
        check: of the open file, in place of that for latents; ValueError when it holds something else.
    """
    try:
        with opened(path) as f:
            (check or _check_header)(f)
    except ValueError as error:
        return str(error)
    return None


def read_latent(path: Path) -> tuple[Tensor, int]:
    """`parse_latent` of a file; ValueError, which names it, when it is missing too."""
    try:
        check_plain(path)
        return parse_latent(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def parse_latent(data: bytes) -> tuple[Tensor, int]:
    """`latent` (2, C, h, w) as it is stored, and `label`, of the content of a latent file.

    Raises:
        ValueError: when it is damaged, has another form, or holds values that are not finite; the message says so.
    """
    try:
        tensors = load_safetensors(data)
    except Exception as error:  # as above
        raise ValueError(str(error)) from error
    dtypes = {name: WORDS.get(t.dtype, str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()}
    _check_tensors({name: (tuple(t.shape), dtypes[name]) for name, t in tensors.items()})
    latent, label = tensors["latent"], int(tensors["label"])
    if label < 0:
        raise ValueError(f"label {label} is negative")
    if not torch.isfinite(latent).all():
        raise ValueError("holds non-finite values")
    return latent, label


def _check_header(f: Any) -> None:
    slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118, not a dict
    _check_tensors({name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()})


def _check_tensors(found: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    """ValueError when tensors of these names, shapes and dtypes are not those of a latent file."""
    if not {"latent", "label"} <= found.keys():
        raise ValueError(f"holds {', '.join(sorted(found)) or 'nothing'} instead of latent and label")
    (shape, dtype), (label_shape, label_dtype) = found["latent"], found["label"]
    if len(shape) != 4 or shape[0] != 2 or 0 in shape or dtype not in FLOATS.values():
        raise ValueError(f"latent is {shape} {dtype} instead of (2, C, h, w) of floats")
    if label_shape not in ((), (1,)) or label_dtype not in INTEGERS.values():
        raise ValueError(f"label is {label_shape} {label_dtype} instead of one integer (I64)")


def classes_identity(classes: Sequence[str]) -> dict[str, Any]:
    """What tells lists of class folders, whose order gives the labels, apart; part of `RECORD`."""
    return {"classes": len(classes), "classes_sha256": hashlib.sha256(os.fsencode("\n".join(classes))).hexdigest()}


def check_classes(latent_dir: str | Path) -> bool:
    """Whether a folder of latents says that its labels are the numbers of its class folders.

    Raises:
        ValueError: when it says that its labels are those of other class folders.
    """
    record = Path(latent_dir) / RECORD
    if not record.is_file():
        return False
    said = read_json(record)
    if not isinstance(said, dict) or "classes_sha256" not in said:
        return False
    names = [folder.name for folder in class_folders(latent_dir)]
    if said["classes_sha256"] != classes_identity(names)["classes_sha256"]:
        raise ValueError(
            f"the labels in {latent_dir} are those of {said.get('classes')} other class folders ({RECORD}) than the "
            f"{len(names)} that are there now; put them back, or move {RECORD} away to take the labels as they are"
        )
    return True


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
    folders = class_folders(latent_dir)
    with ThreadPoolExecutor(workers) as pool:
        for folder in tqdm(folders, unit=" classes", desc="reading", disable=None):
            _check_class(report, folder, pool)
    report.problems += _label_problems(report.labels)
    report.problems += _class_problems(latent_dir, report.labels)
    if len(report.moments) > 1:
        report.problems.append(f"channels differ between files: {', '.join(map(str, sorted(report.moments)))}")
    return report


def _check_class(report: LatentReport, folder: Path, pool: ThreadPoolExecutor) -> None:
    """Enter the files of a class into the report."""
    paths, labels = list_files(folder, SUFFIXES["latent"]), Counter[int]()
    report.leftovers += len(list(folder.glob(".*.part")))
    report.labels[folder.name] = labels
    for path, content in zip(paths, pool.map(_read, paths), strict=True):
        if isinstance(content, str):
            report.problems.append(content)
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


def _read(path: Path) -> tuple[Tensor, int] | str:
    """Latent and label of a file, or what is wrong with it."""
    try:
        return read_latent(path)
    except ValueError as error:
        return str(error)


def _label_problems(labels: dict[str, Counter]) -> Sequence[str]:
    """Folders whose files disagree on the label, and labels that two folders share."""
    problems: list[str] = []
    owner: dict[int, str] = {}
    for name, counts in labels.items():
        if len(counts) > 1:
            seen = ", ".join(f"{label} ({n} files)" for label, n in counts.most_common(5))
            problems.append(f"{name}: {len(counts)} different labels: {seen}")
        for label in counts:
            if owner.setdefault(label, name) != name:
                problems.append(f"{name}: label {label} also belongs to {owner[label]}")
    return problems


def _class_problems(latent_dir: str | Path, labels: dict[str, Counter]) -> Sequence[str]:
    """What `check_classes` refuses, and folders whose labels are not their number although the record says so."""
    try:
        if not check_classes(latent_dir):
            return []
    except ValueError as error:
        return [str(error)]
    return [
        f"{name}: label {label} instead of {number}, the number of the folder"
        for number, (name, counts) in enumerate(labels.items())
        for label in counts
        if label != number
    ]
