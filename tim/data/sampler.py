"""Which samples a step sees: pure functions of (seed, epoch, index), so that any step can be resumed anywhere."""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from tim import rng


class SampleKey(NamedTuple):
    """One visit: which optimiser step, which place in its global batch, which sample of the dataset."""

    step: int
    position: int
    index: int


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The permutation of range(size) of an epoch."""
    return rng.generator(seed, "order", step=epoch).permutation(size)


def sample_index(seed: int, visit: int, size: int) -> int:
    """The dataset index of the visit-th sample of a run; epochs follow one another without a gap."""
    epoch, place = divmod(visit, size)
    return int(epoch_order(seed, epoch, size)[place])


class StepBatchSampler:
    """Micro-batches of one rank, from `start_step` to `max_steps`.

    Position p of the global batch belongs to micro-batch (p // world) mod accumulation of rank p mod world: every
    micro-batch of every rank is an even comb through the global batch, so all see the same mix of diffusion,
    transition and consistency samples.

    Args:
        size: samples in the dataset.
        batch_size: per rank and micro-batch.
        samples_seen: visits before start_step.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        batch_size: int,
        accumulation: int,
        world_size: int,
        rank: int,
        start_step: int,
        max_steps: int,
        samples_seen: int,
    ) -> None:
        self.size, self.seed, self.batch_size = size, seed, batch_size
        self.accumulation, self.world_size, self.rank = accumulation, world_size, rank
        self.start_step, self.max_steps, self.samples_seen = start_step, max_steps, samples_seen

    @property
    def global_batch_size(self) -> int:
        """Samples of one optimiser step over all ranks and micro-batches."""
        return self.batch_size * self.accumulation * self.world_size

    def __len__(self) -> int:
        return max(0, self.max_steps - self.start_step) * self.accumulation

    def __iter__(self) -> Iterator[list[SampleKey]]:
        stride = self.world_size * self.accumulation
        for step in range(self.start_step, self.max_steps):
            first = self.samples_seen + (step - self.start_step) * self.global_batch_size
            for micro in range(self.accumulation):
                places = range(micro * self.world_size + self.rank, self.global_batch_size, stride)
                yield [SampleKey(step, p, sample_index(self.seed, first + p, self.size)) for p in places]
