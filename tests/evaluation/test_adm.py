"""The ADM suite as users run it: against torch-fidelity, every form of reference, two processes, bad input."""

import json

import numpy as np
import pytest
import torch
from accelerate import PartialState
from helpers.commands import command
from helpers.images import save_photographs
from PIL import Image

from tim.evaluation import adm
from tim.evaluation.adm import STATISTICS, adm_extractor, read_side
from tim.evaluation.extract import Extraction, FeatureExtractor
from tim.evaluation.inception import load_inception
from tim.evaluation.inputs import as_uint8_tensor
from tim.evaluation.metrics import frechet_distance, statistics

pytestmark = pytest.mark.filterwarnings("ignore:.*give a covariance of rank", "ignore:inception score")
EVALUATOR = "projects/evaluate/adm_evaluator.py"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adm")
    save_photographs(root / "real", 14, seed=0)
    save_photographs(root / "fake", 12, seed=1)
    return root


def evaluate(folders, inception_file, reference, samples="fake", *flags, **kwargs):
    words = [EVALUATOR, folders / reference, folders / samples, "--inception", inception_file, "--batch-size", 6]
    return command(*words, "--cache", folders / "cache", *flags, **kwargs)


def result(folders, name="fake.adm.json"):
    return json.loads((folders / name).read_text())


@pytest.fixture(scope="module")
def features(folders, inception_file):
    """Features of both folders straight from the network."""
    network = load_inception(inception_file, torch.device("cpu"))
    found = {}
    for name in ("real", "fake"):
        files = sorted((folders / name).iterdir())
        pixels = torch.from_numpy(np.stack([np.asarray(Image.open(p)).transpose(2, 0, 1) for p in files]))
        with torch.inference_mode():
            found[name] = {k: v.numpy() for k, v in network(pixels).items()}
    return found


@pytest.fixture(scope="module")
def scored(folders, inception_file):
    """The result file of a run on two folders, and what was printed."""
    with pytest.warns(UserWarning, match="12 images for 2048 features give a covariance of rank 11"):
        done = evaluate(folders, inception_file, "real")
    return result(folders), done.stdout


@pytest.mark.slow
def test_scores_equal_torch_fidelity_with_the_same_weights(folders, inception_file, scored):
    """Its own reading of the images, network and metrics.

    Its Fréchet distance adds up the roots of rounding noise where covariances are singular, as those of so few images
    are; here the distance of its features comes from the singular values of the centred features themselves.
    """
    from torch_fidelity import metric_isc, metric_prc, utils

    found, printed = scored
    flags = {"cuda": False, "cache": False, "batch_size": 6, "verbose": False, "samples_shuffle": False}
    network = utils.create_feature_extractor(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_file), **flags
    )
    fake, real = (
        utils.extract_featuresdict_from_input_id_cached(
            1, network, input1=str(folders / name), feature_extractor="inception-v3-compat", **flags
        )
        for name in ("fake", "real")
    )
    scores = found["scores"]
    isc = metric_isc.isc_features_to_metric(fake["logits_unbiased"], splits=1, shuffle=False)
    assert scores["inception_score"] == pytest.approx(isc["inception_score_mean"], rel=1e-6)
    prc = metric_prc.prc_features_to_metric(fake["2048"], real["2048"], verbose=False)
    assert (scores["precision"], scores["recall"]) == pytest.approx((prc["precision"], prc["recall"]), rel=1e-6)
    a, b = ((u["2048"].double() - u["2048"].double().mean(0)) / (len(u["2048"]) - 1) ** 0.5 for u in (fake, real))
    shift = (fake["2048"].double().mean(0) - real["2048"].double().mean(0)).square().sum()
    fid = shift + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
    assert scores["fid"] == pytest.approx(fid.item(), rel=1e-6)
    assert found["n"] == 12 and found["reference"]["n"] == 14 and found["protocol"] == "adm"
    assert len(found["weights_sha256"]) == 64 and "torch-fidelity" in found["versions"]
    for value in ("FID", f"{scores['fid']:.4f}", f"{scores['inception_score']:.4f}", "12"):
        assert value in printed


@pytest.mark.slow
def test_distances_are_those_of_the_tapped_activations(scored, features):
    for score, name in (("fid", "pool3"), ("sfid", "spatial")):
        want = frechet_distance(*statistics(features["fake"][name]), *statistics(features["real"][name]))
        assert scored[0]["scores"][score] == pytest.approx(want, rel=1e-6)


