"""Tiny text-to-image and class-conditional models as a training run leaves them, and pipelines of them."""

import pytest
import yaml
from diffusers import AutoencoderDC
from helpers.companions import save_tiny_dc, save_tiny_text_encoder
from helpers.networks import TINY, randomize
from helpers.paths import ROOT
from safetensors.torch import save_file
from transformers import AutoTokenizer, BertModel

from tim.models.c2i.tim_model import TiM as ClassTiM
from tim.models.t2i.tim_model import TiM as TextTiM
from tim.pipelines import (
    TiMClassPipeline,
    TiMClassTransformer2DModel,
    TiMPipeline,
    TiMTransformer2DModel,
    TransitionScheduler,
)

DIGITS = {**TINY, "in_channels": 1, "num_classes": 3}


def save_run(folder, kind, network, params, **model):
    """config.yaml and w.safetensors of a network, in the folder."""
    tree = yaml.safe_load((ROOT / "configs" / kind).read_text())
    tree["model"].update(model)
    tree["model"]["network"]["params"] = params
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    save_file(randomize(network(**params), scale=0.3).state_dict(), folder / "w.safetensors")
    return folder


@pytest.fixture(scope="session")
def text_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("text_run")
    save_tiny_text_encoder(root / "text")
    save_tiny_dc(root / "vae", scaling_factor=0.5)
    params = {**TINY, "input_size": 4, "patch_size": 1, "in_channels": 8, "cap_feat_dim": 20}
    companions = {"vae_dir": str(root / "vae"), "text_encoder_dir": str(root / "text")}
    return save_run(root, "t2i/tim_xl_p1_t2i.yaml", TextTiM, params, **companions)


@pytest.fixture(scope="session")
def class_run(tmp_path_factory):
    """Of pixels, without an autoencoder."""
    return save_run(tmp_path_factory.mktemp("class_run"), "c2i/tim_b_p4.yaml", ClassTiM, DIGITS, vae_dir=None)


@pytest.fixture
def text_pipe(text_run):
    network = TiMTransformer2DModel.from_single_file(text_run / "w.safetensors", text_run / "config.yaml")
    pipe = TiMPipeline(
        network,
        TransitionScheduler(),
        AutoencoderDC.from_pretrained(text_run / "vae"),
        BertModel.from_pretrained(text_run / "text"),
        AutoTokenizer.from_pretrained(text_run / "text"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def class_pipe(class_run):
    network = TiMClassTransformer2DModel.from_single_file(class_run / "w.safetensors", class_run / "config.yaml")
    pipe = TiMClassPipeline(network, TransitionScheduler(), id2label={0: "zero, nought", 1: "one"})
    pipe.set_progress_bar_config(disable=True)
    return pipe
