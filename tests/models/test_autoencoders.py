"""Autoencoders: tiny random models of the real diffusers classes, saved and loaded as users do."""

import shutil

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, UNet2DModel
from helpers.companions import save_tiny_dc, save_tiny_kl

from tim.models.autoencoders import Autoencoder


def save_dc(folder, stages=3, last="ResBlock", scaling_factor=0.4):
    """A random AutoencoderDC of factor 2 ** (stages - 1); `last` is the kind of the innermost block."""
    widths, kinds = (8,) * (stages - 1) + (16,), ("ResBlock",) * (stages - 1) + (last,)
    scales = ((),) * (stages - 1) + ((5,) if last == "EfficientViTBlock" else (),)
    model = AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1,) * stages,
        decoder_layers_per_block=(1,) * stages,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        scaling_factor=scaling_factor,
    )
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture(params=["kl", "dc"])
def vae(request, tmp_path):
    """Either kind, loaded from its folder."""
    {"kl": save_tiny_kl, "dc": save_dc}[request.param](tmp_path)
    return Autoencoder.from_pretrained(str(tmp_path))


def batches_seen(module):
    """A list that collects the input shapes of a module's calls."""
    shapes = []
    module.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    return shapes


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


def test_kl_scales_a_posterior_sample_and_decodes_it_back(tmp_path):
    model = save_tiny_kl(tmp_path, scaling_factor=0.3, shift_factor=0.05)
    vae = Autoencoder.from_pretrained(str(tmp_path))
    assert (vae.is_kl, vae.factor, vae.channels, vae.scale, vae.shift) == (True, 8, 4, 0.3, 0.05)
    images, noise = torch.randn(2, 3, 32, 48).clamp(-1, 1), torch.randn(2, 4, 4, 6)
    posterior = model.encode(images).latent_dist
    z = posterior.mean + posterior.std * noise
    torch.testing.assert_close(vae.encode(images, noise), (z - 0.05) * 0.3, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode((z - 0.05) * 0.3), model.decode(z).sample, rtol=1e-4, atol=1e-4)


