"""How fast the ADM suite looks at images, and how much of the time goes to its network."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor

from tim.benchmarks.measure import Report, device_name
from tim.distributed import set_tf32
from tim.evaluation.extract import extract
from tim.evaluation.inception import load_inception
from tim.evaluation.inputs import ImageFiles, find_images
from tim.images import save_png


@dataclass
class EvaluationMeasurement(Report):
    """Feature extraction of `images` PNG files; `network_share` is the time in the network over the time of all."""

    device: str
    images: int
    side: int
    batch_size: int
    workers: int | None
    seconds: float
    images_per_second: float
    network_share: float


def bench_adm(
    inception: Path | None, images: int, side: int, batch_size: int, workers: int | None, warmup: int = 2
) -> EvaluationMeasurement:
    """Extract features of pictures in a temporary folder, after `warmup` batches that do not count.

    Args:
        inception: weights file, the usual places when None.
        images: number of pictures of side x side pixels.

    Raises:
        FileNotFoundError: when there are no weights.
    """
    set_tf32(False)
    state = PartialState()
    network = load_inception(inception, state.device)
    spent = 0.0

    def timed(x: Tensor) -> dict[str, Tensor]:
        nonlocal spent
        began = time.perf_counter()
        out = network(x)
        if state.device.type == "cuda":
            torch.cuda.synchronize()
        spent += time.perf_counter() - began
        return out

    with tempfile.TemporaryDirectory() as folder:
        for k in range(images):
            save_png(Path(folder) / f"{k:05d}.png", _picture(k, side))
        files = ImageFiles(find_images(folder))
        for _ in range(warmup):
            timed(torch.stack([files[k % images] for k in range(batch_size)]).to(state.device))
        spent, began = 0.0, time.perf_counter()
        extract(files, timed, {}, state, Path(folder) / "cache", batch_size, workers)
        seconds = time.perf_counter() - began
    return EvaluationMeasurement(
        device_name(state.device), images, side, batch_size, workers, seconds, images / seconds, spent / seconds
    )


def _picture(index: int, side: int) -> np.ndarray:
    """Coarse colours under fine noise, whose PNG is about as long to read as a photograph's."""
    g = np.random.default_rng(index)
    coarse = Image.fromarray(g.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(coarse) + g.normal(0, 6, (side, side, 3)), 0, 255).astype(np.uint8)
