"""Which samples a step sees: pure functions of (seed, epoch, index), so that any step can be resumed anywhere."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from tim import rng


class SampleKey(NamedTuple):
    """One reading of a sample: its optimiser step, its place in the global batch of `total`, its number in the dataset."""

    step: int
    position: int
    sample: int
    total: int


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The permutation of range(size) of an epoch."""
    return rng.generator(seed, "order", step=epoch).permutation(size)


def sample_index(seed: int, place: int, size: int) -> int:
    """The dataset index of the place-th sample of a run; epochs follow one another without a gap."""
    epoch, rest = divmod(place, size)
    return int(epoch_order(seed, epoch, size)[rest])


@dataclass(kw_only=True)
class BatchOrder(ABC):
    """Micro-batches of one rank from `start_step` to `max_steps`; subclasses say which samples they hold.

    Args:
        seed: of the run.
        accumulation: micro-batches of a step, for each of `world_size` processes; this one is number `rank`.
        samples_seen: samples, or packed batches of buckets, that were taken before start_step.
    """

    seed: int
    accumulation: int
    world_size: int
    rank: int
    start_step: int
    max_steps: int
    samples_seen: int

    def __len__(self) -> int:
        return max(0, self.max_steps - self.start_step) * self.accumulation

    @property
    @abstractmethod
    def samples_per_step(self) -> int:
        """What a step takes over all ranks and micro-batches, counted like samples_seen."""

    @abstractmethod
    def __iter__(self) -> Iterator[list[SampleKey]]: ...


@dataclass
class StepBatchSampler(BatchOrder):
    """Batches of any samples of one size; a step takes batch_size x accumulation x world_size of them.

    Position p of the global batch belongs to micro-batch (p // world) mod accumulation of rank p mod world: every
    micro-batch of every rank is an even comb through the global batch, so all see the same mix of diffusion,
    transition and consistency samples.

    Args:
        size: samples in the dataset.
        batch_size: per rank and micro-batch.
    """

    size: int
    batch_size: int

    @property
    def samples_per_step(self) -> int:
        """The global batch."""
        return self.batch_size * self.accumulation * self.world_size

    def __iter__(self) -> Iterator[list[SampleKey]]:
        total = self.samples_per_step
        stride = self.world_size * self.accumulation
        for step in range(self.start_step, self.max_steps):
            first = self.samples_seen + (step - self.start_step) * total
            for micro in range(self.accumulation):
                places = range(micro * self.world_size + self.rank, total, stride)
                yield [SampleKey(step, p, sample_index(self.seed, first + p, self.size), total) for p in places]


@dataclass
class BucketBatchSampler(BatchOrder):
    """Packed batches: each has one image size, batches differ in size and length.

    One step takes world x accumulation packed batches; batch j of them is micro-batch j // world of rank j mod world.
    Batches are shuffled anew every epoch, and so is the order inside each. Positions run through all batches of the step
    in proportion to their lengths, so that every batch has the same mix of diffusion, transition and consistency samples.

    Args:
        batches: sample indices of each packed batch.
    """

    batches: Sequence[Sequence[int] | np.ndarray]

    @property
    def samples_per_step(self) -> int:
        """Packed batches of a step."""
        return self.accumulation * self.world_size

    def __iter__(self) -> Iterator[list[SampleKey]]:
        count = self.samples_per_step
        for step in range(self.start_step, self.max_steps):
            first = self.samples_seen + (step - self.start_step) * count
            members = [self._members(first + j) for j in range(count)]
            positions = interleave([len(m) for m in members])
            total = sum(len(m) for m in members)
            for micro in range(self.accumulation):
                j = micro * self.world_size + self.rank
                yield [SampleKey(step, p, i, total) for p, i in zip(positions[j], members[j], strict=True)]

    def _members(self, place: int) -> list[int]:
        """The samples of the place-th batch of the run, in this epoch's order."""
        epoch, _ = divmod(place, len(self.batches))
        batch = sample_index(self.seed, place, len(self.batches))
        order = rng.generator(self.seed, "shuffle", epoch, batch).permutation(len(self.batches[batch]))
        return [int(self.batches[batch][k]) for k in order]


def interleave(lengths: Sequence[int]) -> list[list[int]]:
    """Places 0 .. sum(lengths)-1 dealt to batches of these lengths, each batch spread evenly over the whole range."""
    fractions = np.concatenate([(np.arange(n) + 0.5) / n for n in lengths])
    owners = np.repeat(np.arange(len(lengths)), lengths)
    places = np.empty(len(owners), dtype=np.int64)
    # Sorted by where each member stands within its own batch; batches take turns where that is equal.
    places[np.lexsort((owners, fractions))] = np.arange(len(owners))
    return [part.tolist() for part in np.split(places, np.cumsum(lengths)[:-1])]
