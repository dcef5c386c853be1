"""REPA with features made once: the tool as people run it, and training on what it wrote against the live encoder."""

import json
import shutil

import pytest
import torch
from helpers.commands import command, small_disk
from helpers.companions import save_tiny_kl
from helpers.paths import GOLDENS, ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images

from tim.config import load_config
from tim.data.c2i import load_square
from tim.models.radio import Radio
from tim.preparation.feature_cache import token_grid
from tim.training.loop import train
from tim.training.tasks import ClassTask

TOOL = "tools/cache_radio_features.py"
ENCODER = str(GOLDENS / "radio_tiny" / "radio_tiny_half.pth.tar")
HALF = 2**-11  # largest relative rounding error of float16


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two classes of three crops of photographs, latents of the same names, and an autoencoder."""
    root = tmp_path_factory.mktemp("source")
    save_tiny_kl(root / "vae")
    g = torch.Generator().manual_seed(0)
    for label, picture in enumerate(load_sample_images().images):
        for kind in ("images", "latents"):
            (root / kind / f"c{label}").mkdir(parents=True)
        for k in range(3):
            Image.fromarray(picture[30 * k : 30 * k + 90, 50 * k : 50 * k + 120]).save(root / f"images/c{label}/{k}.png")
            latent = {"latent": torch.randn(2, 4, 8, 8, generator=g), "label": torch.tensor(label)}
            save_file(latent, root / f"latents/c{label}/{k}.safetensors")
    return root


def options(source, kind="latent"):
    """Overrides of digits.yaml: latents of 8x8 in 16 tokens, or 64-pixel images that become such latents."""
    return [
        f"data.data_type={kind}", f"data.dataset.latent_dir={source}/latents", f"data.dataset.image_dir={source}/images",
        "data.dataset.image_size=64", f"model.enc_dir={ENCODER}", f"model.vae_dir={source}/vae", "data.dataset.name=null",
        "model.network.params.z_dim=192", "model.network.params.in_channels=4", "model.network.params.hidden_size=24",
        "model.network.params.depth=1", "data.dataloader.batch_size=6", "training.max_train_steps=6",
        "training.sample_steps=null", "training.mixed_precision=no",
    ]  # fmt: skip


def cache(source, folder, *words, processes=1, check=True):
    """The tool; words after the options, so that they override them."""
    head = [TOOL, "--config", "configs/c2i/digits.yaml", "--features-dir", folder, "--num-workers", 0]
    return command(*head, *options(source), *words, processes=processes, check=check)


@pytest.fixture(scope="module")
def half(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("half") / "features"
    cache(source, folder, "--batch-size", 4)
    return folder


@pytest.fixture(scope="module")
def full(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("full") / "features"
    cache(source, folder, "--dtype", "float32")
    return folder


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("[!.]*")) if p.is_file()}


def fit(project, source, *overrides, kind="latent"):
    """The records of six steps."""
    config = load_config(ROOT / "configs/c2i/digits.yaml", [*options(source, kind), *overrides])
    train(config, project, 0, ClassTask)
    return [json.loads(line) for line in (project / "log.jsonl").read_text().splitlines()]


def test_files_hold_the_features_of_both_mirrors(source, half, full):
    """The image the trainer would show: cropped, mirrored, resized to 16 pixels for each of 4 x 4 tokens."""
    encoder = Radio.from_checkpoint(ENCODER)
    for name in ("c0/0", "c1/2"):
        pair = torch.stack([load_square(source / f"images/{name}.png", 64, flip) for flip in (False, True)])
        want = encoder.tokens(pair, (4, 4))
        exact, rounded = (load_file(folder / f"{name}.safetensors")["features"] for folder in (full, half))
        assert exact.shape == (2, 16, 192) and exact.dtype == torch.float32 and rounded.dtype == torch.float16
        torch.testing.assert_close(exact, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rounded.float(), exact, rtol=HALF * 1.01, atol=1e-4)
        assert (want[0] - want[1]).abs().max() > 0.1
    record = json.loads((half / "features.json").read_text())
    assert (record["tokens"], record["width"], record["image_size"], record["dtype"]) == (16, 192, 64, "float16")
    assert len(files_of(half)) == 7


@pytest.mark.parametrize("kind,factor", [("latent", 8), ("image", 8), ("image", 1)])
def test_one_feature_meets_one_token(source, kind, factor):
    """64-pixel images in latents of 8x8, or as pixels, in patches of 4."""
    vae = f"model.vae_dir={source}/vae" if factor == 8 else "model.vae_dir=null"
    overrides = [*options(source, kind), "model.network.params.patch_size=4", vae]
    assert token_grid(load_config(ROOT / "configs/c2i/digits.yaml", overrides)) == (16 // factor, 16 // factor)


@pytest.mark.parametrize("kind", ["latent", "image"])
def test_losses_are_those_of_the_live_encoder(source, half, full, tmp_path, kind):
    """Rounding h to half precision turns it by at most an angle of 2^-11, and the cosine changes by no more than that.

    In float32 nothing is rounded; what remains is that products of another batch size are summed in another order.
    """
    live = fit(tmp_path / "live", source, kind=kind)
    exact = fit(tmp_path / "full", source, f"data.dataset.features_dir={full}", kind=kind)
    rounded = fit(tmp_path / "half", source, f"data.dataset.features_dir={half}", kind=kind)
    for key in ("proj_loss", "denoising_loss"):
        values = [[record[key] for record in run] for run in (live, exact, rounded)]
        assert values[1] == pytest.approx(values[0], rel=1e-5), key
        assert values[2][0] == pytest.approx(values[0][0], abs=HALF), key  # later weights have learnt from other targets
    assert live[0]["proj_loss"] != live[5]["proj_loss"] and rounded[0]["proj_loss"] != live[0]["proj_loss"]


def test_a_latent_takes_the_features_of_its_mirror(source, full, tmp_path):
    """With the two mirrors swapped in the files, training sees something else; with mirroring off only the first counts."""
    shutil.copytree(full, tmp_path / "swapped")
    for path in (tmp_path / "swapped").glob("*/*.safetensors"):
        save_file({"features": load_file(path)["features"].flip(0).contiguous()}, path)
    runs = {}
    for name, folder in (("right", full), ("swapped", tmp_path / "swapped")):
        runs[name] = fit(tmp_path / name, source, f"data.dataset.features_dir={folder}", "training.max_train_steps=1")
    live = fit(tmp_path / "live", source, "training.max_train_steps=1")
    assert runs["right"][0]["proj_loss"] == pytest.approx(live[0]["proj_loss"], rel=1e-5)
    assert abs(runs["swapped"][0]["proj_loss"] - live[0]["proj_loss"]) > 1e-4


def test_neither_images_nor_encoder_are_read_when_not_needed(source, full, tmp_path):
    """Latents with cached features need no image; without REPA nothing beside the latents is needed."""
    fit(tmp_path / "a", source, f"data.dataset.features_dir={full}", "data.dataset.image_dir=absent")
    off = ["model.enc_dir=null", "data.dataset.image_dir=absent", "training.max_train_steps=1"]
    assert fit(tmp_path / "b", source, *off)[0]["proj_loss"] == 0
    with pytest.warns(UserWarning, match=r"features_dir is not read: model\.enc_dir=null"):
        fit(tmp_path / "c", source, *off, "data.dataset.features_dir=absent")


def test_only_missing_and_damaged_files_are_made_again(source, half, tmp_path):
    folder, want = tmp_path / "features", files_of(half)
    shutil.copytree(half, folder)
    intact = (folder / "c0/2.safetensors").stat().st_mtime_ns
    (folder / "c0/0.safetensors").unlink()
    (folder / "c0/1.safetensors").write_bytes(want["c0/1.safetensors"][:-1])
    save_file({"features": torch.zeros(2, 9, 192)}, folder / "c1/0.safetensors")
    for dry in (True, False):
        done = cache(source, folder, "--batch-size", 4, *["--dry-run"] * dry)
        assert "6 images in" in done.stdout and ", 3 to encode" in done.stdout
        assert (files_of(folder) == want) is not dry
    assert (folder / "c0/2.safetensors").stat().st_mtime_ns == intact


def test_the_encoders_precision_belongs_to_the_features(source, full, tmp_path):
    """In bfloat16 tokens keep their direction to 1e-4, and a folder does not mix them with those of float32."""
    folder, flags = tmp_path / "features", ("--dtype", "float32", "model.enc_dtype=bfloat16")
    cache(source, folder, *flags)
    assert json.loads((folder / "features.json").read_text())["encoder_dtype"] == "bfloat16"
    for path in folder.glob("*/*.safetensors"):
        rounded, exact = (load_file(root / path.relative_to(folder))["features"] for root in (folder, full))
        assert not torch.equal(rounded, exact) and torch.cosine_similarity(rounded, exact, dim=-1).min() > 1 - 1e-4
    shutil.copytree(full, tmp_path / "full")
    record = json.loads((tmp_path / "full/features.json").read_text())
    assert record.pop("encoder_dtype") is None
    (tmp_path / "full/features.json").write_text(json.dumps(record))  # as it was before there was a choice
    for place, words, there in ((folder, flags[:2], "'bfloat16' there, None now"), (tmp_path / "full", flags, "None there")):
        done = cache(source, place, *words, check=False)
        assert done.returncode == 2 and f"features of another run (encoder_dtype: {there}" in done.stderr
    assert "0 to encode" in cache(source, tmp_path / "full", *flags[:2], "model.enc_dtype=float32").stdout


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(source, half, tmp_path):
    with small_disk(3000):
        done = cache(source, tmp_path / "features", "--batch-size", 4, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: {tmp_path}/features/c0/0.safetensors cannot be written" in done.stderr
    assert set(files_of(tmp_path / "features")) == {"features.json"}
    cache(source, tmp_path / "features", "--batch-size", 4)
    assert files_of(tmp_path / "features") == files_of(half)
    (tmp_path / "file").touch()
    assert f"error: {tmp_path}/file: File exists" in cache(source, tmp_path / "file", check=False).stderr


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_write_the_same_files(source, half, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as processes of torchrun have
    try:
        cache(source, tmp_path / "one", "--batch-size", 4)
    finally:
        torch.set_num_threads(threads)
    cache(source, tmp_path / "two", "--batch-size", 4, processes=2)
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


def test_unreadable_images_are_named_and_the_others_are_made(source, tmp_path):
    shutil.copytree(source, tmp_path / "data")
    (tmp_path / "data/images/c0/1.png").write_bytes(b"no image")
    (tmp_path / "data/latents/c0/0.safetensors").write_bytes(b"no latent, but the others say how many tokens there are")
    done = cache(tmp_path / "data", tmp_path / "features")
    assert "5 files written now, 5 of 6 are there" in done.stdout and "1.png cannot be read" in done.stdout
    with pytest.raises(FileNotFoundError, match=r"1 of 6 samples have no file in .*c0/1\.safetensors"):
        fit(tmp_path / "run", tmp_path / "data", f"data.dataset.features_dir={tmp_path}/features")
    assert not (tmp_path / "run").exists()


def test_features_that_the_precision_does_not_hold_are_named_and_the_others_are_made(source, tmp_path, monkeypatch):
    tokens = Radio.tokens

    def large(self, images, *args):
        return tokens(self, images, *args) * torch.tensor([1.0, 1e9] + [1.0] * (len(images) - 2)).view(-1, 1, 1)

    monkeypatch.setattr(Radio, "tokens", large)
    done = cache(source, tmp_path / "features")
    assert "5 files written now, 5 of 6 are there" in done.stdout
    assert "c0/0.png: its features would not be finite in torch.float16; choose a wider dtype" in done.stdout


def test_a_file_damaged_later_is_replaced_like_any_unreadable_sample(source, half, tmp_path):
    shutil.copytree(half, tmp_path / "features")
    (tmp_path / "features/c0/1.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="replaced by another"):
        fit(tmp_path / "run", source, f"data.dataset.features_dir={tmp_path}/features")
    (record,) = map(json.loads, (tmp_path / "run/bad_samples.jsonl").read_text().splitlines())
    assert "c0/1.safetensors is not a file of features" in record["cause"]


@pytest.mark.parametrize(
    "overrides,match",
    [
        (["data.dataset.features_dir=absent"], r"no absent/features\.json"),
        (["data.dataset.image_size=32"], r"of another run \(image_size: 64 there, 32 now\)"),
        (["model.network.params.patch_size=4"], "holds 16 features of width 192 .* need 4 of width 192"),
        (["model.network.params.z_dim=12"], "need 16 of width 12.*z_dim"),
        (["model.enc_dir=absent.tar"], "enc_dir: no RADIO checkpoint absent.tar"),
        (["model.enc_antialias=true"], "made with model.enc_antialias=False; set it so"),
        (["data.data_type=package", "data.dataset.name=digits"], "features_dir is for data_type latent and image, not package"),
    ],
)
def test_features_that_do_not_fit_are_refused_before_anything_is_written(source, half, tmp_path, overrides, match):
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        fit(tmp_path / "run", source, f"data.dataset.features_dir={half}", *overrides)
    assert not (tmp_path / "run").exists()


def test_another_encoder_is_told_apart(source, half, tmp_path):
    other = torch.load(ENCODER, weights_only=False)
    other["state_dict"]["input_conditioner.norm_mean"] += 0.5
    torch.save(other, tmp_path / "other.tar")
    with pytest.raises(ValueError, match=r"of another run \(encoder_sha256"):
        fit(tmp_path / "run", source, f"data.dataset.features_dir={half}", f"model.enc_dir={tmp_path}/other.tar")
    done = cache(source, half, f"model.enc_dir={tmp_path}/other.tar", check=False)
    assert done.returncode == 2 and "of another run (encoder_sha256" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("named,there", [("checkpoints/radio", "checkpoints"), ("checkpoints", "checkpoints/radio")])
def test_the_encoder_is_found_at_either_published_place(source, half, tmp_path, named, there):
    """Live, and as the one that made the features."""
    (tmp_path / there).mkdir(parents=True)
    shutil.copy(ENCODER, tmp_path / there / "r.tar")
    enc_dir, once = f"model.enc_dir={tmp_path}/{named}/r.tar", "training.max_train_steps=1"
    for overrides in ([], [f"data.dataset.features_dir={half}"]):
        with pytest.warns(
            UserWarning, match=rf"enc_dir={tmp_path}/{named}/r\.tar is not there; taking {tmp_path}/{there}/r\.tar"
        ):
            config = load_config(ROOT / "configs/c2i/digits.yaml", [*options(source), enc_dir, once, *overrides])
            train(config, tmp_path / "run", 0, ClassTask, dry_run=True)


def test_a_width_that_is_not_the_projectors_is_refused_at_once(source, tmp_path):
    with pytest.raises(ValueError, match=r"width 192; set model\.network\.params\.z_dim"):
        fit(tmp_path / "run", source, "model.network.params.z_dim=12")
    assert not (tmp_path / "run").exists()
