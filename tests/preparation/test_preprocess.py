"""Preprocessing as users run it: restart, process counts, damaged files, and training on what it wrote."""

import json
import os
import shutil
import subprocess

import pytest
import torch
import yaml
from helpers.commands import command, small_disk, start_and_kill
from helpers.companions import save_tiny_dc, save_tiny_kl
from helpers.paths import GOLDENS, ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images

from tim.config import load_config
from tim.data.latents import find_corruption
from tim.images import center_crop, open_rgb, to_tensor
from tim.models.autoencoders import Autoencoder
from tim.preparation.settings import Native, Square, from_published
from tim.typed_yaml import ConfigError, build_typed, read_tree

SETTINGS = (".lock", "config.yaml", "preprocess.json")
SQUARE, NATIVE = "projects/preprocess/image_latent_c2i.py", "projects/preprocess/image_nr_latent_c2i.py"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Processes started by torchrun compute with one thread; so does this one, because files are compared byte for byte."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two classes of six crops of photographs of several sizes, a KL and a DC autoencoder."""
    root = tmp_path_factory.mktemp("source")
    save_tiny_kl(root / "kl", scaling_factor=0.3, shift_factor=0.1)
    save_tiny_dc(root / "dc", scaling_factor=0.5)
    for label, picture in enumerate(load_sample_images().images):
        (root / "train" / f"n{label:02d}").mkdir(parents=True)
        for k in range(6):
            crop = Image.fromarray(picture[10 * k : 10 * k + 40 + 8 * k, 20 * k : 20 * k + 70])
            crop.save(root / "train" / f"n{label:02d}" / f"{k}.JPEG")
    return root


def config(source, folder, **changes):
    settings = {"vae_dir": str(source / "kl"), "image_dir": str(source / "train"), "num_workers": 0, "batch_size": 4}
    path = folder / "preprocess.yaml"
    path.write_text(yaml.safe_dump({**settings, **changes}))
    return path


def files_of(project):
    return {str(p.relative_to(project)): p.read_bytes() for p in sorted((project / "latents").glob("*/*"))}


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """A finished run at 32 pixels."""
    folder = tmp_path_factory.mktemp("whole")
    command(SQUARE, "--config", config(source, folder, image_size=32), "--project_dir", folder / "run")
    return folder / "run"


def test_files_hold_the_crop_and_its_mirror(source, whole):
    vae = Autoencoder.from_pretrained(str(source / "kl"))
    assert len(files_of(whole)) == 12
    seen = set()
    for label in (0, 1):
        stored = load_file(whole / "latents" / f"n{label:02d}" / "3.safetensors")
        assert set(stored) == {"latent", "label"} and stored["label"] == label
        image = to_tensor(center_crop(open_rgb(source / "train" / f"n{label:02d}" / "3.JPEG"), 32))
        posterior = vae.model.encode(torch.stack([image, image.flip(-1)])).latent_dist
        noise = ((stored["latent"] / 0.3 + 0.1) - posterior.mean) / posterior.std
        assert stored["latent"].shape == (2, 4, 4, 4)
        assert 0.7 < noise.std() < 1.3 and (noise[0] - noise[1]).abs().max() > 0.5
        seen.add(float(noise[0, 0, 0, 0]))
    assert len(seen) == 2, "every image has its own noise"


def test_statistics_are_those_of_the_files(whole):
    latents = torch.stack([load_file(p)["latent"] for p in sorted((whole / "latents").glob("*/*"))]).double()
    report = json.loads((whole / "statistics.json").read_text())
    assert report["images"] == report["files"] == 12
    assert report["mean"] == pytest.approx(latents.mean((0, 1, 3, 4)).tolist(), abs=1e-9)
    assert report["std"] == pytest.approx(latents.std((0, 1, 3, 4), correction=0).tolist(), rel=1e-6)
    assert (whole / "bad_images.jsonl").read_text() == ""


