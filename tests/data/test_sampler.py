"""Data order: a pure function of (seed, epoch, index), the same for every way of running."""

import pytest
import torch

from tim import rng
from tim.data.sampler import BucketBatchSampler, StepBatchSampler, epoch_order, interleave, sample_index


def order(size, world, accumulation, batch, rank, start=0, end=6, seen=0, seed=3):
    return StepBatchSampler(
        size, batch, seed=seed, accumulation=accumulation, world_size=world, rank=rank,
        start_step=start, max_steps=end, samples_seen=seen,
    )  # fmt: skip


def steps(size, world, accumulation, batch, start=0, end=6, seen=0, seed=3):
    """step -> position -> dataset index, over all ranks."""
    out = {}
    for rank in range(world):
        for keys in order(size, world, accumulation, batch, rank, start, end, seen, seed):
            assert len(keys) == batch and [k.position for k in keys] == sorted(k.position for k in keys)
            for key in keys:
                assert out.setdefault(key.step, {}).setdefault(key.position, key.sample) == key.sample
    return out


@pytest.mark.parametrize("world,accumulation,batch", [(1, 1, 24), (2, 1, 12), (3, 2, 4), (4, 3, 2), (8, 1, 3)])
def test_global_batches_do_not_depend_on_processes_or_accumulation(world, accumulation, batch):
    assert steps(37, world, accumulation, batch) == steps(37, 1, 1, 24)


def test_every_epoch_is_a_permutation_and_epochs_differ():
    orders = [epoch_order(0, e, 37).tolist() for e in range(3)]
    assert all(sorted(o) == list(range(37)) for o in orders)
    assert orders[0] != orders[1] != orders[2]
    seen = [sample_index(0, v, 37) for v in range(74)]
    assert seen == orders[0] + orders[1]
    assert epoch_order(1, 0, 37).tolist() != orders[0]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_every_step_of_37_samples_resumes_on_any_number_of_processes(world):
    """40 steps of 24 are 26 epochs: every step sees the same set in the same places, also when the run starts there."""
    whole = steps(37, 1, 1, 24, end=40)
    assert [sorted(places) for places in whole.values()] == [list(range(24))] * 40
    for start in range(40):
        rest = steps(37, world, 1, 24 // world, start=start, end=40, seen=24 * start)
        assert rest == {s: v for s, v in whole.items() if s >= start}


def test_combs_share_the_mix_of_the_batch():
    """Each micro-batch of each rank spans the whole global batch, so all see every kind of sample."""
    for rank in (0, 1):
        for keys in order(100, 2, 2, 8, rank, end=1):
            assert keys[0].position < 4 and keys[-1].position >= 28


PACKED = [[0, 1, 2], [3, 4, 5, 6, 7], [8, 9], [10, 11, 12, 13]]


def packed(world, accumulation, rank, start=0, end=6, seen=0):
    return BucketBatchSampler(
        PACKED,
        seed=3,
        accumulation=accumulation,
        world_size=world,
        rank=rank,
        start_step=start,
        max_steps=end,
        samples_seen=seen,
    )


def packed_steps(world, accumulation, **kwargs):
    """step -> the set of (position, index, total) over all ranks."""
    out = {}
    for rank in range(world):
        for keys in packed(world, accumulation, rank, **kwargs):
            assert sorted(k.sample for k in keys) in PACKED  # one packed batch, so one picture size
            assert [k.position for k in keys] == sorted(k.position for k in keys)
            out.setdefault(keys[0].step, set()).update((k.position, k.sample, k.total) for k in keys)
    return out


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_every_step_of_packed_batches_resumes_on_any_number_of_processes(world):
    """24 batches a step, six epochs of the set."""
    whole = packed_steps(1, 24, end=8)
    for start in range(8):
        rest = packed_steps(world, 24 // world, start=start, end=8, seen=24 * start)
        assert rest == {s: v for s, v in whole.items() if s >= start}


@pytest.mark.parametrize("world,accumulation", [(1, 4), (2, 2), (4, 1)])
def test_packed_batches_do_not_depend_on_processes_or_accumulation(world, accumulation):
    want = packed_steps(1, 4)
    assert packed_steps(world, accumulation) == want
    for keys in want.values():  # four batches a step: an epoch
        assert sorted(i for _, i, _ in keys) == list(range(14)) and {n for *_, n in keys} == {14}
        assert sorted(p for p, *_ in keys) == list(range(14))
    assert want[0] != {(p, i, n) for p, i, n in want[1]}


@pytest.mark.parametrize("start", range(6))
def test_packed_batches_resume_at_any_step(start):
    whole = packed_steps(1, 3)
    assert packed_steps(1, 3, start=start, seen=3 * start) == {s: v for s, v in whole.items() if s >= start}


def test_the_order_inside_a_packed_batch_changes():
    """Else the same pictures would be diffusion samples in every epoch."""
    orders = {}
    for keys in packed(1, 1, 0, end=40):
        orders.setdefault(len(keys), set()).add(tuple(k.sample for k in keys))
    assert all(len(orders[n]) > 1 for n in (2, 3, 4, 5))


def test_interleaving_spreads_every_batch_over_the_whole_step():
    parts = interleave([100, 50, 25])
    assert sorted(p for part in parts for p in part) == list(range(175))
    for part in parts:
        early = sum(p < 87.5 for p in part)
        assert abs(early - len(part) / 2) <= 1


def test_draws_belong_to_the_position_alone():
    whole = rng.training_draws(5, 7, range(6), (2, 3))
    part = rng.training_draws(5, 7, [4, 1], (2, 3))
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[[4, 1]], b)
    others = [rng.training_draws(s, t, range(6), (2, 3))[2] for s, t in ((5, 8), (6, 7))]
    assert all(not torch.equal(whole[2], o) for o in others)


def test_purposes_do_not_share_numbers():
    draws = [rng.normals(0, p, 0, [0], (8,)) for p in rng.PURPOSES]
    assert len({tuple(d.flatten().tolist()) for d in draws}) == len(draws)
    with pytest.raises(ValueError, match="-1"):
        rng.generator(-1, "train")


def test_noise_is_standard_normal():
    z = rng.training_draws(0, 0, range(256), (16, 16))[2]
    assert z.mean().abs() < 0.01 and (z.std() - 1).abs() < 0.01
    correlation = torch.corrcoef(z.flatten(1)) - torch.eye(256)
    assert correlation.abs().max() < 6 / 16
