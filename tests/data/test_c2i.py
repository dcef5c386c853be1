"""Class-conditional datasets on real pictures: scikit-learn's photographs and digits."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images

from tim import rng
from tim.config import Data, Dataset
from tim.data.registry import build_c2i_dataset
from tim.data.replacement import ReplacingDataset
from tim.data.sampler import SampleKey
from tim.images import center_crop, make_grid, open_rgb, save_png, to_tensor, to_uint8


@pytest.fixture
def folders(tmp_path):
    """Two classes of photographs (427x640) as class folders, and latents of the same names."""
    for number, picture in enumerate(load_sample_images().images):
        for kind in ("images", "latents"):
            (tmp_path / kind / f"class{number}").mkdir(parents=True)
        for copy in range(2):
            name = f"photo{copy}"
            crop = picture[:, 40 * copy :]
            Image.fromarray(crop).save(tmp_path / "images" / f"class{number}" / f"{name}.{('png', 'jpg')[copy]}")
            latent = torch.stack([torch.full((4, 8, 8), 10.0 * number + copy), torch.full((4, 8, 8), -1.0)])
            save_file(
                {"latent": latent, "label": torch.tensor(number)},
                tmp_path / "latents" / f"class{number}" / f"{name}.safetensors",
            )
    return tmp_path


def data(kind, **kwargs):
    return Data(data_type=kind, dataset=Dataset(**kwargs))


def test_image_folders(folders):
    dataset = build_c2i_dataset(data("image", image_dir=str(folders / "images"), image_size=64))
    assert len(dataset) == 4 and dataset.num_labels == 2
    assert [dataset.load(i, rng.generator(0, "data"))["label"] for i in range(4)] == [0, 0, 1, 1]
    seen = {tuple(dataset.load(0, rng.generator(0, "data", s))["image"][:, 0, 0].tolist()) for s in range(20)}
    assert len(seen) == 2, "the picture and its mirror"
    image = dataset.load(0, rng.generator(0, "data"))["image"]
    assert image.shape == (3, 64, 64) and image.min() >= -1 and image.max() <= 1


def test_augmentation_is_a_function_of_step_and_position(folders):
    dataset = build_c2i_dataset(data("image", image_dir=str(folders / "images"), image_size=32))
    a, b = (ReplacingDataset(dataset, 0)[SampleKey(3, 5, 1, 8)] for _ in range(2))
    assert torch.equal(a["image"], b["image"]) and (a["step"], a["position"]) == (3, 5)


def test_latents_take_the_mirror_with_the_image(folders):
    latents, images = str(folders / "latents"), str(folders / "images")
    dataset = build_c2i_dataset(data("latent", latent_dir=latents, image_dir=images, image_size=32), with_image=True)
    plain = to_tensor(center_crop(open_rgb(folders / "images" / "class1" / "photo0.png"), 32))
    kinds = set()
    for step in range(20):
        sample = dataset.load(2, rng.generator(0, "data", step))
        mirrored = sample["latent"][0, 0, 0].item() == -1
        assert mirrored or sample["latent"][0, 0, 0].item() == 10
        assert torch.equal(sample["image"], plain.flip(-1) if mirrored else plain) and sample["label"] == 1
        kinds.add(mirrored)
    assert kinds == {True, False}
    without = build_c2i_dataset(data("latent", latent_dir=latents))
    assert "image" not in without.load(0, rng.generator(0, "data"))


@pytest.mark.parametrize("name,shape,count", [("digits", (1, 8, 8), 1797), ("mnist", (1, 28, 28), 5000)])
def test_package_datasets(name, shape, count):
    dataset = build_c2i_dataset(data("package", name=name))
    sample = dataset.load(0, rng.generator(0, "data"))
    assert len(dataset) == count and sample["image"].shape == shape and sample["label"] == 0
    stack = torch.stack([dataset.load(i, rng.generator(0, "data"))["image"] for i in range(50)])
    assert stack.min() == -1 and stack.max() == 1


def test_mistakes_are_named(folders):
    (folders / "images" / "class9").mkdir()
    cases = [
        (data("image", image_dir=str(folders / "absent"), image_size=8), "no dataset folder"),
        (data("image", image_dir=str(folders / "images"), image_size=8), "class9 is empty"),
        (data("image", image_dir=str(folders / "images" / "class0"), image_size=8), "no class folders"),
        (data("image", image_dir=str(folders / "images")), "image_size"),
        (data("package", name="cifar"), "'cifar'"),
        (data("image_ms"), "not class-conditional"),
    ]
    for config, match in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            build_c2i_dataset(config)
    (folders / "images" / "class0" / "photo1.jpg").unlink()
    config = data("latent", latent_dir=str(folders / "latents"), image_dir=str(folders / "images"), image_size=8)
    with pytest.raises(FileNotFoundError, match=r"photo1\.safetensors has no image"):
        build_c2i_dataset(config, with_image=True)
    broken = folders / "latents" / "class0" / "photo0.safetensors"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"photo0\.safetensors is not a latent file"):
        build_c2i_dataset(data("latent", latent_dir=str(folders / "latents"))).load(0, rng.generator(0, "data"))


def test_center_crop_keeps_the_middle():
    for size in ((40, 100), (100, 40), (37, 53), (8, 9), (300, 300)):
        cropped = center_crop(Image.new("RGB", size, "red"), 16)
        assert cropped.size == (16, 16)
    picture = np.zeros((64, 192, 3), np.uint8)
    picture[:, 64:128] = 255
    assert np.asarray(center_crop(Image.fromarray(picture), 64)).min() == 255


def test_pixels_round_trip_and_clamp(tmp_path):
    values = torch.arange(256, dtype=torch.float32)
    x = (values / 127.5 - 1).expand(1, 3, 4, -1)
    assert torch.equal(torch.from_numpy(to_uint8(x))[0, 0, :, 0].float(), values)
    assert to_uint8(torch.tensor([-3.0, 3.0]).reshape(1, 1, 1, 2)).tolist() == [[[[0, 0, 0], [255, 255, 255]]]]
    save_png(tmp_path / "a.png", to_uint8(x)[0])
    assert torch.equal(to_tensor(open_rgb(tmp_path / "a.png")), x[0])
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert make_grid(to_uint8(x.expand(5, -1, -1, -1)), columns=3, scale=2, pad=1).shape == (2 * 9 + 1, 3 * 513 + 1, 3)


def test_an_unreadable_image_is_named(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"bad\.png cannot be read"):
        open_rgb(tmp_path / "bad.png")
