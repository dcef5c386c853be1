"""Prompt sets of the text-to-image benchmarks: where prompts come from and where images go."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tim.images import make_grid, read_png, save_image, save_png


class PromptJob:
    """Prompts with `per_group` images each.

    Attributes:
        prompts: one a group.
        fingerprint: sha256 of prompts and file names, so that a folder is not continued with others.
    """

    def __init__(self, prompts: Sequence[str], names: Sequence[str], per_group: int) -> None:
        if not prompts:
            raise ValueError("there are no prompts")
        if per_group < 1:
            raise ValueError(f"--images-per-prompt must be >= 1, got {per_group}")
        self.prompts, self.names, self.per_group = list(prompts), list(names), per_group
        self.groups = len(self.prompts)
        self.fingerprint = hashlib.sha256(json.dumps([self.names, self.prompts]).encode()).hexdigest()

    def first(self, count: int) -> "PromptJob":
        """Keep the first `count` prompts."""
        self.prompts, self.names = self.prompts[:count], self.names[:count]
        self.groups = len(self.prompts)
        return self

    def files(self, folder: Path, group: int) -> list[Path]:
        """The files of a group, the one for the overview first; all there means done."""
        raise NotImplementedError

    def done(self, folder: Path, group: int) -> bool:
        return all(path.is_file() for path in self.files(folder, group))

    def pictures(self, folder: Path, limit: int) -> list[np.ndarray]:
        return [read_png(self.files(folder, group)[0]) for group in range(min(limit, self.groups))]


class GenEvalJob(PromptJob):
    """`{i:05d}/metadata.jsonl`, `{i:05d}/samples/{j:05d}.png` and `{i:05d}/grid.png` for line i of the metadata file."""

    def __init__(self, path: str, per_group: int = 4) -> None:
        self.metadata = _json_lines(Path(path))
        for number, entry in enumerate(self.metadata, start=1):
            if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
                raise ValueError(f"{path} line {number} has no `prompt`; GenEval's evaluation_metadata.jsonl is expected")
        names = [f"{i:05d}" for i in range(len(self.metadata))]
        super().__init__([entry["prompt"] for entry in self.metadata], names, per_group)

    def files(self, folder: Path, group: int) -> list[Path]:
        own = folder / self.names[group]
        samples = [own / "samples" / f"{j:05d}.png" for j in range(self.per_group)]
        return [own / "grid.png", own / "metadata.jsonl", *samples]

    def write(self, folder: Path, group: int, images: np.ndarray) -> None:
        grid, metadata, *samples = self.files(folder, group)
        samples[0].parent.mkdir(parents=True, exist_ok=True)
        for path, image in zip(samples, images, strict=True):
            save_png(path, image)
        metadata.write_text(json.dumps(self.metadata[group], ensure_ascii=False) + "\n", encoding="utf-8")
        save_png(grid, make_grid(images, columns=_columns(len(images))))


class DPGJob(PromptJob):
    """`{prompt id}.png`, the images of a prompt side by side without a gap (2x2 for four); ids are `<id>.txt` of a folder."""

    def __init__(self, folder: str, per_group: int = 4) -> None:
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"--caption-dir {folder} is no folder; DPG-Bench's prompts/*.txt are expected")
        paths = sorted(Path(folder).glob("*.txt"))
        prompts = [path.read_text(encoding="utf-8").strip() for path in paths]
        empty = [path.name for path, prompt in zip(paths, prompts, strict=True) if not prompt]
        if empty or not paths:
            raise ValueError(f"{folder}: {f'{empty[0]} is empty' if empty else 'there is no .txt file'}")
        super().__init__(prompts, [path.stem for path in paths], per_group)

    def files(self, folder: Path, group: int) -> list[Path]:
        return [folder / f"{self.names[group]}.png"]

    def write(self, folder: Path, group: int, images: np.ndarray) -> None:
        save_png(self.files(folder, group)[0], make_grid(images, columns=_columns(len(images)), pad=0))


class MJHQJob(PromptJob):
    """`{category}/{key}.png` for every key of meta_data.json ({key: {"category": ..., "prompt": ...}})."""

    def __init__(self, path: str, image_format: str = "png") -> None:
        self.image_format = image_format
        names, prompts = read_mjhq(path)
        super().__init__(prompts, names, 1)

    def files(self, folder: Path, group: int) -> list[Path]:
        return [folder / f"{self.names[group]}.{self.image_format}"]

    def write(self, folder: Path, group: int, images: np.ndarray) -> None:
        path = self.files(folder, group)[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(path, images[0])


class PromptFilesJob(PromptJob):
    """`{i:05d}-{j:02d}.png` for image j of prompt i."""

    def __init__(self, prompts: Sequence[str], per_group: int = 1) -> None:
        super().__init__(prompts, [f"{i:05d}" for i in range(len(prompts))], per_group)

    def files(self, folder: Path, group: int) -> list[Path]:
        return [folder / f"{self.names[group]}-{j:02d}.png" for j in range(self.per_group)]

    def write(self, folder: Path, group: int, images: np.ndarray) -> None:
        for path, image in zip(self.files(folder, group), images, strict=True):
            save_png(path, image)


def read_mjhq(path: str | Path) -> tuple[list[str], list[str]]:
    """Names `category/key` and prompts of MJHQ-30K's meta_data.json.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is in another form, or a name would leave the folder of the images.
    """
    try:
        meta = json.loads(Path(path).read_text(encoding="utf-8"))
        names = [f"{entry['category']}/{key}" for key, entry in meta.items()]
        prompts = [entry["prompt"] for entry in meta.values()]
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not there; MJHQ-30K's meta_data.json is expected") from None
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not in the form {{key: {{category, prompt}}}} of MJHQ-30K: {error!r}") from error
    for name, prompt in zip(names, prompts, strict=True):
        if not isinstance(prompt, str) or ".." in name.split("/") or name.startswith("/"):
            raise ValueError(f"{path}: entry {name!r} has no usable prompt, category or key")
    return names, prompts


def read_prompts(path: str) -> list[str]:
    """Prompts of a text file, one a line, blank lines left out.

    Raises:
        FileNotFoundError, ValueError: when there is no file, or no prompt in it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no prompt file {path}")
    prompts = [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return prompts


def _json_lines(path: Path) -> list[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"--caption-dir {path} is not there; a .jsonl file is expected")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from error
    return records


def _columns(count: int) -> int:
    """Columns of a grid that is square or wider than high."""
    return int(np.ceil(np.sqrt(count)))
