"""Folders of samples: whose they are, what completes them, what is made again, what is not written."""

import json
import os

import numpy as np
import pytest
import torch
import yaml
from helpers.commands import command
from helpers.companions import save_tiny_kl
from helpers.networks import randomize
from helpers.paths import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

from tim.checkpoint.weights import find_weights
from tim.config import load_config
from tim.files import lock, run_record
from tim.generation.prompt_sets import DPGPrompts, GenEvalPrompts, MJHQPrompts, PromptFiles
from tim.generation.sampler import load_sampler
from tim.generation.settings import SampleSettings
from tim.images import to_uint8
from tim.models.autoencoders import Autoencoder

CONFIG = ROOT / "configs/c2i/digits.yaml"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_file(randomize(load_config(CONFIG).model.network.build(), scale=0.2).state_dict(), path)
    return path


@pytest.fixture
def draw(weights, tmp_path):
    """Draws six images into the folder `run` under tmp_path."""

    def run(*flags, ckpt=weights, config=CONFIG, check=True):
        return command(
            "projects/sample/sample_c2i_ddp.py", "--config", config, "--ckpt", ckpt, "--sample-dir", tmp_path, "--name", "run",
            "--num-fid-samples", 6, "--per-proc-batch-size", 4, "--num-steps", 2, *flags, check=check,
        )  # fmt: skip

    return run


