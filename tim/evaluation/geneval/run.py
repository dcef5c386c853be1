"""GenEval on a folder of images: detect objects, read their colours, apply the rules with all processes, write the results."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor
from torch.nn import functional as nnf

from tim.evaluation.clip import Clip, load_clip
from tim.evaluation.geneval.detection import Detector
from tim.evaluation.geneval.detectors import load_detector
from tim.evaluation.geneval.rules import COLORS, ORIGINAL, Instance, Options, check_metadata, details, judge, keep_objects
from tim.evaluation.geneval.summary import summarize, write_results
from tim.evaluation.inputs import some
from tim.evaluation.results import check_continuable, describe_samples, judge_images, write_result
from tim.evaluation.samples import check_complete, check_numbers, read_run, refuse_partial
from tim.files import read_json
from tim.images import IMAGE_SUFFIXES, open_rgb
from tim.listing import list_files, list_folders

METADATA = "metadata.jsonl"
NUMBER = re.compile("[0-9]+")  # the name of a prompt's folder, and of an image without its suffix
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


def find_samples(folder: Path, allow_partial: bool = False) -> dict[str, dict[str, Any]]:
    """Images `{prompt:05d}/samples/*.png`, by their path within the folder, with `{prompt:05d}/metadata.jsonl`, in order.

    Folders and images whose name is no number do not count; they are named in a warning.

    Raises:
        FileNotFoundError: when there is no such folder, or metadata.jsonl is missing somewhere.
        ValueError: when there is no numbered folder, one without samples, a prompt that cannot be judged, or when prompts or
            images are missing, unless `allow_partial`.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    folders = list_folders(folder)
    prompts = [p for p in folders if NUMBER.fullmatch(p.name)]
    if not prompts:
        raise ValueError(f"{folder} holds no folders 00000, 00001, ...; give the one that sample_t2i_geneval_ddp.py has filled")
    missing = [p.name for p in prompts if not (p / METADATA).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: {some(missing)} of {len(prompts)} prompts without {METADATA}; sample them again")
    images = {p: list_files(p / "samples", IMAGE_SUFFIXES) if (p / "samples").is_dir() else [] for p in prompts}
    files = {p: [f for f in own if f.suffix == ".png" and NUMBER.fullmatch(f.stem)] for p, own in images.items()}
    stray = [p.name for p in folders if p not in files]
    stray += [f.relative_to(folder).as_posix() for p in prompts for f in images[p] if f not in files[p]]
    if stray:
        warnings.warn(f"{folder}: {some(stray)} are no numbered prompts or images and do not count", stacklevel=2)
    empty = [p.name for p in prompts if not files[p]]
    if empty:
        raise ValueError(f"{folder}: {some(empty)} of {len(prompts)} prompts without samples/*.png; sample them again")
    check_numbers(folder, [(int(p.name),) for p in prompts], allow_partial, "prompts")
    most = max(map(len, files.values()))
    short = [p.name for p in prompts if len(files[p]) < most]
    if short:
        refuse_partial(f"{folder}: {some(short)} of {len(prompts)} prompts with fewer than {most} images", allow_partial)
    check_complete(folder, read_run(folder), sum(map(len, files.values())), allow_partial)
    metadata = {p: _read_metadata(p / METADATA) for p in prompts}
    return {f.relative_to(folder).as_posix(): metadata[p] for p in prompts for f in files[p]}


def _read_metadata(path: Path) -> dict[str, Any]:
    metadata = read_json(path)
    check_metadata(metadata, str(path))
    return metadata


def judge_image(
    folder: Path, detector: Detector, colors: "ColorClassifier | None", options: Options, name: str, metadata: dict[str, Any]
) -> dict[str, Any]:
    """Detect, read colours, apply the rules.

    Args:
        colors: None when no prompt names a colour.
        name: the image's path within the folder.

    Returns:
        the fields of a line of the result file.

    Raises:
        ValueError: names an image that cannot be read.
    """
    image = open_rgb(folder / name)
    objects = keep_objects(detector(image), options, metadata["tag"])
    reasons = judge(metadata, objects, partial(colors, image) if colors else _no_colors, options.position_threshold)
    return {
        "filename": name,
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        "correct": not reasons,
        "reason": "\n".join(reasons),
        "metadata": metadata,
        "details": details(objects),
    }


def _no_colors(name: str, instances: Sequence[Any]) -> list[str]:
    raise AssertionError(f"the colour of {name} is asked for without a colour model")


def evaluate_folder(
    folder: Path, outfile: Path, model_path: str, options: Options, state: PartialState, allow_partial: bool = False
) -> dict[str, Any] | None:
    """Judge all samples of a folder; write the result file and, beside it, scores and provenance as `.json`.

    What each process has judged is kept in `<outfile>.parts`, from where an interrupted call is continued.

    Args:
        folder: see `find_samples`.
        outfile: the result file, a line an image.
        model_path: see `load_detector`.
        allow_partial: judge what is there of samples that are not complete.

    Returns:
        the scores (see `summarize`) on the main process, None on the others.

    Raises:
        FileNotFoundError, ValueError: for samples, models or a result file that cannot be used; the message names them.
    """
    if outfile.suffix == ".json":
        raise ValueError(f"--outfile {outfile} must end in .jsonl; scores and provenance go to the .json beside it")
    parts = outfile.with_name(f"{outfile.name}.parts")
    check_continuable([outfile, outfile.with_suffix(".json")], parts)
    samples = find_samples(folder, allow_partial)
    detector = load_detector(model_path, state.device)
    colors = None
    if any("color" in clause for metadata in samples.values() for clause in metadata.get("include", [])):
        colors = ColorClassifier(load_clip(options.clip_model, state.device), bool(options.crop), options.bgcolor)
    identity = {
        "detector": detector.identity,
        "color_model": colors.clip.identity if colors else None,
        "options": asdict(options),
    }
    found = judge_images(
        folder, samples, partial(judge_image, folder, detector, colors, options), parts, identity, state, "geneval"
    )
    if found is None:
        return None
    judged, speed = found
    write_results(outfile, judged)
    scores = summarize(judged)
    facts = {
        "n": scores["images"],
        "scores": scores,
        **identity,
        "samples": describe_samples(folder, [folder / name for name in samples]),
        "images_per_second_and_process": speed,
    }
    write_result(outfile.with_suffix(".json"), "geneval", facts)
    return scores


class ColorClassifier:
    """Reads the colours of objects of an image.

    Args:
        clip: see `tim.evaluation.clip.load_clip`.
        crop: cut objects out by their boxes, else show the whole image.
        bgcolor: what replaces everything outside an object's mask (or box, without masks); 'original' keeps it.
    """

    def __init__(self, clip: Clip, crop: bool = True, bgcolor: str = "#999") -> None:
        self.clip, self.crop, self.bgcolor = clip, crop, bgcolor
        self._weights: dict[str, Tensor] = {}

    @torch.inference_mode()
    def __call__(self, image: Image.Image, name: str, instances: Sequence[Instance]) -> list[str]:
        """One of `COLORS` for each object of class `name`; image in RGB."""
        views = [self.clip.crop(cut_out(image, instance, self.crop, self.bgcolor)) for instance in instances]
        logits = 100 * self.clip.encode_images(torch.stack(views)) @ self.weights(name).T
        return [COLORS[k] for k in logits.argmax(dim=-1).tolist()]

    @torch.inference_mode()
    def weights(self, name: str) -> Tensor:
        """(10, D) a unit vector for each colour of a class: the mean of the templates' unit vectors, normalised again."""
        if name not in self._weights:
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            features = self.clip.encode_texts(texts).unflatten(0, (len(COLORS), len(TEMPLATES)))
            self._weights[name] = nnf.normalize(features.mean(dim=1), dim=-1)
        return self._weights[name]


def cut_out(image: Image.Image, instance: Instance, crop: bool = True, bgcolor: str = "#999") -> Image.Image:
    """The object's box of an image (or all of it), everything outside its mask replaced by `bgcolor`."""
    x1, y1, x2, y2 = np.rint(instance.box).astype(int).tolist()
    x1, y1 = (min(max(low, 0), side - 1) for low, side in zip((x1, y1), image.size, strict=True))
    x2, y2 = max(min(x2, image.width), x1 + 1), max(min(y2, image.height), y1 + 1)  # thin boxes keep a pixel
    region = (x1, y1, x2, y2) if crop else (0, 0, *image.size)
    view = image.crop(region)
    if bgcolor == ORIGINAL:
        return view
    mask = instance.mask
    if mask is None:
        mask = np.zeros((image.height, image.width), dtype=bool)
        mask[y1:y2, x1:x2] = True
    own = Image.fromarray(mask[region[1] : region[3], region[0] : region[2]].astype(np.uint8) * 255)
    return Image.composite(view, Image.new("RGB", view.size, bgcolor), own)
