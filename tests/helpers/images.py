"""Small real pictures, and latents of noise."""

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images

from tim.images import save_png


def photographs(count: int, side: int, seed: int) -> list[np.ndarray]:
    """Crops of two photographs, uint8 (side, side, 3)."""
    g, pictures = np.random.default_rng(seed), load_sample_images().images
    crops = []
    for k in range(count):
        top, left = (int(g.integers(n - 4 * side)) for n in pictures[k % 2].shape[:2])
        crop = Image.fromarray(pictures[k % 2][top : top + 4 * side, left : left + 4 * side])
        crops.append(np.asarray(crop.resize((side, side), Image.Resampling.LANCZOS)))
    return crops


def save_photographs(folder, count: int, side: int = 48, seed: int = 0, names: str = "{:03d}.png"):
    """Crops of two photographs as files; returns the folder."""
    for k, crop in enumerate(photographs(count, side, seed)):
        path = folder / names.format(k)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(path, crop)
    return folder


def save_latents(root, count=12) -> None:
    """Stored latents (2, 1, 8, 8) in two class folders c0 and c1."""
    for k in range(count):
        folder = root / f"c{k % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        latent = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(k))
        save_file({"latent": latent, "label": torch.tensor(k % 2)}, folder / f"{k}.safetensors")