def test_only_missing_and_damaged_files_are_made_again(source, whole, tmp_path):
    path = config(source, tmp_path, image_size=32)
    command(SQUARE, "--config", path, "--project_dir", tmp_path / "run")
    folder = tmp_path / "run" / "latents"
    want, intact = files_of(tmp_path / "run"), folder / "n01" / "5.safetensors"
    assert want == files_of(whole)
    before = intact.stat().st_mtime_ns
    (folder / "n00" / "0.safetensors").unlink()
    (folder / "n00" / "1.safetensors").write_bytes(want["latents/n00/1.safetensors"][:-1])
    (folder / "n00" / "2.safetensors").write_bytes(b"")
    save_file({"latent": torch.zeros(4, 4, 4)}, folder / "n01" / "3.safetensors")
    for dry in (True, False):
        done = command(SQUARE, "--config", path, "--project_dir", tmp_path / "run", *["--dry-run"] * dry)
        assert "12 images in" in done.stdout and ", 4 to encode" in done.stdout
        assert (files_of(tmp_path / "run") == want) is not dry
    assert intact.stat().st_mtime_ns == before
    assert "4 latents made now, 12 of 12" in done.stdout


@pytest.mark.dist
def test_processes_and_batches_do_not_change_the_files(source, whole, tmp_path):
    """Two processes write the same bytes; another batch size and memory layout change rounding only."""
    path = config(source, tmp_path, image_size=32)
    command(SQUARE, "--config", path, "--project_dir", tmp_path / "two", "num_workers=1", processes=2)
    assert files_of(tmp_path / "two") == files_of(whole)
    assert json.loads((tmp_path / "two" / "statistics.json").read_text())["files"] == 12
    command(SQUARE, "--config", path, "--project_dir", tmp_path / "other", "batch_size=5", "vae_channels_last=true")
    for name in files_of(whole):
        a, b = (load_file(root / name)["latent"] for root in (tmp_path / "two", tmp_path / "other"))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_killed_run_is_continued(source, tmp_path):
    """The files of a run killed by kill -9 and started again are those of a run that was not."""
    path = config(source, tmp_path, image_size=192, batch_size=1)
    words = [SQUARE, "--config", str(path), "--project_dir", str(tmp_path / "run")]
    start_and_kill(words, lambda: any((tmp_path / "run").glob("latents/*/*.safetensors")))
    made = list((tmp_path / "run").glob("latents/*/*.safetensors"))
    assert 1 <= len(made) < 12 and all(find_corruption(p) is None for p in made)
    done = command(*words)
    assert f"{12 - len(made)} latents made now" in done.stdout
    command(SQUARE, "--config", path, "--project_dir", tmp_path / "whole")
    assert files_of(tmp_path / "run") == files_of(tmp_path / "whole")


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(source, whole, tmp_path):
    words = [SQUARE, "--config", config(source, tmp_path, image_size=32), "--project_dir", tmp_path / "run"]
    with small_disk(600):
        done = command(*words, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: {tmp_path}/run/latents/n00/0.safetensors cannot be written" in done.stderr
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name not in SETTINGS]
    command(*words)
    assert files_of(tmp_path / "run") == files_of(whole)


def test_what_is_left_of_a_latent_whose_image_is_gone_spoils_nothing(source, tmp_path):
    shutil.copytree(source / "train", tmp_path / "train")
    words = [SQUARE, "--config", config(source, tmp_path, image_size=32, image_dir=str(tmp_path / "train"))]
    command(*words, "--project_dir", tmp_path / "run")
    (tmp_path / "run/latents/n00/0.safetensors").write_bytes(b"")
    (tmp_path / "train/n00/0.JPEG").write_bytes(b"no image")
    done = command(*words, "--project_dir", tmp_path / "run")
    assert "0 latents made now, 11 of 12 are there" in done.stdout
    assert json.loads((tmp_path / "run" / "statistics.json").read_text())["files"] == 11