def test_every_published_form_of_reference_says_the_same(folders, inception_file, features):
    """Images and statistics, statistics alone, those of FID alone, images alone, compressed; a folder."""
    extractor = adm_extractor(load_inception(inception_file, torch.device("cpu")))
    how = Extraction(extractor, PartialState(), cache=folders / "cache", batch_size=6)
    images = np.stack([np.asarray(Image.open(p)) for p in sorted((folders / "real").iterdir())])
    stats = {}
    for name, (mu, sigma) in STATISTICS.items():
        stats[mu], stats[sigma] = statistics(features["real"][name])
    forms = {
        "both.npz": (np.savez, {"arr_0": images, **stats}),
        "images.npz": (np.savez, {"arr_0": images}),
        "packed.npz": (np.savez_compressed, {"arr_0": images}),
        "statistics.npz": (np.savez, stats),
        "fid.npz": (np.savez, {k: stats[k] for k in ("mu", "sigma")}),
    }
    for name, (save, arrays) in forms.items():
        save(folders / name, **arrays)
    for name in ("real", *forms):
        side = read_side(folders / name, how, "reference")
        assert list(side.statistics) == (["pool3"] if name == "fid.npz" else ["pool3", "spatial"])
        assert (side.features is None) == (name in ("statistics.npz", "fid.npz"))
        for feature, found in side.statistics.items():
            np.testing.assert_allclose(found.mean, features["real"][feature].mean(0), rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(found.cov, stats[STATISTICS[feature][1]], rtol=1e-3, atol=1e-6)
        if side.features is not None:
            np.testing.assert_allclose(side.features.array("probs"), features["real"]["probs"], rtol=1e-4, atol=1e-12)


@pytest.mark.slow
def test_what_the_reference_cannot_give_is_left_out_with_a_warning(folders, inception_file, features, scored):
    np.savez(folders / "mu.npz", **dict(zip(("mu", "sigma"), statistics(features["real"]["pool3"]), strict=True)))
    arrays = np.stack([np.asarray(Image.open(p)) for p in sorted((folders / "fake").iterdir())])
    np.savez(folders / "samples.npz", arrays)
    with pytest.warns(UserWarning) as said:
        done = evaluate(folders, inception_file, "mu.npz", "samples.npz")
    scores, whole = result(folders, "samples.npz.adm.json")["scores"], scored[0]["scores"]
    assert {k for k, v in scores.items() if v is None} == {"sfid", "precision", "recall"}
    assert scores["fid"] == pytest.approx(whole["fid"], rel=1e-6)
    assert scores["inception_score"] == pytest.approx(whole["inception_score"], rel=1e-6)
    said = " ".join(str(w.message) for w in said)
    assert "no sFID" in said and "no precision and recall" in said and "n/a" in done.stdout


def test_what_few_images_cannot_give_is_left_out(folders, tmp_path, monkeypatch):
    """Three images have no third neighbour, one has no covariance; whatever fails, the other scores stand."""

    def network(x):
        pool3 = x.float().flatten(1)[:, :6]
        return {"pool3": pool3, "spatial": pool3[:, :4], "probs": pool3.softmax(1)}

    identity = dict.fromkeys(("weights_sha256", "resize", "precision"), "")
    how = Extraction(
        FeatureExtractor("tiny", identity, as_uint8_tensor, network), PartialState(), tmp_path / "cache", workers=0
    )

    def scores(name):
        with pytest.warns(UserWarning) as caught:
            found = adm.evaluate(folders / "real", name, how)
        missing = {key for key, value in found["scores"].items() if value is None}
        return missing, " ".join(str(w.message) for w in caught), found

    three = save_photographs(tmp_path / "three", 3, seed=1)
    missing, said, found = scores(three)
    assert missing == {"precision", "recall"} and found["failed"] == {} and "n/a" in adm.table(found)
    assert "no precision and recall: a side has 3 images, 3 neighbours need more" in said
    one = save_photographs(tmp_path / "one", 1, seed=1)
    missing, said, found = scores(one)
    assert missing == {"fid", "sfid", "precision", "recall"} and "no FID: " in said and "one holds a single image" in said

    def exhausted(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(adm, "precision_recall", exhausted)
    missing, _, found = scores(folders / "fake")
    assert missing == {"precision", "recall"} and found["failed"] == {"precision and recall": "CUDA out of memory"}


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_give_the_numbers_of_one(folders, inception_file, one_thread):
    evaluate(folders, inception_file, "real", "fake", "--cache", folders / "one")
    one = result(folders)["scores"]
    done = evaluate(folders, inception_file, "real", "fake", "--cache", folders / "two", processes=2)
    assert result(folders)["scores"] == one
    assert "warning: FID: 12 images for 2048 features" in done.stderr


def test_bad_input_is_named(folders, inception_file, tmp_path):
    def error(reference, samples="fake", *flags):
        done = evaluate(folders, inception_file, reference, samples, *flags, check=False)
        assert done.returncode == 2, done.stderr
        return done.stderr

    assert "absent is neither a folder" in error("absent")
    (folders / "empty").mkdir()
    assert "empty holds no image" in error("real", "empty")
    np.savez(folders / "nothing.npz", x=np.zeros(3))
    assert "neither images (arr_0) nor statistics" in error("nothing.npz")
    np.savez(folders / "narrow.npz", mu=np.zeros(768), sigma=np.eye(768), mu_s=np.zeros(2023), sigma_s=np.eye(2023))
    with pytest.warns(UserWarning, match="no precision and recall"):
        said = error("narrow.npz")
    assert f"FID: {folders / 'narrow.npz'} (mu and sigma): " in said and "2048 features against 768" in said
    assert result(folders)["scores"]["fid"] is None and result(folders)["scores"]["sfid"] > 0, "the others are kept"
    np.savez(folders / "torn.npz", mu=np.zeros(2048), sigma=np.eye(5))
    assert "no mean and covariance: (2048,) and (5, 5)" in error("torn.npz")
    np.savez(folders / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    assert "stats.npz holds no images" in error("real", "stats.npz")
    assert "--batch-size must be >= 1" in error("real", "fake", "--batch-size", 0)
    (tmp_path / "other.pth").write_bytes(b"no weights")
    assert "other.pth" in error("real", "fake", "--inception", tmp_path / "other.pth")
    assert "tools/download_benchmarks.sh --only inception" in error("real", "fake", "--inception", tmp_path / "absent.pth")
