"""Does a small model draw what it is asked for? From folders of samples to a table, a JSON and two figures."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import tim
from tim import rng
from tim.data.c2i import PackageDataset
from tim.data.t2i import CaptionedImages
from tim.demo.digits import DigitJudge
from tim.demo.retrieval import RetrievalJudge
from tim.demo.shapes import score
from tim.evaluation.results import columns
from tim.evaluation.samples import check_complete, find_runs
from tim.files import read_json, replacing, write_json
from tim.images import image_size, labelled_grid, read_png, save_png, to_uint8

logger = logging.getLogger(__name__)
SHOWN = 10  # prompts in samples.png
CLASSES, SIDE = 10, 8  # of digits, drawn in turn; pixels
PROMPTS = "prompts.json"  # in a folder of sample_t2i.py
Judge = Callable[[Sequence[np.ndarray], Sequence[str]], Mapping[str, Any]]  # images and their prompts to metrics
JUDGES: dict[str, tuple[str, Callable[[dict[str, np.ndarray]], Judge]]] = {  # what it is, and how it is made of real images
    "digits": ("hidden layer of a digit classifier", lambda real: DigitJudge()),
    "shapes": ("colour and shape by rule", lambda real: score),
    "retrieval": (
        "EfficientNet-lite0 features (ImageNet), cosine to the real picture of every trained prompt",
        RetrievalJudge,
    ),
}
COLUMNS = ("frechet_distance", "accuracy", "color", "shape", "both", "top1", "top5", "mean_rank", "color_top5")
PANELS = {  # of the plot: title, and scale of the metrics
    "Fréchet distance (lower is better)": ("log", ("frechet_distance",)),
    "Accuracy": ("linear", ("accuracy", "color", "shape")),
    "Own picture": ("linear", ("top1", "top5")),
}


@dataclass
class Run:
    """The images of all sampling folders with one number of network evaluations, and what they were asked to show."""

    nfe: int
    record: dict[str, Any]
    images: list[np.ndarray] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)


def report(
    judge: str, samples: Path, real: dict[str, np.ndarray], out: Path, baseline: Path | None = None, allow_partial: bool = False
) -> None:
    """Measure all runs below `samples`, print their table and write the report.

    Args:
        judge: see `evaluate`.
        baseline: metrics.json of flow matching to compare with.

    Raises:
        FileNotFoundError, ValueError: see `read_runs`, `read_metrics` and `evaluate`; when matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        raise ValueError("the report's figures need matplotlib: pip install -e .[demo]")
    flow_matching = read_metrics(baseline)["nfe"] if baseline else None
    runs = read_runs(samples, judge == "digits", allow_partial)
    metrics = evaluate(judge, runs, real)
    if flow_matching:
        metrics["flow_matching"] = flow_matching
    print(table(metrics))
    write_report(metrics, runs, real, out)
    print(f"wrote {out}/metrics.json, samples.png, quality.png")