def test_native_sizes(source, tmp_path):
    """Floored to multiples of 16 below the area of 48x48 pixels, scaled to it above; too small images are named."""
    (tmp_path / "train" / "a").mkdir(parents=True)
    sizes = {"small": (40, 33), "wide": (100, 20), "large": (640, 427), "exact": (48, 48), "tiny": (30, 12)}
    for name, size in sizes.items():
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / "train" / "a" / f"{name}.png")
    path = config(source, tmp_path, image_dir=str(tmp_path / "train"), min_size=16, max_size=48, vae_dir=str(source / "dc"))
    done = command(NATIVE, "--config", path, "--project_dir", tmp_path / "run", "latent_dtype=float16")
    command(NATIVE, "--config", path, "--project_dir", tmp_path / "other", "latent_dtype=float16", "batch_size=1")
    assert files_of(tmp_path / "run") == files_of(tmp_path / "other")
    stored = {p.stem: load_file(p)["latent"] for p in (tmp_path / "run" / "latents").glob("*/*")}
    assert all(latent.dtype == torch.float16 for latent in stored.values())
    # 100x20 is under 48*48 pixels; 640x427 scales to 58.7x39.2.
    shapes = {name: tuple(latent.shape) for name, latent in stored.items()}
    assert shapes == {"small": (2, 8, 8, 8), "wide": (2, 8, 4, 24), "large": (2, 8, 8, 12), "exact": (2, 8, 12, 12)}
    (bad,) = map(json.loads, (tmp_path / "run" / "bad_images.jsonl").read_text().splitlines())
    assert bad["file"].endswith("tiny.png") and "30x12" in bad["cause"] and "1 of 5 images could not be read" in done.stdout
    checked = command("tools/check_latents.py", tmp_path / "run" / "latents")
    assert "shape 8x8x12: 1 files" in checked.stdout and "native resolution" in checked.stdout


