"""What sampling runs draw: class labels or prompts, and the files their images become."""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tim import rng
from tim.files import parse_json, published, read_json, read_json_lines, read_text, replacing, write_json_lines
from tim.images import PNG_LEVEL, is_whole, make_grid, read_png, save_image
from tim.listing import check_inside, check_plain, list_files

IMAGENET_CLASSES = 1000
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: of another encoding, or of careless JSON
FETCH = "bash tools/download_benchmarks.sh --only {} fetches it"
Images = Sequence[np.ndarray | None]  # of a group, (H, W, 3) uint8; None for one that is not finite


class PromptSet:
    """Prompts or class labels with `per_group` images each; image j of group g has index g and repetition j.

    Args:
        prompts: one a group.
        names: what the files of each group are called by; their numbers when None.
        identity: what tells the set from others, for run.json, so that a folder is not continued with another; the prompts
            when None.

    Attributes:
        groups: how many groups are drawn, the first ones.
        file_name: of an image, with the group's `{name}` and the repetition `{j}`.
        evaluation: the command that measures the images, with `{folder}` and `{n}` images of a prompt.

    Raises:
        ValueError: when there are no images of a prompt.
    """

    file_name = "{name}.png"
    evaluation = "projects/evaluate/evaluate_folder.py REAL {folder} --features efficientnet"

    def __init__(
        self,
        prompts: Sequence[str] | Sequence[int],
        per_group: int,
        names: Sequence[str] | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        if per_group < 1:
            raise ValueError(f"--images-per-prompt must be >= 1, got {per_group}")
        broken = next((p for p in prompts if isinstance(p, str) and SURROGATE.search(p)), None)
        if broken is not None:
            raise ValueError(f"prompt {broken!r} holds half a character; write prompts in UTF-8")
        self.prompts, self.per_group, self.groups = prompts, per_group, len(prompts)
        self.names = [f"{i:05d}" for i in range(self.groups)] if names is None else names
        digest = hashlib.sha256(json.dumps([self.names, self.prompts]).encode()).hexdigest()
        self.identity = identity or {"prompts": digest, "images_per_prompt": per_group}

    def files(self, folder: Path, group: int) -> list[Path]:
        """The files of a group, the one for the overview first; all there means done."""
        return [folder / self.file_name.format(name=self.names[group], j=j) for j in range(self.per_group)]

    def image_name(self, group: int, repetition: int) -> str:
        """What to call an image in a message."""
        return self.names[group] if self.per_group == 1 else f"{self.names[group]}-{repetition:02d}"

    def is_done(self, folder: Path, group: int) -> bool:
        """Whether the files of a group are there and whole."""
        return all(map(is_whole, self.files(folder, group)))

    def write(self, folder: Path, group: int, images: Images, png_level: int = PNG_LEVEL) -> None:
        """Write the files of a group, each whole or absent, without those of images that are None."""
        _save(self.files(folder, group), images, png_level)


class ClassLabels(PromptSet):
    """`{index:06d}.png`, one image a group.

    Args:
        labels: of image k: `cycle` is k mod num_classes, `random` is drawn from (seed, k), `3,7,11` cycles through a list.
        num_classes: how many classes to cycle through or draw from; all when None.
        network_classes: how many the network has.
        total: number of images.

    Raises:
        ValueError: for a label that the network does not have.
    """

    def __init__(self, labels: str, num_classes: int | None, network_classes: int, seed: int, total: int) -> None:
        count = network_classes if num_classes is None else num_classes
        if not 1 <= count <= network_classes:
            raise ValueError(f"--num-classes must lie between 1 and the network's {network_classes}, got {num_classes}")
        listed: Sequence[int] = range(count)
        if labels not in ("cycle", "random"):
            try:
                listed = [int(v) for v in labels.split(",")]
            except ValueError:
                raise ValueError(f"--class-labels {labels!r} is neither cycle, random nor a list like 3,7,11") from None
        wrong = [v for v in listed if not 0 <= v < network_classes]
        if wrong:
            raise ValueError(f"--class-labels: label {wrong[0]} is out of range, the network has 0 to {network_classes - 1}")
        chosen = [listed[k % len(listed)] for k in range(total)]
        if labels == "random":
            chosen = [int(rng.generator(seed, "label", index=k).integers(count)) for k in range(total)]
        identity = {"class_labels": labels, "num_classes": num_classes}
        super().__init__(chosen, 1, [f"{k:06d}" for k in range(total)], identity)
        if network_classes == IMAGENET_CLASSES:
            self.evaluation = "projects/evaluate/adm_evaluator.py REF {folder}"

    def pack_npz(self, folder: Path) -> None:
        """All images as arr_0 (N, H, W, 3) uint8 in `<folder>.npz`, the form ADM's evaluator reads."""
        path = folder.with_name(f"{folder.name}.npz")
        images = np.stack([read_png(self.files(folder, g)[0]) for g in tqdm(range(self.groups), desc="npz", unit="img")])
        with replacing(path) as partial, open(partial, "wb") as f:
            np.savez(f, arr_0=images)
        print(f"all of them in {path}")


class PromptFiles(PromptSet):
    """`{i:05d}-{j:02d}.png` for image j of prompt i."""

    file_name = "{name}-{j:02d}.png"


class GenEvalPrompts(PromptSet):
    """`{i:05d}/metadata.jsonl`, `{i:05d}/samples/{j:05d}.png` and `{i:05d}/grid.png` for line i of the metadata file."""

    file_name = "{name}/samples/{j:05d}.png"
    evaluation = (
        "projects/evaluate/geneval/evaluation/evaluate_images.py {folder} --outfile {folder}.jsonl "
        "--model-path checkpoints/mask2former"
    )

    def __init__(self, path: str | Path, per_group: int = 4) -> None:
        path = published(str(path))
        if path.is_dir():
            raise ValueError(
                f"--caption-dir {path} is a folder, not GenEval's .jsonl; sample_t2i_dpgbench_ddp.py reads folders"
            )
        self.metadata = []
        _check_there(path, "--caption-dir", FETCH.format("geneval"))
        for number, line in enumerate(read_text(path).rstrip("\n").split("\n"), start=1):
            try:
                entry = parse_json(line)
            except ValueError as error:
                raise ValueError(f"{path} line {number} is not JSON: {error}") from error
            if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
                raise ValueError(f"{path} line {number} has no `prompt`; GenEval's evaluation_metadata.jsonl is expected")
            self.metadata.append(entry)
        super().__init__([entry["prompt"] for entry in self.metadata], per_group)

    def files(self, folder: Path, group: int) -> list[Path]:
        """Grid and images."""
        return [folder / self.names[group] / "grid.png", *super().files(folder, group)]

    def is_done(self, folder: Path, group: int) -> bool:
        """Whether grid, metadata and images are there and whole."""
        written = read_json_lines(folder / self.names[group] / "metadata.jsonl")
        return written == [self.metadata[group]] and super().is_done(folder, group)

    def write(self, folder: Path, group: int, images: Images, png_level: int = PNG_LEVEL) -> None:
        """Grid, metadata and images."""
        grid, *samples = self.files(folder, group)
        write_json_lines(grid.with_name("metadata.jsonl"), [self.metadata[group]])
        _save(samples, images, png_level)
        _save([grid], [_join(images, pad=2)], png_level)


class DPGPrompts(PromptSet):
    """`{prompt id}.png`, the images of a prompt side by side without a gap (2x2 for four); ids are `<id>.txt` of a folder."""

    evaluation = (
        "projects/evaluate/dpg_bench/compute_dpg_bench.py --image-root-path {folder} --res-path {folder}.txt --pic-num {n}"
    )

    def __init__(self, folder: str | Path, per_group: int = 4) -> None:
        folder = published(str(folder))
        if not folder.is_dir():
            remedy = "DPG-Bench's prompts/*.txt are expected" if folder.exists() else FETCH.format("dpg")
            raise FileNotFoundError(f"--caption-dir {folder} is no folder; {remedy}")
        paths = list_files(folder, (".txt",))
        prompts = [read_text(path).strip() for path in paths]
        empty = [path.name for path, prompt in zip(paths, prompts, strict=True) if not prompt]
        if empty or not paths:
            raise ValueError(f"{folder}: {f'{empty[0]} is empty' if empty else 'there is no .txt file'}")
        super().__init__(prompts, per_group, [path.stem for path in paths])

    def files(self, folder: Path, group: int) -> list[Path]:
        """One of all images of a prompt."""
        return super().files(folder, group)[:1]

    def write(self, folder: Path, group: int, images: Images, png_level: int = PNG_LEVEL) -> None:
        """One of all images of a prompt."""
        _save(self.files(folder, group), [_join(images, pad=0)], png_level)


class MJHQPrompts(PromptSet):
    """`{category}/{key}.png` for every key of meta_data.json ({key: {"category": ..., "prompt": ...}})."""

    evaluation = "projects/evaluate/mjhq30k/calculate_fid.py datasets/mjhq30k/images {folder}"

    def __init__(self, path: str, image_format: str = "png") -> None:
        names, prompts = read_mjhq(path)
        super().__init__(prompts, 1, names)
        self.identity |= {"image_format": image_format}
        self.file_name = f"{{name}}.{image_format}"


def _save(paths: Sequence[Path], images: Images, png_level: int) -> None:
    """Write images, each whole or absent, without those that are None."""
    for path, image in zip(paths, images, strict=True):
        if image is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_image(path, image, png_level)


def _join(images: Images, pad: int) -> np.ndarray | None:
    """The images of a prompt in a square, None when one of them is."""
    whole = [image for image in images if image is not None]
    return make_grid(np.stack(whole), math.ceil(math.sqrt(len(images))), pad=pad) if len(whole) == len(images) else None


def read_mjhq(path: str | Path) -> tuple[list[str], list[str]]:
    """Names `category/key` and prompts of MJHQ-30K's meta_data.json.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is in another form, or a name would leave the folder of the images.
    """
    path = published(str(path))
    _check_there(path, "MJHQ-30K's prompts", FETCH.format("mjhq"))
    try:
        meta = read_json(path)
        names = [f"{entry['category']}/{key}" for key, entry in meta.items()]
        prompts = [entry["prompt"] for entry in meta.values()]
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not in the form {{key: {{category, prompt}}}} of MJHQ-30K: {error!r}") from error
    for name, prompt in zip(names, prompts, strict=True):
        if not isinstance(prompt, str):
            raise ValueError(f"{path}: entry {name!r} has no usable prompt, category or key")
        try:
            check_inside(f"{name}.png")
        except ValueError as error:
            raise ValueError(f"{path}: entry {name!r} has no usable category or key: {error}") from error
    if not names:
        raise ValueError(f"{path} holds no prompts")
    return names, prompts


def read_prompts(path: str) -> list[str]:
    """Prompts of a text file, one a line, blank lines left out.

    Raises:
        FileNotFoundError, ValueError: when there is no file, or no prompt in it.
    """
    _check_there(Path(path), "--prompt-file", "check the path")
    prompts = [line for line in read_text(path).split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return prompts


def _check_there(path: Path, name: str, remedy: str) -> None:
    """FileNotFoundError unless a file is there; says what to do. OSError when it is a folder, a pipe or a device."""
    if not path.exists():
        raise FileNotFoundError(f"{name} {path} is not there; {remedy}")
    check_plain(path)
