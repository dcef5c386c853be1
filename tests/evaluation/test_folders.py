"""The small-scale check of two folders: ranking of damage, rows, bad input, the same numbers on two processes."""

import itertools
import json

import numpy as np
import pytest
import torch
from helpers.commands import command
from helpers.images import photographs

from tim.data.c2i import PackageDataset
from tim.demo.retrieval import image_features
from tim.evaluation.inception import load_inception
from tim.evaluation.metrics import frechet_distance, statistics
from tim.images import save_png, to_uint8

pytestmark = pytest.mark.filterwarnings("ignore:.*give a covariance of rank")
EVALUATOR = "projects/evaluate/evaluate_folder.py"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    pixels, g = to_uint8(PackageDataset("digits").images[:400]), np.random.default_rng(0)
    for name, noise in (("real", 0), ("run/clean", 0), ("run/weak", 40), ("run/strong", 90)):
        (root / name).mkdir(parents=True)
        own = pixels[0 if name == "real" else 1 :: 2]  # neighbours, because digits go by writer
        for k in range(200):
            picture = own[k] + g.normal(0, noise, own[k].shape)
            save_png(root / name / f"{k:03d}.png", np.clip(picture, 0, 255).astype(np.uint8))
    return root


def evaluate(digits, *words, **kwargs):
    done = command(EVALUATOR, digits / "real", *words, "--cache", digits / "cache", "--out", digits / "out.json", **kwargs)
    return done, json.loads((digits / "out.json").read_text()) if done.returncode == 0 else None


def test_digits_features_rank_damage_and_are_named_beside_the_numbers(digits):
    run = digits / "run"
    done, found = evaluate(digits, run / "clean", run / "weak", run / "strong", "--features", "digits")
    rows = found["scores"]
    distances = [rows[name]["frechet_distance"] for name in ("clean", "weak", "strong")]
    kernels = [rows[name]["kernel_distance"] for name in ("clean", "weak", "strong")]
    assert distances == sorted(distances) and kernels == sorted(kernels)
    assert rows["clean"]["precision"] > 0.9 > rows["strong"]["precision"]
    assert done.stdout.startswith("features: hidden layer (64) of a classifier of scikit-learn's digits\n")
    assert found["reference"]["n"] == 200 and rows["weak"]["n"] == 200


def test_patterns_make_rows(digits):
    _, found = evaluate(digits, digits / "run", "--features", "digits", "--include", "clean/*", "*/00[0-4]*")
    assert list(found["scores"]) == ["clean/*", "*/00[0-4]*"]
    assert [row["n"] for row in found["scores"].values()] == [200, 15]
    done, _ = evaluate(digits, digits / "run", "--features", "digits", "--include", "absent*", check=False)
    assert done.returncode == 2 and "matches 'absent*'" in done.stderr


def test_efficientnet_sees_pictures_of_any_size(tmp_path):
    """As `image_features` sees them, whatever the shapes in the folder."""
    sets = {"real": [photographs(6, 40, 0)], "fake": [photographs(4, 40, 1), [p[:24] for p in photographs(3, 40, 2)]]}
    features = {}
    for name, groups in sets.items():
        (tmp_path / name).mkdir()
        for k, picture in enumerate(itertools.chain(*groups)):
            save_png(tmp_path / name / f"{k}.png", picture)
        features[name] = np.concatenate([image_features(np.stack(group)) for group in groups])
    words = [EVALUATOR, tmp_path / "real", tmp_path / "fake", "--features", "efficientnet", "--cache", tmp_path / "cache"]
    with pytest.warns(UserWarning, match="EfficientNet-lite0.*7 images for 1280 features"):
        command(*words)
    (row,) = json.loads((tmp_path / "fake.folder-efficientnet.json").read_text())["scores"].values()
    want = frechet_distance(*statistics(features["fake"]), *statistics(features["real"]))
    assert row["frechet_distance"] == pytest.approx(want, rel=1e-5) and want > 1


def test_inception_features_are_those_of_the_network(tmp_path, inception_file):
    """Pictures of several sizes, each resized as the graph does."""
    network = load_inception(inception_file, torch.device("cpu"))
    sets = {"real": photographs(5, 40, 0), "fake": [*photographs(3, 40, 1), *photographs(2, 24, 2)]}
    pool3 = {}
    for name, pictures in sets.items():
        (tmp_path / name).mkdir()
        for k, picture in enumerate(pictures):
            save_png(tmp_path / name / f"{k}.png", picture)
        rows = [network(torch.from_numpy(p.transpose(2, 0, 1).copy())[None])["pool3"] for p in pictures]
        pool3[name] = torch.cat(rows).numpy()
    words = [EVALUATOR, tmp_path / "real", tmp_path / "fake", "--features", "inception", "--inception", inception_file]
    with pytest.warns(UserWarning, match="rank 4 at most"):
        command(*words, "--cache", tmp_path / "cache", "--out", tmp_path / "out.json")
    (row,) = json.loads((tmp_path / "out.json").read_text())["scores"].values()
    want = frechet_distance(*statistics(pool3["fake"]), *statistics(pool3["real"]))
    assert row["frechet_distance"] == pytest.approx(want, rel=1e-5) and want > 1


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_give_the_numbers_of_one(digits, tmp_path, one_thread):
    """Also where one of them comes upon a picture that cannot be read: the other folders are finished together."""
    for k in range(200):
        save_png(tmp_path / f"{k:03d}.png", np.zeros((8, 8, 3), dtype=np.uint8))
    (tmp_path / "199.png").write_bytes(b"")
    words = (tmp_path, digits / "run/weak", "--features", "digits")
    for name, processes in (("one", 1), ("two", 2)):
        flags = ("--cache", digits / name, "--out", digits / f"{name}.json")
        done = command(EVALUATOR, digits / "real", *words, *flags, processes=processes, check=False)
        assert done.returncode and "199.png cannot be read as an image: " in done.stderr
    one, two = (json.loads((digits / f"{name}.json").read_text()) for name in ("one", "two"))
    assert list(one["scores"]) == list(two["scores"]) == ["weak"]
    for name, row in one["scores"].items():
        for key in ("frechet_distance", "kernel_distance", "precision", "recall", "n"):
            assert two["scores"][name][key] == pytest.approx(row[key], rel=1e-12)


def test_wrong_pictures_are_named_and_what_is_finished_is_kept(digits, tmp_path):
    """One folder cannot be read, one has too few images for precision and recall, one is fine."""
    for name, count, height in (("large", 1, 9), ("few", 3, 8)):
        (tmp_path / name).mkdir()
        for k in range(count):
            save_png(tmp_path / name / f"{k}.png", np.full((height, 8, 3), 60 * k, dtype=np.uint8))
    folders = (tmp_path / "large", tmp_path / "few", digits / "run/weak")
    with pytest.warns(UserWarning, match="few: .* 3 images for 64 features"):
        done, _ = evaluate(digits, *folders, "--features", "digits", check=False)
    assert done.returncode == 2 and "8x8 images, got 8x9" in done.stderr and "large/0.png" in done.stderr
    assert "few: precision and recall: " in done.stderr and "out.json" in done.stderr
    rows = json.loads((digits / "out.json").read_text())["scores"]
    assert list(rows) == ["few", "weak"] and rows["few"]["precision"] is None and rows["few"]["frechet_distance"] > 0
    assert rows["weak"]["precision"] > 0 and "n/a" in done.stdout
    done, _ = evaluate(digits, tmp_path / "large", "--features", "digits", "--out", tmp_path / "none.json", check=False)
    assert done.returncode == 2 and not (tmp_path / "none.json").exists(), "there is nothing to write"
