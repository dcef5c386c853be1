"""The tool that tells what half precision costs an autoencoder."""

import re

import pytest
from helpers.commands import command
from helpers.companions import save_tiny_kl
from PIL import Image
from sklearn.datasets import load_sample_images

TOOL = "tools/autoencoder_precision.py"


def test_it_compares_round_trips_of_pictures(tmp_path):
    save_tiny_kl(tmp_path / "vae")
    (tmp_path / "pictures/flowers").mkdir(parents=True)
    for k, picture in enumerate(load_sample_images().images):
        Image.fromarray(picture[:80, :90]).save(tmp_path / f"pictures/flowers/{k}.png")
    printed = command(TOOL, tmp_path / "pictures", "--vae", tmp_path / "vae", "--size", 32).stdout
    assert printed.startswith("2 pictures of 32x32")
    rows = {name: float(value) for name, value in re.findall(r"^ *(\w+(?:, channels last)?) +(\d+\.\d) ", printed, re.M)}
    assert rows["float32"] == 166 > rows["float32, channels last"] > 90
    assert 20 < rows["bfloat16"] < 60 and rows["bfloat16, channels last"] == pytest.approx(rows["bfloat16"], abs=6)


def test_what_cannot_be_measured_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([tmp_path / "empty", "--vae", tmp_path], f"no .png or .jpg file in {tmp_path}/empty"),
        ([tmp_path / "absent", "--vae", tmp_path], f"{tmp_path}/absent: No such file or directory"),
    ):
        done = command(TOOL, *words, check=False)
        assert (done.returncode, done.stderr) == (2, f"error: {message}\n")
