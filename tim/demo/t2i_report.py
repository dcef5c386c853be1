"""Does a small text-to-image model draw what its prompts say? From folders of sample_t2i.py to a table and pictures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import tim
from tim import rng
from tim.data.t2i import CaptionedImages
from tim.demo.shapes import score
from tim.evaluation.retrieval import cell_colors, image_features, rank_report
from tim.images import labelled_grid, read_png, save_png, to_uint8

SHOWN = 10  # prompts in the picture
JUDGES = {
    "shapes": "colour and shape by rule",
    "retrieval": "EfficientNet-lite0 features (ImageNet), cosine to the real picture of every trained prompt",
}


class Run:
    """The pictures of all sampling folders with one number of network evaluations."""

    def __init__(self, nfe: int, steps: int, record: dict[str, Any]) -> None:
        self.nfe, self.steps, self.record = nfe, steps, record
        self.images: list[np.ndarray] = []
        self.prompts: list[str] = []


def read_runs(sample_dir: Path) -> list[Run]:
    """Finished runs under sample_dir, folders of several sizes joined, fewest evaluations first.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when runs with the same number of evaluations differ in weights, seed, steps or guidance.
    """
    runs: dict[int, Run] = {}
    for path in sorted(sample_dir.rglob("run.json")):
        record = json.loads(path.read_text())
        if not record["complete"] or not (path.parent / "prompts.json").is_file():
            continue
        prompts = json.loads((path.parent / "prompts.json").read_text(encoding="utf-8"))
        run = runs.setdefault(record["nfe"], Run(record["nfe"], record["settings"]["num_steps"], record))
        for key in ("num_steps", "cfg_scale", "weights_sha256", "global_seed"):
            if run.record["settings"][key] != record["settings"][key]:
                raise ValueError(f"{sample_dir} holds runs of {record['nfe']} NFE that differ in {key}; measure them apart")
        for picture in sorted(path.parent.glob("?????-??.png")):
            run.images.append(read_png(picture))
            run.prompts.append(prompts[int(picture.stem.split("-")[0])])
    if not runs:
        raise FileNotFoundError(f"no finished run of sample_t2i.py in {sample_dir}")
    return [runs[nfe] for nfe in sorted(runs)]


def real_pictures(dataset: CaptionedImages) -> dict[str, np.ndarray]:
    """First caption -> real picture (H, W, 3) uint8 at the size it was trained at, the first of equal captions."""
    pictures: dict[str, np.ndarray] = {}
    for index in np.sort(np.concatenate(dataset.batches)):
        caption = dataset.captions(int(index))[0]
        if caption not in pictures:
            pictures[caption] = to_uint8(dataset.load(int(index), rng.generator(0, "data"))["image"][None])[0]
    return pictures


def evaluate(judge: str, runs: Sequence[Run], real: dict[str, np.ndarray]) -> dict[str, Any]:
    """Metrics of every run, keyed by NFE.

    Args:
        judge: `shapes` (accuracy of colour and shape) or `retrieval` (rank of the prompt's own picture).
        real: the trained prompts and their pictures.

    Raises:
        ValueError: when a prompt was not trained, for retrieval.
    """
    metrics: dict[str, Any] = {"judge": JUDGES[judge], "tim": tim.__version__, "trained_prompts": len(real), "nfe": {}}
    names = {prompt: k for k, prompt in enumerate(real)}
    features = _stacked(image_features, list(real.values())) if judge == "retrieval" else None
    colors = _stacked(cell_colors, list(real.values())) if judge == "retrieval" else None
    for run in runs:
        if judge == "shapes":
            values = score(np.stack(run.images), run.prompts)
        else:
            unknown = [p for p in run.prompts if p not in names]
            if unknown:
                raise ValueError(f"prompt {unknown[0]!r} has no real picture to compare with")
            ids = np.array([names[p] for p in run.prompts])
            values = rank_report(_stacked(image_features, run.images), features, ids)
            values["color_top5"] = rank_report(_stacked(cell_colors, run.images), colors, ids)["top5"]
        settings = run.record["settings"]
        metrics["nfe"][str(run.nfe)] = values | {
            "num_steps": run.steps,
            "cfg_scale": settings["cfg_scale"],
            "images_per_second": (run.record["speed"] or {}).get("images_per_second"),
            "weights_sha256": settings["weights_sha256"],
        }
    return metrics


def table(metrics: dict[str, Any]) -> str:
    """The numbers as text."""
    first = next(iter(metrics["nfe"].values()))
    keys = [k for k in ("color", "shape", "both", "top1", "top5", "mean_rank", "color_top5") if k in first]
    lines = [metrics["judge"], f"{'steps':>6} {'NFE':>5} " + " ".join(f"{k:>10}" for k in keys)]
    for nfe, values in metrics["nfe"].items():
        lines.append(f"{values['num_steps']:>6} {nfe:>5} " + " ".join(f"{values[k]:>10.3f}" for k in keys))
    if "top1" in first:
        chance = 1 / first["candidates"]
        lines.append("chance       " + " ".join(f"{v:>10.3f}" for v in (chance, 5 * chance, (first["candidates"] + 1) / 2)))
    return "\n".join(lines)


def write_report(metrics: dict[str, Any], runs: Sequence[Run], real: dict[str, np.ndarray], out: Path) -> None:
    """metrics.json, samples.png (real picture, then every number of steps) and quality.png in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    prompts = list(dict.fromkeys(runs[0].prompts))
    shown = [prompts[int(k)] for k in np.linspace(0, len(prompts) - 1, min(SHOWN, len(prompts)))]
    rows = [[real[p], *(run.images[run.prompts.index(p)] for run in runs)] for p in shown]
    labels = ["real", *(f"{run.steps} step{'s' * (run.steps > 1)}" for run in runs)]
    save_png(out / "samples.png", labelled_grid(rows, shown, labels))
    _plot(metrics, out / "quality.png")
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")


def _stacked(features: Any, images: list[np.ndarray]) -> np.ndarray:
    """Features of pictures of several sizes, in their order."""
    rows: dict[int, np.ndarray] = {}
    for shape in {image.shape for image in images}:
        places = [k for k, image in enumerate(images) if image.shape == shape]
        rows |= dict(zip(places, features(np.stack([images[k] for k in places])), strict=True))
    return np.stack([rows[k] for k in range(len(images))])


def _plot(metrics: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    nfe = [int(k) for k in metrics["nfe"]]
    figure = Figure(figsize=(5.5, 3.2), layout="constrained")
    axis = figure.subplots()
    for key in ("color", "shape", "top1", "top5"):
        values = [m.get(key) for m in metrics["nfe"].values()]
        if values[0] is not None:
            axis.plot(nfe, values, marker="o", label=key)
    axis.set(xscale="log", xlabel="network evaluations", ylim=(0, 1.02), title=metrics["judge"].split(" (")[0])
    axis.set_xticks(nfe, [str(k) for k in nfe])
    axis.legend()
    figure.savefig(path, dpi=110)
