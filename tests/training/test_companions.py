"""The frozen companions of a training run: their precision, and captions that are encoded once."""

import pytest
import torch
from accelerate import Accelerator
from helpers.captioned import save_captioned_images
from helpers.companions import save_tiny_dc, save_tiny_text_encoder
from helpers.paths import GOLDENS, ROOT

from tim.config import load_config
from tim.models.caption_cache import CaptionCache
from tim.models.network import build_network
from tim.training.setup import build_autoencoder, build_encoder
from tim.training.tasks import CaptionTask
from tim.typed_yaml import ConfigError

CPU = torch.device("cpu")


def digits(*overrides):
    return load_config(ROOT / "configs/c2i/digits.yaml", overrides)


def test_the_autoencoder_computes_as_the_config_says(tmp_path):
    """In float32 unless told otherwise; latents are float32 in any case."""
    save_tiny_dc(tmp_path, scaling_factor=0.5)
    own, images, latents = f"model.vae_dir={tmp_path}", torch.rand(2, 3, 16, 16) * 2 - 1, {}
    for dtype, last in (("float32", "false"), ("bfloat16", "true")):
        flags = [f"model.vae_dtype={dtype}", f"model.vae_channels_last={last}"] if dtype != "float32" else []
        vae = build_autoencoder(digits(own, *flags), Accelerator(cpu=True), sharded=False)
        assert {p.dtype for p in vae.model.parameters()} == {getattr(torch, dtype)}
        kernel = vae.model.encoder.conv_in.weight
        assert kernel.is_contiguous(memory_format=torch.channels_last) is (last == "true")
        latents[dtype] = vae.encode(images)
        assert latents[dtype].dtype == vae.decode(latents[dtype]).dtype == torch.float32
    error = (latents["bfloat16"] - latents["float32"]).norm() / latents["float32"].norm()
    assert 0 < error < 0.03


@pytest.mark.parametrize(
    "precision,own,expected",
    [
        ("no", "null", torch.float32),
        ("bf16", "null", torch.bfloat16),
        ("fp16", "null", torch.float16),
        ("bf16", "float32", torch.float32),
        ("no", "bfloat16", torch.bfloat16),
    ],
)
def test_the_repa_encoder_has_the_precision_of_the_run_unless_it_has_its_own(precision, own, expected):
    radio = f"model.enc_dir={GOLDENS}/radio_tiny/radio_tiny_half.pth.tar"
    config = digits(radio, "model.network.params.z_dim=192", f"training.mixed_precision={precision}", f"model.enc_dtype={own}")
    encoder = build_encoder(config, build_network(config.model.network), CPU)
    assert encoder.dtype == encoder.embedder.dtype == expected


@pytest.mark.parametrize("key,value", [("vae_dtype", "int8"), ("enc_dtype", "bf16"), ("vae_channels_last", "3")])
def test_impossible_precisions_are_refused(key, value):
    with pytest.raises(ConfigError, match=rf"model\.{key}"):
        digits(f"model.{key}={value}")


def test_few_captions_are_encoded_once_unless_told_otherwise(tmp_path):
    save_captioned_images(tmp_path / "data")
    save_tiny_text_encoder(tmp_path / "text")
    places = {"root_dir": "images", "jsonl_dir": "data_info.jsonl", "packed_json": "bucket_sampler.json"}
    data = [f"data.dataset.{key}={tmp_path}/data/{name}" for key, name in places.items()]

    def task(*overrides):
        own = ["model.vae_dir=null", f"model.text_encoder_dir={tmp_path}/text", "training.mixed_precision=no", *data]
        config = load_config(ROOT / "configs/t2i/tim_xl_p1_t2i.yaml", [*own, *overrides])
        return CaptionTask(config, None, CPU)

    cached, plain = task(), task("model.text_cache=null")
    assert isinstance(cached.encoder, CaptionCache) and not isinstance(plain.encoder, CaptionCache)
    calls = []
    cached.encoder.encoder.model.register_forward_pre_hook(lambda *_: calls.append(1))
    captions, kept = ["a flower", "a photo number 3", "a flower"], torch.zeros(3, dtype=torch.bool)

    def features(task, captions):
        return task.conditions(task.prepare({"caption": captions}, kept))[0]["y"]

    first, again = features(cached, captions), features(cached, captions[::-1])
    assert len(calls) == 2 and torch.equal(first, again.flip(0))
    torch.testing.assert_close(first, features(plain, captions), rtol=1e-4, atol=1e-5)
