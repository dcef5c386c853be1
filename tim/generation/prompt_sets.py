"""What sampling runs draw: class labels or prompts, and the files their images become."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tim import rng
from tim.files import parse_json, read_text, replacing, write_json_lines
from tim.images import make_grid, read_png, save_image, save_png
from tim.listing import check_inside, list_files

IMAGENET_CLASSES = 1000


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
        self.prompts, self.per_group, self.groups = prompts, per_group, len(prompts)
        self.names = [f"{i:05d}" for i in range(self.groups)] if names is None else names
        digest = hashlib.sha256(json.dumps([self.names, self.prompts]).encode()).hexdigest()
        self.identity = identity or {"prompts": digest, "images_per_prompt": per_group}

    def files(self, folder: Path, group: int) -> list[Path]:
        """The files of a group, the one for the overview first; all there means done."""
        return [folder / self.file_name.format(name=self.names[group], j=j) for j in range(self.per_group)]

    def write(self, folder: Path, group: int, images: np.ndarray) -> None:
        """Write the files of a group, images (per_group, H, W, 3) uint8; each file whole or absent."""
        for path, image in zip(self.files(folder, group), images, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_image(path, image)


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

    def __init__(self, path: str, per_group: int = 4) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"--caption-dir {path} is not there; a .jsonl file is expected")
        self.metadata = []
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
        """Grid, metadata and images."""
        own = folder / self.names[group]
        return [own / "grid.png", own / "metadata.jsonl", *super().files(folder, group)]

    def write(self, folder: Path, group: int, images: np.ndarray) -> None:
        """Grid, metadata and images."""
        grid, metadata, *samples = self.files(folder, group)
        samples[0].parent.mkdir(parents=True, exist_ok=True)
        for path, image in zip(samples, images, strict=True):
            save_png(path, image)
        write_json_lines(metadata, [self.metadata[group]])
        save_png(grid, make_grid(images, columns=math.ceil(math.sqrt(self.per_group))))


class DPGPrompts(PromptSet):
    """`{prompt id}.png`, the images of a prompt side by side without a gap (2x2 for four); ids are `<id>.txt` of a folder."""

    evaluation = (
        "projects/evaluate/dpg_bench/compute_dpg_bench.py --image-root-path {folder} --res-path {folder}.txt --pic-num {n}"
    )

    def __init__(self, folder: str, per_group: int = 4) -> None:
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"--caption-dir {folder} is no folder; DPG-Bench's prompts/*.txt are expected")
        paths = list_files(folder, (".txt",))
        prompts = [read_text(path).strip() for path in paths]
        empty = [path.name for path, prompt in zip(paths, prompts, strict=True) if not prompt]
        if empty or not paths:
            raise ValueError(f"{folder}: {f'{empty[0]} is empty' if empty else 'there is no .txt file'}")
        super().__init__(prompts, per_group, [path.stem for path in paths])

    def files(self, folder: Path, group: int) -> list[Path]:
        """One of all images of a prompt."""
        return super().files(folder, group)[:1]

    def write(self, folder: Path, group: int, images: np.ndarray) -> None:
        """One of all images of a prompt."""
        save_png(self.files(folder, group)[0], make_grid(images, columns=math.ceil(math.sqrt(self.per_group)), pad=0))


class MJHQPrompts(PromptSet):
    """`{category}/{key}.png` for every key of meta_data.json ({key: {"category": ..., "prompt": ...}})."""

    evaluation = "projects/evaluate/mjhq30k/calculate_fid.py datasets/mjhq30k/images {folder}"

    def __init__(self, path: str, image_format: str = "png") -> None:
        names, prompts = read_mjhq(path)
        super().__init__(prompts, 1, names)
        self.file_name = f"{{name}}.{image_format}"


def read_mjhq(path: str | Path) -> tuple[list[str], list[str]]:
    """Names `category/key` and prompts of MJHQ-30K's meta_data.json.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is in another form, or a name would leave the folder of the images.
    """
    try:
        meta = parse_json(read_text(path))
        names = [f"{entry['category']}/{key}" for key, entry in meta.items()]
        prompts = [entry["prompt"] for entry in meta.values()]
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not there; MJHQ-30K's meta_data.json is expected") from None
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
    if not Path(path).is_file():
        raise FileNotFoundError(f"no prompt file {path}")
    prompts = [line for line in read_text(path).split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return prompts
