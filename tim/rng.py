"""Randomness as a pure function of (seed, purpose, step, index).

Counter-based Philox generators: no state to save, no rank or worker to depend on. Numbers are drawn on the CPU, so
they are the same on every device.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

PURPOSES = {
    "order": 0,
    "data": 1,
    "train": 2,
    "posterior": 3,
    "sample": 4,
    "label": 5,
    "preview": 6,
    "shuffle": 7,
    "replace": 8,
    "guidance": 9,
}


def generator(seed: int, purpose: str, step: int = 0, index: int = 0) -> np.random.Generator:
    """An independent generator for each (seed, purpose, step, index).

    Raises:
        ValueError: for a negative seed.
    """
    if seed < 0:
        raise ValueError(f"the seed must be >= 0, got {seed}")
    return np.random.Generator(np.random.Philox(key=[seed, PURPOSES[purpose]], counter=[0, 0, index, step]))


def normals(seed: int, purpose: str, step: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normals (len(indices), *shape) in float32, row i from the generator of indices[i]."""
    rows = [generator(seed, purpose, step, i).standard_normal(tuple(shape), dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows))


def uniforms(seed: int, purpose: str, step: int, indices: Sequence[int], count: int) -> Tensor:
    """Uniform draws in [0, 1) (len(indices), count) in float32, row i from the generator of indices[i]."""
    rows = [generator(seed, purpose, step, i).random(count, dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows))


def training_draws(seed: int, step: int, positions: Sequence[int], shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """All draws of a training batch, each sample's from its own generator (seed, step, position in the global batch).

    Returns:
        times: standard normals (B, 2) for the two times; drop: uniforms (B,) for condition dropout;
        noise: standard normals (B, *shape). All float32.
    """
    times, drop, noise = [], [], []
    for position in positions:
        g = generator(seed, "train", step, position)
        times.append(g.standard_normal(2, dtype=np.float32))
        drop.append(g.random(dtype=np.float32))
        noise.append(g.standard_normal(tuple(shape), dtype=np.float32))
    return torch.from_numpy(np.stack(times)), torch.from_numpy(np.stack(drop)), torch.from_numpy(np.stack(noise))