def read_metrics(path: Path) -> dict[str, Any]:
    """A metrics.json of `write_report`.

    Raises:
        FileNotFoundError: when it is missing.
        ValueError: when it is another file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; a metrics.json of this command is expected")
    metrics = read_json(path)
    try:
        table(metrics)
    except (ValueError, TypeError, KeyError, AttributeError, StopIteration) as error:
        raise ValueError(f"{path} is no metrics.json of this command: {error!r}") from error
    return metrics


def read_runs(sample_dir: Path, digits: bool = False, allow_partial: bool = False) -> list[Run]:
    """Finished runs of the samplers under sample_dir, folders of several sizes joined, fewest evaluations first.

    Args:
        digits: look for runs of sample_c2i_ddp.py that drew digits, else for those of sample_t2i.py; others are named in the
            log and left out.
        allow_partial: leave out runs that are not finished, and measure what is there of those with fewer images.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when one is not finished, or runs with the same number of evaluations differ in weights, seed, steps or
            guidance.
    """
    if not sample_dir.is_dir():
        raise FileNotFoundError(f"no folder {sample_dir}")
    runs: dict[int, Run] = {}
    for folder, record in sorted(find_runs(sample_dir).items()):
        samples = _digits(folder, record) if digits else _captioned(folder)
        if samples:
            check_complete(folder, record, len(samples), allow_partial)
        if not samples or not isinstance(record.get("nfe"), int):  # the number of evaluations is written at the end
            logger.info("%s is left out: no finished samples of this kind", folder)
            continue
        run = runs.setdefault(record["nfe"], Run(record["nfe"], record))
        for key in ("num_steps", "cfg_scale", "weights_sha256", "global_seed"):
            if run.record["settings"].get(key) != record["settings"].get(key):
                raise ValueError(f"{sample_dir} holds runs of {record['nfe']} NFE that differ in {key}; measure them apart")
        run.images += [read_png(file) for file, _ in samples]
        run.prompts += [prompt for _, prompt in samples]
    if not runs:
        raise FileNotFoundError(f"no finished sampling run in {sample_dir}")
    return [runs[nfe] for nfe in sorted(runs)]


def _digits(folder: Path, record: dict[str, Any]) -> list[tuple[Path, str]]:
    """Digits of a run of sample_c2i_ddp.py that drew the classes in turn, with their names; none of other runs."""
    settings = record["settings"]
    in_turn = settings.get("class_labels", "cycle") == "cycle" and settings.get("num_classes") in (None, CLASSES)
    files = [path for path in sorted(folder.glob("*.png")) if re.fullmatch(r"\d{6}", path.stem)]
    files = files[: settings.get("num_fid_samples")]
    if not files or not in_turn or (folder / PROMPTS).is_file() or image_size(files[0]) != (SIDE, SIDE):
        return []
    return [(path, str(int(path.stem) % CLASSES)) for path in files]


def _captioned(folder: Path) -> list[tuple[Path, str]]:
    """Images of a run of sample_t2i.py with their prompts; none of other runs.

    Raises:
        ValueError: for images without a prompt.
    """
    path = folder / PROMPTS
    if not path.is_file():
        return []
    try:
        prompts = read_json(path)
        files = [file for file in sorted(folder.glob("*.png")) if re.fullmatch(r"\d{5}-\d{2}", file.stem)]
        return [(file, prompts[int(file.stem[:5])]) for file in files]
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{path} does not hold the prompts of the images beside it: {error!r}") from error


def real_images(dataset: CaptionedImages) -> dict[str, np.ndarray]:
    """First caption -> real image (H, W, 3) uint8 at the size it was trained at, the first of equal captions."""
    images: dict[str, np.ndarray] = {}
    for index in np.sort(np.concatenate(dataset.batches)):
        caption = dataset.captions(int(index))[0]
        if caption not in images:
            images[caption] = to_uint8(dataset.load(int(index), rng.generator(0, "data"))["image"][None])[0]
    return images


def real_digits() -> dict[str, np.ndarray]:
    """The first digit (8, 8, 3) uint8 of each class, by its name '0' to '9'."""
    data = PackageDataset("digits")
    labels = np.asarray(data.labels)
    return {str(k): to_uint8(data.images[int(np.argmax(labels == k))][None])[0] for k in range(CLASSES)}


def evaluate(name: str, runs: Sequence[Run], real: dict[str, np.ndarray]) -> dict[str, Any]:
    """Metrics of every run, keyed by NFE.

    Args:
        name: `digits` (Fréchet distance, accuracy), `shapes` (accuracy of colour and shape) or `retrieval` (rank of the
            prompt's own image).
        real: the trained prompts and their images.

    Raises:
        ValueError: when a prompt was not trained, for retrieval.
    """
    title, make = JUDGES[name]
    judge = make(real)
    metrics: dict[str, Any] = {"judge": title, "tim": tim.__version__, "trained_prompts": len(real), "nfe": {}}
    for run in runs:
        settings = run.record["settings"]
        metrics["nfe"][str(run.nfe)] = {
            "images": len(run.images),
            **judge(run.images, run.prompts),
            "num_steps": settings.get("num_steps"),
            "cfg_scale": settings.get("cfg_scale"),
            "images_per_second": (run.record.get("speed") or {}).get("images_per_second"),
            "weights_sha256": settings.get("weights_sha256"),
        }
    if isinstance(judge, DigitJudge):
        metrics["real"] = judge.measure_real()
    return metrics


def table(metrics: dict[str, Any]) -> str:
    """The numbers as text, beside those of the baseline where there is one, and what perfect or blind drawing would score."""
    runs, baseline = metrics["nfe"], metrics.get("flow_matching", {})
    first = next(iter(runs.values()))
    keys = [key for key in COLUMNS if key in first]
    titles = ["Fréchet" if key == "frechet_distance" else key for key in keys]
    rows: list[list[object]] = [["NFE", "steps", *titles]]
    rows += [[nfe, values.get("num_steps") or "-", *(f"{values[key]:.3f}" for key in keys)] for nfe, values in runs.items()]
    if baseline:
        rows[0] += [f"FM {title}" for title in titles]
        for row in rows[1:]:
            row += [f"{baseline[row[0]][key]:.3f}" if row[0] in baseline else "" for key in keys]
    judge = metrics.get("judge") or metrics["features"]  # as the stored numbers of flow matching name it
    lines = [f"judge: {judge}", columns(rows, [">5", ">6", *[">11"] * (len(rows[0]) - 2)])]
    if "real" in metrics:
        real = metrics["real"]
        lines.append(f"1,000 resampled real digits: Fréchet distance {real['frechet_distance_of_1000_real']:.3f}")
        lines.append(f"accuracy of the classifier on held-out digits: {real['held_out_accuracy']:.3f}")
    if "candidates" in first:
        count = first["candidates"]
        lines.append(f"chance: top1 {1 / count:.3f}, top5 {5 / count:.3f}, mean_rank {(count + 1) / 2:.3f}")
    return "\n".join(lines)


def write_report(metrics: dict[str, Any], runs: Sequence[Run], real: dict[str, np.ndarray], out: Path) -> None:
    """samples.png (real image, then every number of evaluations), quality.png and, last, metrics.json in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    prompts = list(dict.fromkeys(runs[0].prompts))
    shown = [prompts[int(k)] for k in np.linspace(0, len(prompts) - 1, min(SHOWN, len(prompts)))]
    rows = [[real[p], *(run.images[run.prompts.index(p)] for run in runs)] for p in shown]
    save_png(out / "samples.png", labelled_grid(rows, shown, ["real", *(f"{run.nfe} NFE" for run in runs)]))
    _plot(metrics, out / "quality.png")
    write_json(out / "metrics.json", metrics)


def _plot(metrics: dict[str, Any], path: Path) -> None:
    """Every metric of `PANELS` against NFE, with the baseline where there is one."""
    from matplotlib.figure import Figure

    first = next(iter(metrics["nfe"].values()))
    panels = {title: panel for title, panel in PANELS.items() if any(key in first for key in panel[1])}
    figure = Figure(figsize=(4.5 * len(panels), 3.4), layout="constrained")
    for axis, (title, (scale, keys)) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        present = [key for key in keys if key in first]
        for model, runs in (("TiM", metrics["nfe"]), ("flow matching", metrics.get("flow_matching", {}))):
            for key in present if runs else ():
                label = model if len(present) == 1 else f"{model}, {key}"
                axis.plot([int(n) for n in runs], [runs[n][key] for n in runs], marker="o", label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks([int(n) for n in metrics["nfe"]], list(metrics["nfe"]))
        axis.set(xlabel="network evaluations (NFE)", yscale=scale, title=title)
        axis.legend()
        axis.grid(alpha=0.3)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