def test_unreadable_images_are_named_and_the_others_are_made(source, tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    for name in ("0.png", "2.png"):
        Image.effect_noise((40, 40), 60).convert("RGB").save(tmp_path / "train" / "a" / name)
    (tmp_path / "train" / "a" / "1.png").write_bytes(b"no image")
    path = config(source, tmp_path, image_dir=str(tmp_path / "train"), image_size=32)
    done = command(SQUARE, "--config", path, "--project_dir", tmp_path / "run")
    (bad,) = map(json.loads, (tmp_path / "run" / "bad_images.jsonl").read_text().splitlines())
    assert bad["index"] == 1 and bad["file"].endswith("a/1.png") and "cannot be read" in bad["cause"]
    assert "1 of 3 images could not be read" in done.stdout and len(files_of(tmp_path / "run")) == 2
    Image.new("RGB", (40, 40), "red").save(tmp_path / "train" / "a" / "1.png")
    before = files_of(tmp_path / "run")
    command(SQUARE, "--config", path, "--project_dir", tmp_path / "run")
    after = files_of(tmp_path / "run")
    assert len(after) == 3 and before.items() <= after.items() and (tmp_path / "run" / "bad_images.jsonl").read_text() == ""


def test_mistakes_are_refused(source, whole, tmp_path):
    path = config(source, tmp_path, image_size=32)
    shutil.copytree(whole / "latents" / "n00", tmp_path / "foreign" / "n00")
    for name in ("n00", "n02"):
        shutil.copytree(source / "train" / "n00", tmp_path / "renamed" / name)
    twins = tmp_path / "twins" / "a"
    twins.mkdir(parents=True)
    for suffix in ("png", "jpg"):
        Image.new("RGB", (40, 40)).save(twins / f"0.{suffix}")
    cases = [
        (["image_sise=32"], "image_size"),
        (["image_size=30"], "multiple of 8"),
        (["image_size=10000000"], "image_size must be <= 65536"),
        (["latent_dtype=int8"], "latent_dtype='int8'"),
        (["batch_size=0"], "batch_size must be >= 1"),
        ([f"image_dir={tmp_path}/absent"], "no dataset folder"),
        ([f"image_dir={tmp_path}/twins"], "would both become 0.safetensors"),
        ([f"vae_dir={tmp_path}/absent"], "no autoencoder folder"),
        ([f"latent_dir={whole}/latents", "image_size=64"], "image_size: 32 there, 64 now"),
        ([f"latent_dir={whole}/latents", "seed=1"], "latents of another run"),
        ([f"latent_dir={whole}/latents", f"image_dir={tmp_path}/renamed"], "latents of another run (classes_sha256"),
        ([f"latent_dir={tmp_path}/foreign"], "latents of an unknown run"),
        ([f"latent_dir={path}"], f"error: {path}: File exists"),
        ([f"latent_dir={path}/a"], f"error: {path}/a: Not a directory"),
        ([f"latent_dir={tmp_path}/{'n' * 256}"], "File name too long"),
    ]
    for overrides, message in cases:
        done = command(SQUARE, "--config", path, "--project_dir", tmp_path / "run", *overrides, check=False)
        assert done.returncode == 2 and message in done.stderr, (overrides, done.stderr)
    done = command(
        NATIVE, "--config", config(source, tmp_path, min_size=12, max_size=48), "--project_dir", tmp_path / "run", check=False
    )
    assert done.returncode == 2 and "min_size=12" in done.stderr
    assert not (tmp_path / "run").exists()


def trained_on(source, latent_dir, project, *overrides):
    """Log of two steps of a tiny trainer on latents."""
    small = dict(depth=1, hidden_size=24, num_heads=3, encoder_depth=1, lora_hidden_size=8, projector_dim=8, z_dim=192,
                 num_classes=2, input_size=4, patch_size=2)  # fmt: skip
    base = [
        *(f"model.network.params.{k}={v}" for k, v in small.items()),
        f"model.vae_dir={source}/kl",
        f"data.dataset.latent_dir={latent_dir}",
        "data.dataset.image_size=32",
        "data.dataloader.batch_size=3",
        "data.dataloader.num_workers=0",
        "training.mixed_precision=no",
        "training.max_train_steps=2",
        "training.sample_steps=null",
        "training.log_steps=1",
    ]
    trainer = ["projects/train/trainer_c2i.py", "--config", "configs/c2i/tim_b_p4.yaml", "--project_dir", project]
    command(*trainer, *base, *overrides)
    records = [json.loads(line) for line in (project / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2] and all(r["denoising_loss"] > 0 for r in records)
    return records


def test_what_it_writes_trains(source, whole, tmp_path):
    """Without REPA no image is read; with REPA the images are found by their stems."""
    plain = trained_on(source, whole / "latents", tmp_path / "plain", "model.enc_dir=null", "data.dataset.image_dir=null")
    assert plain[1]["proj_loss"] == 0
    encoder = f"model.enc_dir={GOLDENS}/radio_tiny/radio_tiny_half.pth.tar"
    repa = trained_on(source, whole / "latents", tmp_path / "repa", encoder, f"data.dataset.image_dir={source}/train")
    assert repa[1]["proj_loss"] > 0.5


def test_check_latents_names_what_is_damaged(whole, tmp_path):
    done = command("tools/check_latents.py", whole / "latents")
    statistics = json.loads((whole / "statistics.json").read_text())
    channel = f"channel 0 of 4: mean {statistics['mean'][0]:+.4f}, std {statistics['std'][0]:.4f}"
    for line in (
        "12 whole files in 2 classes", "shape 4x4x4: 12 files", "dtype float32: 12 files", "order of the folder names", channel,
        "0 problems",
    ):  # fmt: skip
        assert line in done.stdout
    good = torch.randn(2, 4, 4, 4)
    for name, content in {
        "a/0": {"latent": good, "label": torch.tensor(0)},
        "a/1": {"latent": good, "label": torch.tensor(1)},
        "a/2": {"latent": good * float("nan"), "label": torch.tensor(0)},
        "a/3": {"latent": good[0], "label": torch.tensor(0)},
        "b/0": {"latent": good, "label": torch.tensor(0)},
        "b/1": {"latent": torch.randn(2, 8, 4, 4), "label": torch.tensor(0)},
    }.items():
        path = tmp_path / "bad" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(content, path)
    (tmp_path / "bad" / "c").mkdir()
    (tmp_path / "bad" / "c" / "0.safetensors").write_bytes((tmp_path / "bad" / "a" / "0.safetensors").read_bytes()[:-3])
    done = command("tools/check_latents.py", tmp_path / "bad", check=False)
    assert done.returncode == 1
    for part in (
        "a/2.safetensors: holds non-finite", "a/3.safetensors: latent is (4, 4, 4)", "c/0.safetensors: ",
        "a: 2 different labels: 0 (1 files), 1 (1 files)", "b: label 0 also belongs to a", "c: no whole latent file",
        "channels differ between files: 4, 8",
    ):  # fmt: skip
        assert part in done.stdout, part
    assert command("tools/check_latents.py", tmp_path / "absent", check=False).returncode == 2


def test_launchers_start_their_configs(tmp_path):
    fake = tmp_path / "python"
    fake.write_text('#!/usr/bin/env bash\necho "$@"\n')
    fake.chmod(0o755)
    wanted = {
        "256": (SQUARE, "imagenet_256_sd_vae", Square),
        "512": (SQUARE, "imagenet_512_dc_ae", Square),
        "native": (NATIVE, "imagenet_native_dc_ae", Native),
    }
    for name, (program, config_name, kind) in wanted.items():
        env = {**os.environ, "PYTHON": str(fake), "GPUS": "1", "OVERRIDES": "seed=3 num_workers=2"}
        script = ["bash", f"scripts/preprocess/preprocess_imagenet_{name}.sh"]
        printed = subprocess.run(script, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
        path = f"configs/preprocess/{config_name}.yaml"
        assert printed.startswith(
            f"{program} --config {path} --project_dir workdir/preprocess/{config_name} seed=3 num_workers=2"
        )
        build_typed(kind, read_tree(ROOT / path))
    training = load_config(ROOT / "configs/c2i/tim_xl_p1_512.yaml")
    settings = build_typed(Square, read_tree(ROOT / "configs/preprocess/imagenet_512_dc_ae.yaml"))
    assert (settings.latent_dir, settings.vae_dir) == (training.data.dataset.latent_dir, training.model.vae_dir)
    assert settings.image_size == training.data.dataset.image_size


def test_the_published_form_of_file_and_command(source, tmp_path):
    """model.vae, data.dataset.{data_dir, target_dir, resolution} and --seed; the same latents as by our own keys."""
    published = {
        "model": {"vae": str(source / "kl")},
        "data": {
            "dataset": {"data_dir": str(source / "train"), "target_dir": f"{tmp_path}/latents", "resolution": 32, "flip": True},
            "dataloader": {"num_workers": 0, "batch_size": 4},
        },
    }
    (tmp_path / "published.yaml").write_text(yaml.safe_dump(published))
    words = ["--project_dir", tmp_path, "--seed", 3]
    with pytest.warns(UserWarning, match="flip has no effect in preprocessing"):
        command(SQUARE, "--config", tmp_path / "published.yaml", *words)
    command(SQUARE, "--config", config(source, tmp_path, image_size=32, seed=3), "--project_dir", tmp_path / "own")
    latents = {path: data for path, data in files_of(tmp_path).items() if path.endswith(".safetensors")}
    assert len(latents) == 12 and latents.items() <= files_of(tmp_path / "own").items()
    with pytest.warns(UserWarning, match="flip has no effect"):
        refused = command(SQUARE, "--config", tmp_path / "published.yaml", *words[:2], "--seed", -1, check=False)
        native = build_typed(Native, from_published(published, Native) | {"min_size": 8})
    assert refused.returncode == 2 and "seed must be >= 0" in refused.stderr
    with pytest.raises(ConfigError, match="must be mappings, got 3"):
        from_published({"model": 3, "data": None}, Square)
    assert (native.max_size, native.latent_dir) == (32, f"{tmp_path}/latents")
