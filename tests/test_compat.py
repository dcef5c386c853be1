"""The import paths of the published code."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.companions import save_tiny_dc, save_tiny_kl, save_tiny_text_encoder
from PIL import Image
from safetensors.torch import save_file

from tim.compat import OLD
from tim.models.c2i import tim_model as c2i
from tim.models.t2i import tim_model as t2i


@pytest.mark.parametrize("module,name", [(module, name) for module, names in OLD.items() for name in names or ()])
def test_old_names_say_where_they_live_now(module, name):
    with pytest.warns(DeprecationWarning, match=rf"{module}\.{name} is now (tim\.|--npz)"):
        exec(f"from {module} import {name}\nassert callable({name})", {})


def test_importing_the_package_imports_nothing_else():
    code = "import sys, tim; assert not {'torch', 'numpy', 'tim.compat.functions'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(ImportError, match="cannot import name 'absent'"):
        exec("from tim.utils.misc_utils import absent", {})
    with pytest.raises(ModuleNotFoundError):
        exec("import tim.utils.absent", {})


@pytest.mark.filterwarnings("ignore:.* is now:DeprecationWarning")
def test_misc_utils(tmp_path, tiny_c2i):
    from tim.utils.misc_utils import (
        create_npz_from_sample_folder,
        get_obj_from_str,
        init_from_ckpt,
        instantiate_from_config,
        update_ema,
    )

    transport = instantiate_from_config({"target": "tim.schedulers.transports.OT_FM", "params": {"P_mean": -0.4}})
    assert transport.P_mean == -0.4 and isinstance(transport, get_obj_from_str("tim.schedulers.transports.Transport"))
    zero = torch.nn.Linear(2, 2).requires_grad_(False)
    want = {k: v.clone() for k, v in zero.state_dict().items()}
    save_file({f"module.{k}": v + 1 for k, v in want.items()}, tmp_path / "w.safetensors")
    init_from_ckpt(zero, str(tmp_path / "w.safetensors"), ignore_keys=["bias"])
    assert torch.equal(zero.weight, want["weight"] + 1) and torch.equal(zero.bias, want["bias"])
    with pytest.raises(ValueError, match=r"w\.safetensors does not fit the model: .*weight"):
        init_from_ckpt(tiny_c2i, str(tmp_path / "w.safetensors"))
    update_ema(zero, torch.nn.Linear(2, 2), decay=1.0)
    assert torch.equal(zero.bias, want["bias"])

    (tmp_path / "images").mkdir()
    for k in range(3):
        Image.fromarray(np.full((4, 4, 3), k, np.uint8)).save(tmp_path / "images" / f"{k:06d}.png")
    assert np.load(create_npz_from_sample_folder(str(tmp_path / "images"), 2))["arr_0"][:, 0, 0, 0].tolist() == [0, 1]
    with pytest.raises(ValueError, match="holds 3 images, not 4"):
        create_npz_from_sample_folder(str(tmp_path / "images"), 4)


@pytest.mark.filterwarnings("ignore:.* is now:DeprecationWarning")
def test_companions(tmp_path):
    from tim.models.utils.text_encoders import encode_prompt, load_text_encoder
    from tim.models.vae import dc_ae_decode, dc_ae_encode, get_dc_ae, get_sd_vae, sd_vae_decode, sd_vae_encode

    save_tiny_kl(tmp_path / "kl")
    save_tiny_dc(tmp_path / "dc")
    save_tiny_text_encoder(tmp_path / "text")
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    for folder, load, encode, decode in (
        ("kl", get_sd_vae, sd_vae_encode, sd_vae_decode),
        ("dc", get_dc_ae, dc_ae_encode, dc_ae_decode),
    ):
        vae = load(str(tmp_path / folder))
        assert decode(vae, encode(vae, images)).shape == images.shape
    y, mask = encode_prompt(load_text_encoder(str(tmp_path / "text")), ["a red circle", ""])
    assert y.shape[::2] == (2, 20) and mask.shape == y.shape[:2]


def test_names_of_the_network_modules_and_of_networks(tiny_c2i):
    for module, own in ((c2i, "LabelEmbedder"), (t2i, "CaptionEmbedder")):
        for name in (own, "TimestepEmbedder", "Attention", "FinalLayer"):
            assert issubclass(getattr(module, name), torch.nn.Module)
    assert isinstance(tiny_c2i.blocks[0].attn, c2i.Attention) and issubclass(t2i.CrossAttention, torch.nn.Module)
    assert (tiny_c2i.dtype, tiny_c2i.num_heads, tiny_c2i.out_channels) == (torch.float32, 3, 4)
    x = torch.randn(2, 4, 4, 6)
    patches = torch.nn.functional.unfold(x, 2, stride=2).unflatten(1, (4, 2, 2)).permute(0, 4, 2, 3, 1).flatten(2)
    assert torch.equal(tiny_c2i.unpatchify(patches, 2, 3), x)
    assert tiny_c2i.unpatchify(torch.zeros(1, 16, 16)).shape == (1, 4, 8, 8)
