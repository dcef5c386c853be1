"""RADIO: golden features and safe loading."""

import pickle

import pytest
import torch
from helpers.networks import relative_error
from helpers.paths import GOLDENS
from safetensors.torch import load_file

from tim.models.radio import Radio

CHECKPOINT = GOLDENS / "radio_tiny" / "radio_tiny_half.pth.tar"


@pytest.mark.parametrize("i", [0, 1])
def test_goldens(i):
    d = load_file(GOLDENS / "radio_tiny" / "tensors.safetensors")
    assert relative_error(Radio.from_checkpoint(CHECKPOINT)(d[f"{i}.image"]), d[f"{i}.features"]) < 1e-4


@pytest.mark.parametrize("dtype,closest", [(torch.bfloat16, 1e-5), (torch.float16, 1e-6)])
def test_half_precision_is_autocast_with_matrices_rounded_once(dtype, closest):
    """Cosines of the golden tokens are above 0.99999; float32 stays float32 whatever the caller's autocast says."""
    d = load_file(GOLDENS / "radio_tiny" / "tensors.safetensors")
    exact, half, cast = (Radio.from_checkpoint(CHECKPOINT).compute_in(p) for p in (None, dtype, None))
    cast.dtype = dtype  # its matrices stay float32, so that autocast rounds them
    for i in (0, 1):
        image, features = d[f"{i}.image"], half(d[f"{i}.image"])
        assert features.dtype == torch.float32 and torch.equal(features, cast(image))
        cosine = torch.nn.functional.cosine_similarity(features, d[f"{i}.features"], dim=-1)
        assert cosine.min() > 1 - closest and not torch.equal(features, exact(image))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(exact(image), Radio.from_checkpoint(CHECKPOINT)(image)) and torch.equal(half(image), features)
        assert torch.equal(exact(image), Radio.from_checkpoint(CHECKPOINT)(image))
    assert {m.weight.dtype for m in half.modules() if isinstance(m, torch.nn.Linear)} == {half.embedder.dtype} == {dtype}


class Bomb:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_bad_files_are_refused(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="enc_dir"):
        Radio.from_checkpoint(tmp_path / "absent")
    path = tmp_path / "radio.pth"
    torch.save({"state_dict": {}, "args": Bomb()}, path)
    with pytest.raises(ValueError, match="not a RADIO checkpoint"):
        Radio.from_checkpoint(path)
    path.write_bytes(pickle.dumps(3))
    with pytest.raises(ValueError, match="not a RADIO checkpoint"):
        Radio.from_checkpoint(path)
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "change,match",
    [
        ({"model": "hf-hub:somebody/vit"}, "is no vision transformer"),
        ({"model": "resnet18"}, "is no vision transformer"),
        ({"model_kwargs": {"checkpoint_path": "other.pth"}}, r"checkpoint_path.* is no vision transformer"),
        ({"model_kwargs": {"num_heads": [3]}}, r"num_heads.* is no vision transformer"),
        ({"model_kwargs": {"num_heads": 5}}, ""),
        ({"model_kwargs": 3}, ""),
        ({"model": None}, ""),
    ],
)
def test_arguments_open_nothing_else(tmp_path, change, match):
    checkpoint = torch.load(CHECKPOINT, weights_only=False)
    vars(checkpoint["args"]).update(change)
    torch.save(checkpoint, tmp_path / "radio.pth")
    with pytest.raises(ValueError, match=rf"radio\.pth is not a RADIO checkpoint: .*{match}"):
        Radio.from_checkpoint(tmp_path / "radio.pth")


def test_claimed_sizes_are_those_of_the_tensors(tmp_path):
    """A name of billions of parameters builds no more than the file holds."""
    checkpoint = torch.load(CHECKPOINT, weights_only=False)
    vars(checkpoint["args"]).update(
        model="vit_base_patch16_224", model_kwargs={"depth": 10**6, "embed_dim": 10**5, "num_heads": 3}
    )
    torch.save(checkpoint, tmp_path / "radio.pth")
    assert len(Radio.from_checkpoint(tmp_path / "radio.pth").blocks) == 2


def test_odd_sizes_are_refused():
    with pytest.raises(ValueError, match="multiples of 16"):
        Radio.from_checkpoint(CHECKPOINT)(torch.zeros(1, 3, 30, 32))


@pytest.mark.parametrize("antialias", [False, True])
def test_the_image_is_resized_to_a_patch_for_each_token(antialias):
    """As the published code does by default, without antialiasing, which shows where the image is larger."""
    radio, images = Radio.from_checkpoint(CHECKPOINT), torch.rand(2, 3, 96, 128) * 2 - 1
    resized = torch.nn.functional.interpolate((images + 1) / 2, (48, 64), mode="bicubic", antialias=antialias)
    features = radio.tokens(images, (3, 4), antialias)
    assert features.shape == (2, 12, 192) and torch.equal(features, radio(resized.clamp(0, 1)))
    assert torch.equal(features, radio.tokens(images, (3, 4))) is not antialias
