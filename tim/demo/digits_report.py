"""From folders of generated digits to a table, a JSON and two pictures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tim
from tim.data.c2i import PackageDataset
from tim.evaluation.digits import DigitJudge, train_judge
from tim.images import make_grid, read_png

CLASSES = 10
ROWS_PER_NFE = 2
TITLES = {"frechet_distance": "Fréchet distance (lower is better)", "accuracy": "Accuracy"}


def evaluate_runs(sample_dir: Path) -> dict[str, Any]:
    """Metrics of every sampling run (folder with run.json) under `sample_dir`, keyed by NFE.

    Raises:
        FileNotFoundError: when there is no finished run.
    """
    judge = train_judge()
    runs = {}
    for record, folder in _runs(sample_dir):
        images, labels = _read(folder, record["settings"]["num_fid_samples"])
        runs[str(record["nfe"])] = judge.measure(images, labels) | {
            "images": len(images),
            "images_per_second": (record["speed"] or {}).get("images_per_second"),
            "weights_sha256": record["settings"]["weights_sha256"],
        }
    return {"nfe": runs, "real": _real(judge), "features": "hidden layer of a digit classifier", "tim": tim.__version__}


def _real(judge: DigitJudge) -> dict[str, float]:
    """What the judge says of the data itself: its held-out accuracy, and the distance of 1,000 resampled real digits."""
    data = PackageDataset("digits")
    pick = np.random.default_rng(0).integers(len(data), size=1000)
    floor = judge.measure(data.images[pick], torch.from_numpy(np.asarray(data.labels))[pick])["frechet_distance"]
    return {"held_out_accuracy": judge.held_out_accuracy, "frechet_distance_of_1000_real": floor}


def table(metrics: dict[str, Any]) -> str:
    """The numbers as text."""
    baseline = metrics.get("flow_matching", {})
    lines = [f"{'NFE':>4} {'Fréchet':>9} {'accuracy':>9}" + (f" {'FM Fréchet':>11} {'FM accuracy':>12}" if baseline else "")]
    for nfe, m in metrics["nfe"].items():
        line = f"{nfe:>4} {m['frechet_distance']:>9.2f} {m['accuracy']:>9.3f}"
        if nfe in baseline:
            line += f" {baseline[nfe]['frechet_distance']:>11.2f} {baseline[nfe]['accuracy']:>12.3f}"
        lines.append(line)
    real = metrics["real"]
    lines.append(
        f"real {real['frechet_distance_of_1000_real']:>9.2f} {real['held_out_accuracy']:>9.3f}"
        "   (1,000 resampled real digits; held-out accuracy of the classifier)"
    )
    return "\n".join(lines)


def write_report(metrics: dict[str, Any], sample_dir: Path, out: Path) -> None:
    """Write samples.png, quality.png and, last, metrics.json."""
    out.mkdir(parents=True, exist_ok=True)
    _draw_samples(sample_dir, out / "samples.png")
    _draw_quality(metrics, out / "quality.png")
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")


def _runs(sample_dir: Path) -> list[tuple[dict[str, Any], Path]]:
    found = [(json.loads(path.read_text()), path.parent) for path in sample_dir.glob("*/run.json")]
    found = [(record, folder) for record, folder in found if record["complete"]]
    if not found:
        raise FileNotFoundError(f"no finished sampling run under {sample_dir}")
    return sorted(found, key=lambda item: item[0]["nfe"])


def _read(folder: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 1, 8, 8) in [-1, 1] and the labels they were drawn for."""
    pixels = np.stack([read_png(folder / f"{k:06d}.png")[None, :, :, 0] for k in range(count)])
    return torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1), torch.arange(count) % CLASSES


def _draw_samples(sample_dir: Path, path: Path) -> None:
    """Two rows of one image per class for each NFE."""
    from matplotlib.figure import Figure

    runs = _runs(sample_dir)
    figure = Figure(figsize=(7, 1.4 * len(runs)), layout="constrained")
    for axis, (record, folder) in zip(np.atleast_1d(figure.subplots(len(runs), 1)), runs, strict=True):
        images = np.stack([read_png(folder / f"{k:06d}.png") for k in range(CLASSES * ROWS_PER_NFE)])
        axis.imshow(make_grid(images, columns=CLASSES, scale=8), interpolation="nearest")
        axis.set_ylabel(f"{record['nfe']} NFE")
        axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=110)


def _draw_quality(metrics: dict[str, Any], path: Path) -> None:
    """Fréchet distance and accuracy against NFE, with the baseline where there is one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axis, key in zip(figure.subplots(1, 2), TITLES, strict=True):
        for name, runs in (("TiM", metrics["nfe"]), ("flow matching", metrics.get("flow_matching", {}))):
            if runs:
                axis.plot([int(n) for n in runs], [runs[n][key] for n in runs], marker="o", label=name)
        axis.set_xscale("log", base=2)
        ticks = [int(n) for n in metrics["nfe"]]
        axis.set_xticks(ticks, [str(n) for n in ticks])
        axis.set(xlabel="network evaluations (NFE)", title=TITLES[key])
        axis.legend()
        axis.grid(alpha=0.3)
        if key == "frechet_distance":
            axis.set_yscale("log")
    figure.savefig(path, dpi=110)
