"""The judge of the quickstart."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
from helpers.commands import command

from tim.data.c2i import PackageDataset
from tim.demo.digits import DigitJudge
from tim.files import run_record
from tim.images import save_png, to_uint8


@pytest.fixture(scope="module")
def judge():
    return DigitJudge()


def test_the_judge_knows_digits_and_ranks_damage(judge):
    assert judge.held_out_accuracy > 0.97
    data = PackageDataset("digits")
    labels = torch.from_numpy(np.asarray(data.labels))
    whole = judge.measure(data.images, labels)
    assert whole["frechet_distance"] == pytest.approx(0, abs=1e-3) and whole["accuracy"] > 0.98
    noise = torch.randn(data.images.shape)
    distances = [judge.measure(data.images + s * noise, labels)["frechet_distance"] for s in (0.0, 0.2, 0.5)]
    assert distances[0] < distances[1] < distances[2]
    assert judge.measure(data.images, labels.roll(1))["accuracy"] < 0.3


def write_record(path, nfe=1, **settings):
    """The record of a finished run of 40 images."""
    settings = {"num_fid_samples": 40, "weights_sha256": "x", "num_steps": nfe, **settings}
    path.write_text(json.dumps({"complete": True, "nfe": nfe, "speed": None, "settings": settings}))


def test_report_reads_sampling_folders(tmp_path):
    data = PackageDataset("digits")
    order = np.argsort(data.labels, kind="stable").reshape(-1)
    by_class = [order[data.labels[order] == c] for c in range(10)]
    for nfe in (1, 4):
        folder = tmp_path / "runs" / f"run{nfe}"
        folder.mkdir(parents=True)
        for k in range(40):
            save_png(folder / f"{k:06d}.png", to_uint8(data.images[by_class[k % 10][k // 10]][None])[0])
        write_record(folder / "run.json" if nfe == 1 else run_record(folder), nfe)
    foreign = {"pictures": ("000000.png", 16, {}), "drawn at random": ("000000.png", 8, {"class_labels": "random"}),
               "captions": ("00000-00.png", 8, {}), "of others": ("000000.png", 8, None)}  # fmt: skip
    for name, (image, side, settings) in foreign.items():
        (tmp_path / "runs" / name).mkdir()
        save_png(tmp_path / "runs" / name / image, np.zeros((side, side, 3), np.uint8))
        if settings is None:
            (tmp_path / "runs" / name / "run.json").write_text("[1]")
        else:
            write_record(run_record(tmp_path / "runs" / name), **settings)
    done = command("projects/evaluate/evaluate_digits.py", "--samples", tmp_path / "runs", "--out", tmp_path / "out")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(metrics["nfe"]) == ["1", "4"] and metrics["nfe"]["4"]["accuracy"] > 0.95
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"metrics.json", "samples.png", "quality.png"}
    assert "NFE" in done.stdout
    for name in ("pictures", "drawn at random", "captions"):
        assert f"runs/{name} is left out" in done.stderr
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "runs/run4/000039.png").unlink()
    short = command(
        "projects/evaluate/evaluate_digits.py", "--samples", tmp_path / "runs", "--out", tmp_path / "o", check=False
    )
    assert short.returncode == 2 and "run4 holds 39 of the 40 images that sampling has drawn" in short.stderr
    assert not (tmp_path / "o").exists() and len(before) == 1 + len(list(tmp_path.rglob("*")))
    empty = command("projects/evaluate/evaluate_digits.py", "--samples", tmp_path / "out", "--out", tmp_path, check=False)
    assert empty.returncode == 2 and "no finished sampling run" in empty.stderr


@pytest.mark.parametrize("package", ["sklearn.datasets", "matplotlib"])
def test_a_missing_package_is_named(package, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("tim.demo.report.find_spec", lambda name: None if name == package else find(name))
    monkeypatch.setitem(sys.modules, package, None)
    words = ["projects/evaluate/evaluate_digits.py", "--samples", tmp_path, "--out", tmp_path / "out"]
    done = command(*words, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()
    assert {"sklearn.datasets": "need scikit-learn: pip install", "matplotlib": "need matplotlib: pip install"}[
        package
    ] in done.stderr
