"""How fast the ADM suite looks at images, and how much of the time goes to its network."""

import io
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor

from tim.benchmarks.measure import Results, machine, synchronize
from tim.distributed import set_tf32
from tim.evaluation.extract import Extraction, FeatureExtractor
from tim.evaluation.inception import FILES, FOLDER, InceptionV3, load_inception
from tim.evaluation.inputs import ImageFiles, as_uint8_tensor, find_images
from tim.images import save_png


def bench_adm(inception: Path | None, images: int, side: int, batch_size: int, workers: int | None, warmup: int = 2) -> Results:
    """Extract features of images in a temporary folder, after `warmup` batches that do not count.

    Args:
        inception: weights file; the usual places when None, and random weights when these are empty.
        images: number of PNG files of side x side pixels.

    Returns:
        `network_share` is the time in the network over the time of all.

    Raises:
        FileNotFoundError: when there is no such file.
    """
    set_tf32(False)
    state = PartialState()
    random = inception is None and not any((FOLDER / name).is_file() for name in FILES)
    network = random_inception().to(state.device) if random else load_inception(inception, state.device)
    spent = 0.0

    def timed(x: Tensor) -> dict[str, Tensor]:
        nonlocal spent
        began = time.perf_counter()
        out = network(x)
        synchronize(state.device)
        spent += time.perf_counter() - began
        return out

    with tempfile.TemporaryDirectory() as folder:
        for k in range(images):
            save_png(Path(folder) / f"{k:05d}.png", _image(k, side))
        files = ImageFiles(find_images(folder))
        first = files[0]
        assert isinstance(first, Tensor)  # it can be read: it was written just now
        for _ in range(warmup):
            timed(first.expand(batch_size, *first.shape).to(state.device))
        spent, began = 0.0, time.perf_counter()
        extractor = FeatureExtractor("timed", {}, as_uint8_tensor, timed)
        Extraction(extractor, state, Path(folder) / "cache", batch_size, workers).run(files)
        seconds = time.perf_counter() - began
    return {
        **machine(state.device),
        "images": images,
        "side": side,
        "batch_size": batch_size,
        "workers": workers,
        "seconds": seconds,
        "images_per_second": images / seconds,
        "network_share": spent / seconds,
        "random_weights": "network" if random else None,
    }


def random_inception() -> InceptionV3:
    """The network with random weights, which take no less time.

    Raises:
        ValueError: when torch-fidelity is not installed.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ValueError("Inception features need torch-fidelity: pip install torch-fidelity") from error

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: Any, **__: Any) -> None:  # of the file that the constructor reads
            pass

    file = io.BytesIO()
    torch.save({}, file)
    file.seek(0)
    return InceptionV3(Untrained("inception", ["2048"], file), "random")


def _image(index: int, side: int) -> np.ndarray:
    """Coarse colours under fine noise, whose PNG is about as long to read as a photograph's."""
    g = np.random.default_rng(index)
    coarse = Image.fromarray(g.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(coarse) + g.normal(0, 6, (side, side, 3)), 0, 255).astype(np.uint8)