def contents(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def record(folder) -> dict:
    return json.loads(run_record(folder).read_text())


def edited(path, **params):
    """The digits' configuration with other keywords of the network and the transport."""
    tree = yaml.safe_load(CONFIG.read_text())
    for part, changes in params.items():
        tree["model"][part]["params"] |= changes
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_folder_belongs_to_network_and_transport(draw, tmp_path):
    draw()
    for changes, words in (
        ({"network": {"rope_grid": "legacy"}}, "network.rope_grid: 'row_major' there, 'legacy' now"),
        ({"transport": {"sigma_d": 0.5}}, "transport.sigma_d: 1.0 there, 0.5 now"),
    ):
        done = draw(config=edited(tmp_path / "c.yaml", **changes), check=False)
        assert done.returncode == 2 and words in done.stderr and "choose another --sample-dir or --name" in done.stderr
    stated = edited(tmp_path / "c.yaml", network={"mlp_ratio": 4.0}, transport={"T_max": 1.0})
    assert "0 drawn now" in draw("--dtype", "float32", config=stated).stdout, "saying a default changes nothing"


def test_images_without_their_record_are_not_adopted(draw, tmp_path):
    """Such as of a folder that was moved without what lies beside it."""
    draw()
    run_record(tmp_path / "run").unlink()
    done = draw(check=False)
    assert done.returncode == 2 and "run holds images of an unknown run (no run.run.json); choose another" in done.stderr


def test_an_autoencoder_is_told_by_what_it_computes(tmp_path):
    for name, seed in (("a", 0), ("same", 0), ("other", 1)):
        torch.manual_seed(seed)
        save_tiny_kl(tmp_path / name, scaling_factor=0.2)
    torch.manual_seed(0)
    save_tiny_kl(tmp_path / "scaled", scaling_factor=0.3)
    found = {name: Autoencoder.from_pretrained(str(tmp_path / name)).identity for name in ("a", "same", "other", "scaled")}
    assert found["a"] == found["same"] and len(set(found.values())) == 3


def test_a_finished_folder_is_completed(draw, tmp_path):
    draw()
    images, times = contents(tmp_path / "run"), {p: p.stat().st_mtime_ns for p in (tmp_path / "run").iterdir()}
    draw("--save-latent")
    assert sorted(contents(tmp_path / "run.latents")) == [f"{k:06d}.safetensors" for k in range(6)]
    draw("--num-fid-samples", 9)
    assert len(contents(tmp_path / "run")) == 9 and contents(tmp_path / "run").items() >= images.items()
    assert {p: p.stat().st_mtime_ns for p in times} == times, "images that are there are left alone"
    fewer = draw("--num-fid-samples", 3)
    assert "is of 9 images, all of them there; this run looks after the first 3" in fewer.stderr
    assert record(tmp_path / "run")["complete"] and record(tmp_path / "run")["settings"]["num_fid_samples"] == 9
    (tmp_path / "run" / "000008.png").unlink()
    assert "of 9 images" in draw().stderr and not (tmp_path / "run" / "000008.png").exists()


def test_damaged_files_are_made_again(draw, tmp_path):
    draw("--save-latent")
    images, latents = tmp_path / "run", tmp_path / "run.latents"
    before = contents(images), contents(latents)
    png = (images / "000002.png").read_bytes()
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 1
    for k, damage in enumerate((b"", png[:-9], bytes(flipped), b"no image")):
        (images / f"{k:06d}.png").write_bytes(damage)
    (latents / "000004.safetensors").write_bytes(before[1]["000004.safetensors"][:-1])
    (latents / "000005.safetensors").write_bytes(b"")
    (latents / "000003.safetensors").unlink()
    os.mkfifo(latents / "000003.safetensors")
    own = record(images)
    own["settings"]["num_fid_samples"] = "x"
    run_record(images).write_text(json.dumps(own))
    for name in (".run.run.json.abcd1234.part", ".run.png.abcd1234.part", "run.latents/.1.safetensors.abcd1234.part"):
        (tmp_path / name).write_bytes(b"left by a killed run")
    draw("--save-latent")
    assert (contents(images), contents(latents)) == before
    assert not list(tmp_path.rglob("*.part"))


def test_one_run_at_a_time(draw, tmp_path):
    draw()
    with lock(tmp_path / "run", tmp_path / ".run.lock"):
        done = draw("--num-fid-samples", 9, check=False)
    assert done.returncode == 2 and "another run is at work in" in done.stderr and len(contents(tmp_path / "run")) == 6


def test_a_folder_of_the_old_layout_is_continued(draw, tmp_path):
    """With record, lock and latents among the images, and a record that knows nothing of network and transport."""
    draw("--save-latent")
    folder, before = tmp_path / "run", contents(tmp_path / "run")
    old = record(folder)
    old["settings"] = {k: v for k, v in old["settings"].items() if not k.startswith(("network", "transport", "auto", "uint8"))}
    run_record(folder).unlink()
    (folder / "run.json").write_text(json.dumps(old))
    (folder / ".lock").touch()
    (tmp_path / "run.latents").rename(folder / "latents")
    (folder / "000001.png").unlink()
    refused = draw("--global-seed", 1, check=False)
    assert refused.returncode == 2 and "global_seed: 0 there, 1 now" in refused.stderr and (folder / "run.json").is_file()
    assert "drawing 1 of 6 images" in draw("--save-latent").stderr
    assert contents(folder) == before and len(contents(tmp_path / "run.latents")) == 6
    assert record(folder)["settings"]["network.rope_grid"] == "row_major"


def test_images_that_are_not_finite_are_named_instead_of_written(draw, weights, tmp_path):
    state = load_file(weights)
    state["y_embedder.embedding_table.weight"][2] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    flags = ["--num-fid-samples", 13, "--save-latent", "--npz"]
    done = draw(*flags, ckpt=tmp_path / "nan.safetensors", check=False)
    assert done.returncode == 2 and "2 of 13 images are not finite" in done.stderr and "run: 000002, run: 000012" in done.stderr
    drawn = {f"{k:06d}" for k in range(13)} - {"000002", "000012"}
    assert {p.stem for p in (tmp_path / "run").iterdir()} == drawn == {p.stem for p in (tmp_path / "run.latents").iterdir()}
    assert not record(tmp_path / "run")["complete"] and record(tmp_path / "run")["not_finite"] == 2
    assert not (tmp_path / "run.npz").exists()
    sampler = load_sampler(
        load_config(CONFIG), find_weights(tmp_path / "nan.safetensors"), SampleSettings(num_steps=1), torch.device("cpu")
    )
    with pytest.raises(ValueError, match=r"1 of 2 images are not finite \(NaN or infinity\): index 7"):
        sampler.draw([1, 2], indices=[6, 7])


def test_groups_lose_only_what_is_not_finite(tmp_path):
    (tmp_path / "g.jsonl").write_text('{"prompt": "a cow"}\n')
    (tmp_path / "dpg").mkdir()
    (tmp_path / "dpg" / "7.txt").write_text("a cow")
    image = np.zeros((4, 4, 3), np.uint8)
    for kind, files in (
        (PromptFiles(["a cow"], 4), {"00000-00.png", "00000-01.png", "00000-03.png"}),
        (GenEvalPrompts(tmp_path / "g.jsonl"), {"metadata.jsonl", "00000.png", "00001.png", "00003.png"}),
        (DPGPrompts(tmp_path / "dpg"), set()),
    ):
        out = tmp_path / type(kind).__name__
        out.mkdir()
        kind.write(out, 0, [image, image, None, image])
        assert {p.name for p in out.rglob("*") if p.is_file()} == files and not kind.is_done(out, 0)
        kind.write(out, 0, [image] * 4)
        assert kind.is_done(out, 0)


def test_truncated_pixels_are_half_a_level_darker(draw, tmp_path):
    def pixels(name) -> np.ndarray:
        return np.stack([np.asarray(Image.open(p)).astype(int) for p in sorted((tmp_path / name).iterdir())])

    draw()
    draw("--uint8", "truncate", "--name", "cut")
    assert set(np.unique(pixels("run") - pixels("cut"))) == {0, 1}
    x = torch.linspace(-1, 1, 4096).view(1, 1, 64, 64)
    assert (to_uint8(x).astype(int) - to_uint8(x, truncate=True)).mean() == pytest.approx(0.5, abs=0.01)
    done = draw("--uint8", "truncate", check=False)
    assert done.returncode == 2 and "uint8: 'round' there, 'truncate' now" in done.stderr


def test_formats_of_images_are_not_mixed(tmp_path):
    (tmp_path / "meta.json").write_text(json.dumps({"k": {"category": "art", "prompt": "a cow"}}))
    png, jpg = (MJHQPrompts(str(tmp_path / "meta.json"), kind) for kind in ("png", "jpg"))
    assert png.identity != jpg.identity
    jpg.write(tmp_path, 0, [np.full((16, 16, 3), 9, np.uint8)])
    path = tmp_path / "art" / "k.jpg"
    assert jpg.is_done(tmp_path, 0) and not png.is_done(tmp_path, 0)
    Image.open(path).save(tmp_path / "default.jpg")
    assert Image.open(path).quantization == Image.open(tmp_path / "default.jpg").quantization
    path.write_bytes(path.read_bytes()[:-2])
    assert not jpg.is_done(tmp_path, 0)