def test_dc_is_deterministic_and_takes_its_own_scale(tmp_path):
    model = save_dc(tmp_path / "vae")
    vae = Autoencoder.from_pretrained(str(tmp_path))  # a pipeline folder keeps it under vae/
    assert (vae.is_kl, vae.factor, vae.channels, vae.scale, vae.shift) == (False, 4, 8, 0.4, 0.0)
    images = torch.randn(2, 3, 16, 24)
    code = model.encode(images).latent
    torch.testing.assert_close(vae.encode(images), code * 0.4, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(code * 0.4), model.decode(code).sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stages,scale", [(6, 0.41407), (4, 1.25)])
def test_dc_with_attention_takes_factor_and_scale_from_its_config(tmp_path, stages, scale):
    model = save_dc(tmp_path, stages, "EfficientViTBlock", scale)
    vae = Autoencoder.from_pretrained(str(tmp_path))
    assert (vae.factor, vae.scale) == (2 ** (stages - 1), scale)
    images = torch.randn(1, 3, 2 * vae.factor, 3 * vae.factor)
    latents = vae.encode(images)
    assert latents.shape[1:] == vae.latent_shape(*images.shape[2:])
    torch.testing.assert_close(vae.decode(latents), model(images).sample, rtol=1e-4, atol=1e-4)


def test_slicing_takes_one_image_at_a_time(vae):
    images, noise = torch.randn(3, 3, 32, 48), torch.randn(3, *vae.latent_shape(32, 48))
    latents = vae.encode(images, noise)
    decoded = vae.decode(latents)
    encoder, decoder = batches_seen(vae.model.encoder), batches_seen(vae.model.decoder)
    vae.configure(slicing=True)
    torch.testing.assert_close(vae.encode(images, noise), latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(latents), decoded, rtol=1e-4, atol=1e-5)
    assert [shape[0] for shape in encoder] == [shape[0] for shape in decoder] == [1, 1, 1]


def test_tiling_bounds_the_tile_and_leaves_small_images_alone(vae):
    side = 8 * vae.factor
    small, large = torch.randn(1, *vae.latent_shape(side, side)), torch.randn(1, *vae.latent_shape(side + 8, 3 * side))
    small_images, large_images = torch.randn(1, 3, side, side), torch.randn(1, 3, side + 8, 3 * side)
    before = [vae.decode(small), vae.encode(small_images, small), vae.decode(large), vae.encode(large_images, large)]
    vae.set_tiling(side)
    encoder, decoder = batches_seen(vae.model.encoder), batches_seen(vae.model.decoder)
    assert torch.equal(vae.decode(small), before[0]) and torch.equal(vae.encode(small_images, small), before[1])
    assert len(encoder) == len(decoder) == 1
    decoded, latents = vae.decode(large), vae.encode(large_images, large)
    assert decoded.shape == large_images.shape and latents.shape == large.shape
    assert max(max(shape[2:]) for shape in encoder) == side and max(max(shape[2:]) for shape in decoder) == 8
    assert correlation(decoded, before[2]) > 0.8 and correlation(latents, before[3]) > 0.9


def test_tiles_of_a_local_decoder_differ_only_near_their_seams(tmp_path):
    """Without attention every pixel sees a neighbourhood: seams lie at 12 and 24 of 30 latent rows, blended over 4 before."""
    save_dc(tmp_path)
    vae = Autoencoder.from_pretrained(str(tmp_path))
    latents = torch.randn(1, *vae.latent_shape(120, 40))
    whole = vae.decode(latents)
    vae.set_tiling(64)
    error = (vae.decode(latents) - whole).abs().amax((0, 1, 3)).reshape(30, 4).amax(1)
    assert error[:8].max() < 1e-5 and error[19:21].max() < 1e-5
    assert error[10:18].max() > 1e-3, "the overlap is where tiles differ"


def test_a_tile_side_that_does_not_divide_names_the_nearest(vae):
    unit = 4 * vae.factor
    for above in (0, unit - 1, 5 * unit + 1):
        below = max(unit, above // unit * unit)
        with pytest.raises(ValueError, match=rf"above {above} pixels.* {below} and {below + unit}"):
            vae.set_tiling(above)


def test_channels_last_changes_the_layout_alone(vae):
    images, noise = torch.randn(2, 3, 32, 48), torch.randn(2, *vae.latent_shape(32, 48))
    latents, identity = vae.encode(images, noise), Autoencoder(vae.model).identity
    decoded, layouts = vae.decode(latents), []
    vae.configure(channels_last=True)
    hook = vae.model.decoder.conv_out.register_forward_hook(lambda _, inputs, output: layouts.append(output))
    torch.testing.assert_close(vae.encode(images, noise), latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(latents), decoded, rtol=1e-4, atol=1e-4)
    hook.remove()
    assert [output.is_contiguous(memory_format=torch.channels_last) for output in layouts] == [True]
    assert Autoencoder(vae.model).identity == identity, "folders may be continued in either layout"


def test_the_dtype_can_change(vae):
    images, noise = torch.randn(1, 3, 32, 48), torch.randn(1, *vae.latent_shape(32, 48))
    latents = vae.encode(images, noise)
    decoded = vae.decode(latents)
    assert vae.to(torch.bfloat16) is vae and vae.model.dtype == torch.bfloat16
    rounded = vae.decode(latents), vae.encode(images, noise)
    for value, exact in zip(rounded, (decoded, latents), strict=True):
        assert value.dtype == torch.float32 and not torch.equal(value, exact)
        assert (value - exact).norm() < 0.03 * exact.norm()
    assert vae.to(torch.float32).model.dtype == torch.float32
    assert (vae.decode(latents) - decoded).norm() < 0.03 * decoded.norm()


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("kind", ["kl", "dc"])
def test_a_compiled_decoder_agrees_at_every_size(tmp_path, kind):
    if kind == "kl":
        model = AutoencoderKL(
            block_out_channels=(4,), layers_per_block=1, norm_num_groups=2, latent_channels=4, use_post_quant_conv=False
        ).eval()
    else:
        model = save_dc(tmp_path, 2)
    vae = Autoencoder(model)
    sizes = [torch.randn(b, *vae.latent_shape(h, w)) for b, h, w in ((2, 8, 8), (2, 8, 12), (3, 16, 4))]
    eager = [vae.decode(latents) for latents in sizes]
    vae.configure(compiled=True)
    for latents, expected in zip(sizes, eager, strict=True):
        torch.testing.assert_close(vae.decode(latents), expected, rtol=1e-4, atol=1e-4)
    assert vae.model.decoder._compiled_call_impl is not None and not any("_orig_mod" in key for key in vae.model.state_dict())


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


def test_the_factor_is_read_without_the_weights(tmp_path):
    save_tiny_kl(tmp_path / "kl")
    save_tiny_dc(tmp_path / "dc")
    for name, factor in (("kl", 8), ("dc", 4)):
        (tmp_path / name / "diffusion_pytorch_model.safetensors").unlink()
        assert Autoencoder.factor_of(str(tmp_path / name)) == factor
    assert Autoencoder.factor_of(None) == 1
    with pytest.raises(ValueError, match="absent"):
        Autoencoder.factor_of(str(tmp_path / "absent"))
