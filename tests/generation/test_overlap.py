"""Sampling that overlaps: a batch is drawn while the last one is written, and no file tells how many threads there were."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from diffusers import AutoencoderKL
from helpers.networks import TINY, randomize
from helpers.paths import ROOT
from PIL import Image
from safetensors.torch import save_file

from tim.checkpoint.weights import find_weights
from tim.config import load_config
from tim.files import run_record
from tim.generation import engine, prompt_sets
from tim.generation import sampler as sampling
from tim.generation.conditions import ClassConditions
from tim.generation.prompt_sets import ClassLabels
from tim.generation.sampler import Sampler, load_sampler
from tim.generation.settings import SampleSettings
from tim.models.autoencoders import Autoencoder
from tim.models.c2i.tim_model import TiM
from tim.schedulers.transports import EDM, OT_FM
from tim.training.compilation import compile_network

CONFIG = ROOT / "configs/c2i/digits.yaml"
IMAGES, BATCH = 11, 4
LONG = 60  # seconds, which only a failing test waits


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_file(randomize(load_config(CONFIG).model.network.build(), scale=0.2).state_dict(), path)
    return find_weights(path)


@pytest.fixture(scope="module")
def sampler(weights):
    settings = SampleSettings(num_fid_samples=IMAGES, per_proc_batch_size=BATCH, num_steps=2)
    return load_sampler(load_config(CONFIG), weights, settings, torch.device("cpu"))


@pytest.fixture
def draw(weights, sampler, tmp_path):
    """Draws eleven images, three batches, into a folder and returns it."""

    def run(name: str, **settings) -> Path:
        folder = tmp_path / name
        labels = ClassLabels("cycle", None, 10, 0, IMAGES)
        engine.run_sampling(sampler.at(replace(sampler.settings, **settings)), labels, folder, weights, PartialState())
        return folder

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_the_next_batch_is_drawn_before_the_last_one_is_written(draw, monkeypatch):
    begun, batches = [threading.Event() for _ in range(4)], iter(range(3))
    latents, write = Sampler.latents, ClassLabels.write

    def drawing(self, *args):
        begun[next(batches)].set()
        return latents(self, *args)

    def writing(self, folder, group, *args):
        if group // BATCH < 2:
            assert begun[group // BATCH + 1].wait(LONG), "the network waited for files"
        write(self, folder, group, *args)

    monkeypatch.setattr(Sampler, "latents", drawing)
    monkeypatch.setattr(ClassLabels, "write", writing)
    folder = draw("run")
    assert len(contents(folder)) == IMAGES and json.loads(run_record(folder).read_text())["complete"]


def test_no_file_tells_how_many_threads_wrote(draw, monkeypatch):
    monkeypatch.setattr(engine.os, "cpu_count", lambda: 8)
    many = draw("many", save_latent=True)
    monkeypatch.setattr(engine, "MAX_WRITERS", 1)
    one = draw("one", save_latent=True)
    assert contents(many) == contents(one)
    assert contents(Path(f"{many}.latents")) == contents(Path(f"{one}.latents"))
    assert Path(f"{many}.png").read_bytes() == Path(f"{one}.png").read_bytes()


def test_the_level_of_compression_is_that_of_the_files_alone(draw, tmp_path):
    fast, small = draw("fast"), draw("small", png_level=6)
    for path in small.iterdir():
        pixels = np.asarray(Image.open(path))
        Image.fromarray(pixels).save(tmp_path / "default.png")
        assert path.read_bytes() == (tmp_path / "default.png").read_bytes() != (fast / path.name).read_bytes()
        assert (np.asarray(Image.open(fast / path.name)) == pixels).all()
    (small / "000003.png").unlink()
    draw("small", png_level=1)
    assert (small / "000003.png").read_bytes() == (fast / "000003.png").read_bytes()
    with pytest.raises(ValueError, match="--png-level must be <= 9, got 10"):
        draw("bad", png_level=10)


def test_a_full_disk_ends_the_run_with_one_error_and_loses_no_other_image(draw, monkeypatch):
    save = prompt_sets.save_image

    def failing(path, *args):
        if path.stem in ("000001", "000002"):
            raise OSError(28, "No space left on device", str(path))
        save(path, *args)

    whole = draw("whole")
    monkeypatch.setattr(prompt_sets, "save_image", failing)
    with pytest.raises(OSError, match=r"No space left on device.*000001\.png"):
        draw("full")
    folder = whole.with_name("full")
    assert not json.loads(run_record(folder).read_text())["complete"] and not list(folder.parent.rglob("*.part"))
    kept = contents(folder)
    assert kept.keys() == {f"{k:06d}.png" for k in range(2 * BATCH)} - {"000001.png", "000002.png"}, "no third batch was drawn"
    monkeypatch.setattr(prompt_sets, "save_image", save)
    assert contents(draw("full")) == contents(whole) and json.loads(run_record(folder).read_text())["complete"]


def test_a_batch_is_launched_without_waiting_for_the_device():
    """On the meta device tensors have no values: reading one, which is what makes the next launch wait, is an error."""
    device = torch.device("meta")
    with device:
        network, vae = TiM(num_classes=10, class_dropout_prob=0.1, **TINY).eval(), AutoencoderKL(latent_channels=4)
    conditions = ClassConditions(10, True, device)
    settings = SampleSettings(num_steps=3, cfg_scale=2.0, stochasticity_ratio=0.2)
    sampler = Sampler(settings, OT_FM(), network, Autoencoder(vae), conditions, device).at(settings)
    images, finite = sampler.decode(sampler.latents(range(2), None, *conditions([1, 2], guided=True)))
    assert images.shape == (2, 8, 8, 3) and images.dtype == torch.uint8 and finite.dtype == torch.bool


def test_an_impossible_grid_is_refused_before_anything_is_drawn(sampler):
    with pytest.warns(UserWarning, match="go beyond"), pytest.raises(ValueError, match="EDM ends at T_min > 0"):
        replace(sampler, transport=EDM()).at(replace(sampler.settings, T_max=None, T_min=0.0))


def test_a_compiled_network_draws_the_same_images(weights, sampler, monkeypatch):
    monkeypatch.setattr(sampling, "compile_network", lambda network: compile_network(network, backend="eager"))
    settings = replace(sampler.settings, num_steps=4, cfg_scale=2.0)
    compiled = load_sampler(load_config(CONFIG), weights, replace(settings, compile=True), torch.device("cpu"))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    images, latents = compiled.draw(range(3))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1, "all steps share it"
    want, exact = sampler.at(settings).draw(range(3))
    torch.testing.assert_close(latents, exact, rtol=1e-4, atol=1e-5)
    assert np.abs(images.astype(int) - want).max() <= 1
