"""Runs as pipelines in memory: the pixels of the sampling commands' sampler."""

import numpy as np
import pytest
import torch
from helpers.companions import save_tiny_dc, save_tiny_text_encoder
from helpers.networks import TINY
from helpers.runs import save_tiny_run

from tim import rng
from tim.checkpoint.weights import find_weights
from tim.config import load_config
from tim.generation.sampler import load_sampler
from tim.generation.settings import SampleSettings
from tim.models.c2i.tim_model import TiM as ClassTiM
from tim.models.t2i.tim_model import TiM as TextTiM
from tim.pipelines import TiMClassPipeline, TiMPipeline, pipeline_of_run


def same_pixels(run, prompts):
    config, weights = load_config(run / "config.yaml"), find_weights(run)
    sampler = load_sampler(config, weights, SampleSettings(num_steps=3, cfg_scale=2.0), torch.device("cpu"))
    noise = [rng.generator(0, "sample", 0, k).standard_normal(sampler.latent_shape, dtype=np.float32) for k in range(2)]
    pipe = pipeline_of_run(run)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(prompts, latents=torch.from_numpy(np.stack(noise)), num_inference_steps=3, guidance_scale=2.0).images
    assert np.array_equal(np.stack([np.asarray(image) for image in images]), sampler.draw(prompts)[0])
    return pipe


def test_a_run_of_classes(tmp_path):
    run = save_tiny_run(tmp_path, "c2i/digits.yaml", ClassTiM, {**TINY, "in_channels": 1, "num_classes": 3})
    assert type(same_pixels(run, [0, 2])) is TiMClassPipeline


def test_a_run_of_captions(tmp_path):
    save_tiny_text_encoder(tmp_path / "text")
    save_tiny_dc(tmp_path / "vae", scaling_factor=0.5)
    params = {**TINY, "input_size": 4, "patch_size": 1, "in_channels": 8, "cap_feat_dim": 20}
    parts = {
        "vae_dir": str(tmp_path / "vae"),
        "text_encoder_dir": str(tmp_path / "text"),
        "text_padding": "batch",
        "text_cache": None,
    }
    run = save_tiny_run(tmp_path / "run", "t2i/shapes.yaml", TextTiM, params, **parts)
    assert type(same_pixels(run, ["a red circle", "two dogs under a blue sky"])) is TiMPipeline


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.yaml"):
        pipeline_of_run(tmp_path)
