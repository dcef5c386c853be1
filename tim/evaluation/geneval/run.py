"""GenEval on a folder of images: find the samples, judge them with all processes, write the results."""

import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState

from tim.evaluation.clip import load_clip
from tim.evaluation.geneval.colors import ColorClassifier
from tim.evaluation.geneval.detection import Detector
from tim.evaluation.geneval.detectors import load_detector
from tim.evaluation.geneval.options import Options
from tim.evaluation.geneval.rules import check_metadata, details, judge, keep_objects
from tim.evaluation.geneval.summary import summarize, write_results
from tim.evaluation.inputs import some, stamp
from tim.evaluation.record import describe_samples, write_result
from tim.images import open_rgb
from tim.resumable import map_items

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Sample:
    """An image of a prompt; `filename` is relative to the folder of all samples."""

    filename: str
    metadata: dict[str, Any]


def find_samples(folder: Path) -> list[Sample]:
    """Images of `{prompt:05d}/samples/*.png` with the prompt of `{prompt:05d}/metadata.jsonl`, in order.

    Raises:
        FileNotFoundError: when there is no such folder, or metadata.jsonl is missing somewhere.
        ValueError: when there is no numbered folder, one without samples, or a prompt that cannot be judged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    prompts = sorted(p for p in folder.iterdir() if p.is_dir() and p.name.isdigit())
    if not prompts:
        raise ValueError(f"{folder} holds no folders 00000, 00001, ...; give the one that sample_t2i_geneval_ddp.py has filled")
    missing = [p.name for p in prompts if not (p / METADATA).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: {some(missing)} of {len(prompts)} prompts without {METADATA}; sample them again")
    files = {p: sorted(f for f in p.glob("samples/*.png") if not f.name.startswith(".")) for p in prompts}
    empty = [p.name for p in prompts if not files[p]]
    if empty:
        raise ValueError(f"{folder}: {some(empty)} of {len(prompts)} prompts without samples/*.png; sample them again")
    most = max(map(len, files.values()))
    short = [p.name for p in prompts if len(files[p]) < most]
    if short:
        warnings.warn(f"{folder}: {some(short)} of {len(prompts)} prompts with fewer than {most} images", stacklevel=2)
    metadata = {p: _read_metadata(p / METADATA) for p in prompts}
    return [Sample(f.relative_to(folder).as_posix(), metadata[p]) for p in prompts for f in files[p]]


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not one line of JSON: {error}") from error
    check_metadata(metadata, str(path))
    return metadata


def judge_image(
    folder: Path, sample: Sample, detector: Detector, colors: ColorClassifier | None, options: Options
) -> dict[str, Any]:
    """Detect, read colours, apply the rules.

    Args:
        colors: None when no prompt names a colour.

    Returns:
        the fields of a line of the result file, `image` (size and time of the file) and `seconds`.

    Raises:
        ValueError: names an image that cannot be read.
    """
    began = time.perf_counter()
    path, metadata = folder / sample.filename, sample.metadata
    image = open_rgb(path)
    objects = keep_objects(detector(image), options, metadata["tag"])
    reasons = judge(metadata, objects, partial(colors, image) if colors else _no_colors, options.position_threshold)
    return {
        "filename": sample.filename,
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        "correct": not reasons,
        "reason": "\n".join(reasons),
        "metadata": metadata,
        "details": details(objects),
        "image": stamp(path),
        "seconds": time.perf_counter() - began,
    }


def _no_colors(name: str, instances: Sequence[Any]) -> list[str]:
    raise AssertionError(f"the colour of {name} is asked for without a colour model")


def evaluate_folder(
    folder: Path, outfile: Path, model_path: str, options: Options, state: PartialState
) -> dict[str, Any] | None:
    """Judge all samples of a folder; write the result file and, beside it, scores and provenance as `.json`.

    What each process has judged is kept in `<outfile>.parts`, from where an interrupted call is continued.

    Args:
        folder: see `find_samples`.
        outfile: the result file, a line an image.
        model_path: see `load_detector`.

    Returns:
        the scores (see `summarize`) on the main process, None on the others.

    Raises:
        FileNotFoundError, ValueError: for samples, models or a result file that cannot be used; the message names them.
    """
    if outfile.suffix == ".json":
        raise ValueError(f"--outfile {outfile} must end in .jsonl; scores and provenance go to the .json beside it")
    parts = outfile.with_name(f"{outfile.name}.parts")
    if outfile.exists() and not parts.is_dir():
        raise ValueError(f"{outfile} is there already, from a run that this one cannot continue; delete it or choose another")
    samples = find_samples(folder)
    detector = load_detector(model_path, state.device)
    asked = any("color" in clause for sample in samples for clause in sample.metadata.get("include", []))
    colors = None
    if asked:
        colors = ColorClassifier(load_clip(options.clip_model, state.device), bool(options.crop), options.bgcolor)
    models = {"detector": detector.identity, "color_model": colors.clip.identity if colors else None}
    identity = {**models, "options": asdict(options)}
    records = map_items(
        samples,
        lambda batch: [judge_image(folder, sample, detector, colors, options) for sample in batch],
        parts, identity, state, desc="geneval",
    )  # fmt: skip
    if records is None:
        return None
    changed = [r["filename"] for r in records if r["image"] != stamp(folder / r["filename"])]
    if changed:
        raise ValueError(f"{folder}: {some(changed)} images have changed since they were judged; delete {parts}")
    write_results(outfile, records)
    scores = summarize(records)
    seconds = sum(r["seconds"] for r in records)
    facts = {
        "n": scores["images"],
        "scores": scores,
        **identity,
        "samples": describe_samples(folder, [folder / sample.filename for sample in samples]),
        "images_per_second_and_process": len(records) / seconds,
    }
    write_result(outfile.with_suffix(".json"), "geneval", facts)
    return scores
