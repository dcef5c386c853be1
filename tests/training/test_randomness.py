"""What chance decides in training belongs to (seed, step, place in the global batch), whoever computes it."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.captioned import save_captioned_images
from helpers.companions import save_tiny_kl
from torch.utils.data import DataLoader

from tim import rng
from tim.data.replacement import ReplacingDataset
from tim.data.sampler import BucketBatchSampler, StepBatchSampler
from tim.data.t2i import CaptionedImages
from tim.models.autoencoders import Autoencoder
from tim.schedulers.transition import TransitionSchedule
from tim.schedulers.transports import OT_FM
from tim.training.loop import add_draws, latents

WORLDS = [1, 2, 3, 4, 8]
SPLITS = [(1, 1), (1, 4), (2, 2), (4, 1), (2, 12), (3, 8), (8, 3)]
PACKED = [list(range(a, a + n)) for a, n in ((0, 3), (3, 5), (8, 2), (10, 4), (14, 7), (21, 1))]
STEPS = 3


def micro_batches(kind, world, accumulation, start=0):
    """Keys of all micro-batches of all ranks: a global batch of 24 samples or of 24 packed batches."""
    for rank in range(world):
        place = dict(seed=3, accumulation=accumulation, world_size=world, rank=rank, start_step=start, max_steps=STEPS)
        if kind == "c2i":
            yield from StepBatchSampler(37, 24 // world // accumulation, samples_seen=24 * start, **place)
        else:
            yield from BucketBatchSampler(PACKED, samples_seen=world * accumulation * start, **place)


@pytest.mark.parametrize("shares", [(0.5, 0.1), (0.3, 0.25), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("kind,world,accumulation", [("c2i", *s) for s in SPLITS if 24 % (s[0] * s[1]) == 0] + [
    ("t2i", w, 24 // w) for w in WORLDS
])  # fmt: skip
def test_shares_are_exact_over_the_global_batch_and_draws_do_not_depend_on_the_split(kind, world, accumulation, shares):
    """Diffusion: r = t; consistency: r = T_min. Draws, counted over ranks and micro-batches, are those of one process."""
    schedule = TransitionSchedule(OT_FM(P_mean=-0.4), *shares)

    def drawn(world, accumulation):
        out = {}
        for keys in micro_batches(kind, world, accumulation):
            step, positions, total = keys[0].step, [k.position for k in keys], keys[0].total
            normal, drop, noise = rng.training_draws(3, step, positions, (2, 2))
            t, r, n = schedule.sample_t_and_r(
                len(keys), normal=normal, position=torch.tensor(positions), global_batch_size=total
            )
            assert torch.equal(t[:n], r[:n]) and (r[n:] < t[n:]).all()
            for k, values in enumerate(zip(t.tolist(), r.tolist(), drop.tolist(), noise.flatten(1).tolist(), strict=True)):
                assert (step, positions[k]) not in out, "no place is computed twice"
                out[step, positions[k]] = (total, *values)
        return out

    got = drawn(world, accumulation)
    for step in range(STEPS):
        members = [v for (s, _), v in got.items() if s == step]
        total = members[0][0]
        assert len(members) == total
        assert sum(t == r for _, t, r, *_ in members) == round(shares[0] * total)
        assert sum(r == 0 for _, _, r, *_ in members) == round(shares[1] * total)
        assert len({z[0] for *_, z in members}) == total, "every sample has noise of its own"
    assert got == (drawn(1, 1) if kind == "c2i" else drawn(1, 24))


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    root = tmp_path_factory.mktemp("captioned")
    save_captioned_images(root)
    return CaptionedImages(str(root / "images"), str(root / "data_info.jsonl"), str(root / "bucket_sampler.json"), 4)


def visits(dataset, sampler_of, world, accumulation, workers=0, start=0):
    """(step, position) -> caption and a hash of the pixels, of all ranks."""
    out = {}
    for rank in range(world):
        place = dict(seed=3, accumulation=accumulation, world_size=world, rank=rank, start_step=start, max_steps=6)
        loader = DataLoader(ReplacingDataset(dataset, 3), batch_sampler=sampler_of(start, **place), num_workers=workers)
        for batch in loader:
            for k, position in enumerate(batch["position"].tolist()):
                pixels = hashlib.sha256(batch["image"][k].numpy().tobytes()).hexdigest()
                out[int(batch["step"][k]), position] = (batch.get("caption", [""] * 99)[k], pixels)
    return out


def test_captions_do_not_depend_on_ranks_workers_or_resume(captioned):
    def sampler(start, **place):
        return BucketBatchSampler(captioned.batches, samples_seen=4 * start, **place)

    want = visits(captioned, sampler, 1, 4)
    assert len({caption for caption, _ in want.values()}) > 10
    for arguments in ((2, 2), (4, 1), (1, 4, 2)):
        assert visits(captioned, sampler, *arguments) == want, arguments
    assert visits(captioned, sampler, 2, 2, start=2) == {k: v for k, v in want.items() if k[0] >= 2}


class Pictures:
    """Twelve pictures of noise; a mirrored one is its own flip."""

    def __len__(self):
        return 12

    def load(self, index, g):
        image = torch.from_numpy(np.random.default_rng(index).random((3, 8, 8), dtype=np.float32))
        return {"image": image.flip(-1) if g.random() < 0.5 else image}

    def peers(self, index):
        return np.arange(12)


def test_mirrors_and_posterior_noise_do_not_depend_on_the_split(tmp_path):
    save_tiny_kl(tmp_path)
    vae = Autoencoder.from_pretrained(str(tmp_path))
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    task = SimpleNamespace(drop_prob=0.1, prepare=lambda batch, dropped: batch)
    run = SimpleNamespace(vae=vae, seed=3, accelerator=accelerator, task=task, dtype=torch.float32, network=None)

    def encoded(world, accumulation):
        out, hashes = {}, {}
        for rank in range(world):
            place = dict(
                seed=3, accumulation=accumulation, world_size=world, rank=rank, start_step=0, max_steps=6, samples_seen=0
            )
            sampler = StepBatchSampler(12, 8 // world // accumulation, **place)
            for batch in DataLoader(ReplacingDataset(Pictures(), 3), batch_sampler=sampler):
                for k, latent in enumerate(latents(run, add_draws(run, batch))):
                    key = int(batch["step"][k]), int(batch["position"][k])
                    out[key], hashes[key] = latent, batch["image"][k].numpy().tobytes()
        return out, hashes

    want, pictures = encoded(1, 1)
    assert len(set(pictures.values())) > 12, "some pictures appear as themselves and mirrored"
    assert len(want) == 48 and len({float(latent[0, 0, 0]) for latent in want.values()}) == 48
    for world, accumulation in ((1, 4), (2, 2), (8, 1)):
        got, same = encoded(world, accumulation)
        assert same == pictures
        for key, latent in want.items():
            torch.testing.assert_close(got[key], latent, rtol=1e-4, atol=1e-5)  # convolutions of another batch size
