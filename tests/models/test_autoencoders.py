"""Autoencoders: tiny random models of the real diffusers classes, saved and loaded as users do."""

import pytest
import torch
from conftest import save_tiny_kl
from diffusers import AutoencoderDC, UNet2DModel

from tim.models.autoencoders import Autoencoder


def save_dc(folder, scaling_factor=0.4):
    model = AutoencoderDC(
        latent_channels=8,
        encoder_block_out_channels=(8, 16, 16),
        decoder_block_out_channels=(8, 16, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=scaling_factor,
    )
    model.save_pretrained(folder)
    return model.eval()


def test_kl_scales_a_posterior_sample_and_decodes_it_back(tmp_path):
    model = save_tiny_kl(tmp_path, scaling_factor=0.3, shift_factor=0.05)
    vae = Autoencoder.from_pretrained(str(tmp_path))
    assert (vae.is_kl, vae.factor, vae.channels, vae.scale, vae.shift) == (True, 8, 4, 0.3, 0.05)
    images, noise = torch.randn(2, 3, 32, 48).clamp(-1, 1), torch.randn(2, 4, 4, 6)
    posterior = model.encode(images).latent_dist
    z = posterior.mean + posterior.std * noise
    torch.testing.assert_close(vae.encode(images, noise), (z - 0.05) * 0.3, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode((z - 0.05) * 0.3), model.decode(z).sample, rtol=1e-4, atol=1e-4)
    vae.set_slicing()
    torch.testing.assert_close(vae.decode((z - 0.05) * 0.3), model.decode(z).sample, rtol=1e-4, atol=1e-4)


def test_dc_is_deterministic_and_takes_its_own_scale(tmp_path):
    model = save_dc(tmp_path / "vae")
    vae = Autoencoder.from_pretrained(str(tmp_path))  # a pipeline folder keeps it under vae/
    assert (vae.is_kl, vae.factor, vae.channels, vae.scale, vae.shift) == (False, 4, 8, 0.4, 0.0)
    images = torch.randn(2, 3, 16, 24)
    code = model.encode(images).latent
    torch.testing.assert_close(vae.encode(images), code * 0.4, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(code * 0.4), model.decode(code).sample, rtol=1e-4, atol=1e-4)


def test_sizes_that_do_not_divide_name_the_nearest(tmp_path):
    save_dc(tmp_path)
    vae = Autoencoder.from_pretrained(str(tmp_path))
    assert vae.latent_shape(16, 24) == (8, 4, 6)
    with pytest.raises(ValueError, match=r"width=18 .* 16 and 20"):
        vae.latent_shape(16, 18)


def test_what_is_no_autoencoder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no autoencoder folder"):
        Autoencoder.from_pretrained(str(tmp_path / "absent"))
    UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    ).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(ValueError, match="UNet2DModel"):
        Autoencoder.from_pretrained(str(tmp_path))
