"""MJHQ-30K's FID and CLIP score as users run them: protocols, categories, statistics files, missing pairs, processes."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from helpers.commands import command
from helpers.geneval_models import save_tiny_clip
from helpers.images import save_photographs
from PIL import Image
from safetensors.torch import load_file, save_file

from tim.evaluation.clip import load_clip
from tim.evaluation.inception import load_inception
from tim.evaluation.metrics import frechet_distance, statistics
from tim.evaluation.mjhq import RESIZES, antialiased_bilinear, pillow_bicubic
from tim.images import read_png

pytestmark = pytest.mark.filterwarnings("ignore:.*give a covariance of rank")
FID = "projects/evaluate/mjhq30k/calculate_fid.py"
CLIP = "projects/evaluate/mjhq30k/calculate_clip.py"
CATEGORIES = ("animals", "art")


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """Real pictures of two sizes and drawn ones in two categories, meta_data.json, and a tiny CLIP."""
    root = tmp_path_factory.mktemp("mjhq")
    entries = {}
    for number, category in enumerate(CATEGORIES):
        save_photographs(root / "real" / category, 5, side=40 + 8 * number, seed=number, names=category + "{:02d}.jpg")
        save_photographs(root / "drawn" / category, 4, side=48, seed=10 + number, names=category + "{:02d}.png")
        prompts = [f"a photo of {category} number {k}, " + "very " * 60 * k for k in range(4)]
        entries |= {f"{category}{k:02d}": {"category": category, "prompt": p} for k, p in enumerate(prompts)}
    (root / "meta.json").write_text(json.dumps(entries))
    save_tiny_clip(root / "clip")
    return root


def fid(benchmark, inception_file, *words, **kwargs):
    return command(FID, "--inception", inception_file, "--batch-size", 4, "--cache", benchmark / "cache", *words, **kwargs)


def fid_scores(benchmark, protocol="tim"):
    return json.loads((benchmark / f"drawn.fid-{protocol}.json").read_text())["scores"]


def clip(benchmark, *words, **kwargs):
    return command(CLIP, "--clip-model", benchmark / "clip", "--cache", benchmark / "cache", *words, **kwargs)


def test_resizes_by_hand():
    """Antialiasing averages whole areas; bicubic of a constant stays; all protocols give 299x299 in [0, 255]."""
    pixels = np.zeros((598, 598, 3), dtype=np.uint8)
    pixels[::2, ::2] = 240
    assert antialiased_bilinear(pixels)[:, 5:-5, 5:-5].mean() == pytest.approx(60, abs=0.5)
    assert antialiased_bilinear(pixels)[:, 5:-5, 5:-5].std() < 35, "every other pixel alone would leave 104"
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    for resize, _ in RESIZES.values():
        assert resize(noise).shape == (3, 299, 299) and resize(noise).min() >= 0 and resize(noise).max() <= 255
        np.testing.assert_allclose(resize(np.full((33, 20, 3), 77, dtype=np.uint8)), 77, atol=1e-3)
    channel = Image.fromarray(noise[:, :, 1].astype(np.float32), mode="F").resize((299, 299), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(pillow_bicubic(noise)[1], np.clip(np.asarray(channel), 0, 255))


@pytest.mark.slow
@pytest.mark.parametrize("protocol", list(RESIZES))
def test_fid_of_all_and_of_each_category(benchmark, inception_file, protocol):
    done = fid(benchmark, inception_file, benchmark / "real", benchmark / "drawn", "--protocol", protocol)
    network = load_inception(inception_file, torch.device("cpu"))
    pool3: dict[str, dict[str, np.ndarray]] = {"real": {}, "drawn": {}}
    for side, by_category in pool3.items():
        for category in CATEGORIES:
            files = sorted((benchmark / side / category).iterdir())
            pixels = torch.stack([RESIZES[protocol][0](read_png(p)) for p in files])
            by_category[category] = network.features_299(pixels)["pool3"].numpy()
        by_category["overall"] = np.concatenate([by_category[c] for c in CATEGORIES])
    scores = fid_scores(benchmark, protocol)
    assert list(scores) == ["overall", *CATEGORIES]
    for name, score in scores.items():
        want = frechet_distance(*statistics(pool3["drawn"][name]), *statistics(pool3["real"][name]))
        assert score == pytest.approx(want, rel=1e-5), name
        assert f"{score:.4f}" in done.stdout
    record = json.loads((benchmark / f"drawn.fid-{protocol}.json").read_text())
    assert record["protocol"] == f"mjhq-fid-{protocol}" and record["n"] == 8 and "299" in record["resize"]
    assert record["samples"]["image_format"] == ["png"] and record["reference"]["image_format"] == ["jpg"]


@pytest.mark.slow
@pytest.mark.dist
def test_saved_statistics_and_two_processes_give_the_same_fid(benchmark, inception_file, tmp_path, one_thread):
    fid(benchmark, inception_file, benchmark / "real", benchmark / "drawn", "--cache", tmp_path / "one")
    want = fid_scores(benchmark)
    fid(benchmark, inception_file, benchmark / "real", tmp_path / "real.npz", "--save-stats", "--cache", tmp_path / "one")
    fid(benchmark, inception_file, tmp_path / "real.npz", benchmark / "drawn", "--cache", tmp_path / "one")
    assert fid_scores(benchmark) == want
    wrong = fid(benchmark, inception_file, tmp_path / "real.npz", benchmark / "drawn", "--protocol", "clean", check=False)
    assert wrong.returncode == 2 and "made with protocol tim, now clean" in wrong.stderr
    fid(benchmark, inception_file, benchmark / "real", benchmark / "drawn", "--cache", tmp_path / "two", processes=2)
    assert fid_scores(benchmark) == want


def test_categories_must_agree(benchmark, inception_file, tmp_path):
    shutil.copytree(benchmark / "drawn", tmp_path / "drawn")
    (tmp_path / "drawn" / "art").rename(tmp_path / "drawn" / "arts")
    wrong = fid(benchmark, inception_file, benchmark / "real", tmp_path / "drawn", check=False)
    assert wrong.returncode == 2 and "categories differ: art, arts" in wrong.stderr
    flat = tmp_path / "flat"
    save_photographs(flat, 3)
    fid(benchmark, inception_file, benchmark / "real", flat)
    assert list(json.loads((tmp_path / "flat.fid-tim.json").read_text())["scores"]) == ["overall"]


def test_clip_score_is_the_cosine_of_each_image_with_its_own_prompt(benchmark):
    features = benchmark / "text.safetensors"
    assert "8 text features" in clip(benchmark, benchmark / "meta.json", features, "--save-stats").stdout
    model, meta = load_clip(str(benchmark / "clip"), torch.device("cpu")), json.loads((benchmark / "meta.json").read_text())
    assert load_file(features).keys() == {f"{e['category']}/{key}" for key, e in meta.items()}
    done = clip(benchmark, features, benchmark / "drawn")
    record = json.loads((benchmark / "drawn.clip.json").read_text())
    cosines: dict[str, list[float]] = {c: [] for c in CATEGORIES}
    for key, entry in meta.items():
        image = Image.open(benchmark / "drawn" / entry["category"] / f"{key}.png").resize((32, 32), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1) / 255
        x = (pixels - torch.tensor(model.mean)[:, None, None]) / torch.tensor(model.std)[:, None, None]
        cosine = model.encode_images(x[None]) @ model.encode_texts([entry["prompt"]]).T
        cosines[entry["category"]].append(100 * cosine.item())
    for category, values in cosines.items():
        assert record["scores"][category] == pytest.approx(np.mean(values), abs=1e-3)
    assert record["scores"]["overall"] == pytest.approx(np.mean(sum(cosines.values(), [])), abs=1e-3)  # noqa: RUF017
    assert np.ptp(sum(cosines.values(), [])) > 1, "pictures and prompts differ"  # noqa: RUF017
    assert record["n"] == 8 and record["missing_images"] == 0 and f"{record['scores']['overall']:.4f}" in done.stdout
    assert list(record["clip"]["weights_sha256"]) == ["model.safetensors"]


def test_text_features_of_the_published_code_are_taken(benchmark, tmp_path):
    """Keyed by `category/key.jpg`, of any length, whatever the suffix of the images; flags without a meaning are accepted."""
    clip(benchmark, benchmark / "meta.json", tmp_path / "ours.safetensors", "--save-stats")
    published = {f"{key}.jpg": 3 * row[None] for key, row in load_file(tmp_path / "ours.safetensors").items()}
    save_file(published, tmp_path / "theirs.safetensors")
    for name, flags in (("ours", ()), ("theirs", ("--device", "cpu", "--clip-type", "ViT-L/14", "--data-type", "mjhq30k"))):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            clip(benchmark, tmp_path / f"{name}.safetensors", benchmark / "drawn", "--out", tmp_path / f"{name}.json", *flags)
        said = " ".join(str(warning.message) for warning in caught)
        assert (
            ("does not say which CLIP made it" in said) == ("--clip-type ViT-L/14 has no effect" in said) == (name == "theirs")
        )
    ours, theirs = (json.loads((tmp_path / f"{name}.json").read_text())["scores"] for name in ("ours", "theirs"))
    assert theirs == pytest.approx(ours, rel=1e-5)
    published["art/art02.jpg"][0, 0] = float("nan")
    save_file(published, tmp_path / "theirs.safetensors")
    wrong = clip(benchmark, tmp_path / "theirs.safetensors", benchmark / "drawn", check=False)
    assert wrong.returncode == 2 and "1 (art/art02.jpg) text features are empty or not finite" in wrong.stderr


def test_missing_pairs_are_named(benchmark, tmp_path):
    clip(benchmark, benchmark / "meta.json", tmp_path / "t.safetensors", "--save-stats")
    shutil.copytree(benchmark / "drawn", tmp_path / "drawn")
    (tmp_path / "drawn" / "art" / "art02.png").unlink()
    short = clip(benchmark, tmp_path / "t.safetensors", tmp_path / "drawn", check=False)
    assert short.returncode == 2 and "1 (art/art02) of 8 prompts have no image" in short.stderr
    with pytest.warns(UserWarning, match=r"1 \(art/art02\) of 8 prompts have no image"):
        clip(benchmark, tmp_path / "t.safetensors", tmp_path / "drawn", "--allow-partial")
    assert json.loads((tmp_path / "drawn.clip.json").read_text())["missing_images"] == 1
    (tmp_path / "drawn" / "art" / "art03.png").rename(tmp_path / "drawn" / "art" / "stranger.png")
    unknown = clip(benchmark, tmp_path / "t.safetensors", tmp_path / "drawn", check=False)
    assert unknown.returncode == 2 and "1 (art/stranger) images have no prompt" in unknown.stderr
    shutil.copy(tmp_path / "drawn" / "art" / "art01.png", tmp_path / "drawn" / "art" / "stranger.png")
    (tmp_path / "drawn" / "art" / "stranger.png").rename(tmp_path / "drawn" / "art" / "art01.jpg")
    twice = clip(benchmark, tmp_path / "t.safetensors", tmp_path / "drawn", check=False)
    assert twice.returncode == 2 and "(art/art01) prompts have several images" in twice.stderr


def test_wrong_files_of_the_clip_score_are_named(benchmark, tmp_path):
    def error(*words):
        done = clip(benchmark, *words, check=False)
        assert done.returncode == 2
        return done.stderr

    assert "--save-stats" in error(tmp_path / "absent.safetensors", benchmark / "drawn")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    assert "meta.json are prompts" in error(benchmark / "meta.json", benchmark / "drawn")
    assert "cut.safetensors is damaged" in error(tmp_path / "cut.safetensors", benchmark / "drawn")
    assert "absent.json is not there" in error(tmp_path / "absent.json", tmp_path / "t.safetensors", "--save-stats")
    (tmp_path / "list.json").write_text("[1, 2]")
    assert "list.json is not in the form" in error(tmp_path / "list.json", tmp_path / "t.safetensors", "--save-stats")
    with torch.no_grad():
        other = save_tiny_clip(tmp_path / "other")
        other.logit_scale += 1
    other.save_pretrained(tmp_path / "other")
    clip(benchmark, benchmark / "meta.json", tmp_path / "t.safetensors", "--save-stats")
    assert "was made with other weights" in error(
        tmp_path / "t.safetensors", benchmark / "drawn", "--clip-model", tmp_path / "other"
    )


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_give_the_clip_score_of_one(benchmark, tmp_path, one_thread):
    clip(benchmark, benchmark / "meta.json", tmp_path / "t.safetensors", "--save-stats")
    for count in (1, 2):
        flags = ("--out", tmp_path / f"{count}.json", "--cache", tmp_path / str(count), "--batch-size", 2)
        clip(benchmark, tmp_path / "t.safetensors", benchmark / "drawn", *flags, processes=count)
    one, two = (json.loads((tmp_path / f"{count}.json").read_text())["scores"] for count in (1, 2))
    assert one == two
