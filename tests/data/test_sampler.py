"""Data order: a pure function of (seed, epoch, index), the same for every way of running."""

import pytest
import torch

from tim import rng
from tim.data.sampler import StepBatchSampler, epoch_order, sample_index


def steps(size, world, accumulation, batch, start=0, end=6, seen=0, seed=3):
    """step -> position -> dataset index, over all ranks."""
    out = {}
    for rank in range(world):
        for keys in StepBatchSampler(size, seed, batch, accumulation, world, rank, start, end, seen):
            assert len(keys) == batch and [k.position for k in keys] == sorted(k.position for k in keys)
            for key in keys:
                assert out.setdefault(key.step, {}).setdefault(key.position, key.index) == key.index
    return out


@pytest.mark.parametrize("world,accumulation,batch", [(1, 1, 24), (2, 1, 12), (3, 2, 4), (4, 3, 2), (8, 1, 3)])
def test_global_batches_do_not_depend_on_processes_or_accumulation(world, accumulation, batch):
    assert steps(37, world, accumulation, batch) == steps(37, 1, 1, 24)


def test_every_epoch_is_a_permutation_and_epochs_differ():
    orders = [epoch_order(0, e, 37).tolist() for e in range(3)]
    assert all(sorted(o) == list(range(37)) for o in orders)
    assert orders[0] != orders[1] != orders[2]
    visits = [sample_index(0, v, 37) for v in range(74)]
    assert visits == orders[0] + orders[1]
    assert epoch_order(1, 0, 37).tolist() != orders[0]


@pytest.mark.parametrize("start", range(6))
def test_resuming_at_any_step_continues_the_order(start):
    whole = steps(37, 2, 1, 12)
    rest = steps(37, 2, 1, 12, start=start, seen=24 * start)
    assert rest == {s: v for s, v in whole.items() if s >= start}


def test_combs_share_the_mix_of_the_batch():
    """Each micro-batch of each rank spans the whole global batch, so all see every kind of sample."""
    for rank in (0, 1):
        for keys in StepBatchSampler(100, 0, 8, 2, 2, rank, 0, 1, 0):
            assert keys[0].position < 4 and keys[-1].position >= 28


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
