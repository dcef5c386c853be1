"""The judge of the quickstart."""

import json

import numpy as np
import pytest
import torch
from helpers.commands import command

from tim.data.c2i import PackageDataset
from tim.demo.digits import DigitJudge
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


def test_report_reads_sampling_folders(tmp_path):
    data = PackageDataset("digits")
    order = np.argsort(data.labels, kind="stable").reshape(-1)
    by_class = [order[data.labels[order] == c] for c in range(10)]
    for nfe in (1, 4):
        folder = tmp_path / "runs" / f"run{nfe}"
        folder.mkdir(parents=True)
        for k in range(40):
            save_png(folder / f"{k:06d}.png", to_uint8(data.images[by_class[k % 10][k // 10]][None])[0])
        record = {"complete": True, "nfe": nfe, "speed": None, "settings": {"num_fid_samples": 40, "weights_sha256": "x"}}
        (folder / "run.json").write_text(json.dumps(record))
    done = command("projects/evaluate/evaluate_digits.py", "--samples", tmp_path / "runs", "--out", tmp_path / "out")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(metrics["nfe"]) == ["1", "4"] and metrics["nfe"]["4"]["accuracy"] > 0.95
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"metrics.json", "samples.png", "quality.png"}
    assert "NFE" in done.stdout
    empty = command("projects/evaluate/evaluate_digits.py", "--samples", tmp_path / "out", "--out", tmp_path, check=False)
    assert empty.returncode == 2 and "no finished sampling run" in empty.stderr
