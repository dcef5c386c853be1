"""Reading samples by key: what a reading gives is a function of (seed, step, position) alone, also when a file is broken."""

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset

from tim import rng
from tim.data.sampler import SampleKey

MAX_REPLACEMENTS = 20  # unreadable samples in a row before the reader gives up
PROBED = 8  # samples tried before a run starts


class Samples(Protocol):
    """What the trainer needs of a dataset.

    A dataset may also have `peers(index)`, an array of the samples that may stand in for `index` when it cannot be read;
    without it any sample may.
    """

    def __len__(self) -> int: ...

    def load(self, index: int, g: np.random.Generator) -> dict[str, Any]:
        """One sample, in a worker process.

        Args:
            index: from 0 to len - 1.
            g: decides its augmentation; nothing else may, so that a run can be repeated and resumed.

        Returns:
            `image` (C, H, W) in [-1, 1] or a `latent` (C, h, w), or both when REPA reads the image beside a latent, all of
            one size within a batch; and the condition, an int `label` or a `caption`.

        Raises:
            ValueError, OSError: when its file is missing or unreadable; the message names it. Another sample takes its
                place, and data.max_bad_samples says how often.
        """
        ...


class LabelledSamples(Samples, Protocol):
    """What the class-conditional trainer needs: samples with `label`.

    Attributes:
        num_labels: labels lie in [0, num_labels).

    A dataset may also have `class_names`, what its classes are called, for the list of what previews show.
    """

    num_labels: int


class ReplacingDataset(Dataset[dict[str, Any]]):
    """Samples read by SampleKey. An unreadable one is replaced by another, drawn from (seed, step, position).

    Every item is the sample's dictionary with `index`, `step`, `position`, `total` and `problem`; a loader makes micro-batches
    of them (`tim.data.batch.Batch`).
    """

    def __init__(self, samples: Samples, seed: int) -> None:
        self.samples, self.seed = samples, seed

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        index, problem = key.sample, ""
        for attempt in range(MAX_REPLACEMENTS + 1):
            try:
                sample = self.samples.load(index, rng.generator(self.seed, "data", key.step, key.position))
                place = {"index": index, "step": key.step, "position": key.position, "total": key.total}
                return {**sample, **place, "problem": problem}
            except (ValueError, OSError) as error:
                problem = problem or f"sample {index}: {error}"
                peers = self.samples.peers(index) if hasattr(self.samples, "peers") else range(len(self.samples))
                draw = rng.generator(self.seed, "replace", key.step, key.position).integers(len(peers), size=attempt + 1)
                index = int(peers[draw[-1]])
        raise ValueError(f"{MAX_REPLACEMENTS} replacements in a row cannot be read either; first: {problem}")


def first_readable(samples: Samples, indices: Iterable[int], key: str = "data.dataset") -> dict[str, Any]:
    """The first sample among `indices` that can be read, to look at before a run starts.

    Args:
        key: of the configuration that says where the samples are.

    Raises:
        ValueError: when none can.
    """
    problems = []
    for index in indices:
        try:
            return samples.load(int(index), rng.generator(0, "data"))
        except (ValueError, OSError) as error:
            problems.append(str(error))
    raise ValueError(f"none of the first {len(problems)} samples can be read, check {key}: {problems[0]}")
