"""Latent files of other makers: what training refuses by name, the check of a folder names in the same words."""

import json

import numpy as np
import pytest
import torch
from helpers.paths import ROOT
from safetensors.torch import save_file

from tim.config import Data, Dataset, load_config
from tim.data.features import read_features
from tim.data.latents import RECORD, check_latents, classes_identity
from tim.data.registry import build_c2i_dataset
from tim.training.tasks import ClassTask

GOOD = torch.zeros(2, 1, 8, 8)
BAD = {
    "float label": (GOOD, torch.tensor(1.0), r"label is \(\) F32 instead of one integer"),
    "int8 label": (GOOD, torch.tensor(1, dtype=torch.int8), r"label is \(\) .*int8 instead of one integer"),
    "bool label": (GOOD, torch.tensor(True), r"label is \(\) .*bool instead of one integer"),
    "labels": (GOOD, torch.tensor([1, 1]), r"label is \(2,\) I64 instead of one integer"),
    "negative label": (GOOD, torch.tensor(-1), "label -1 is negative"),
    "not a number": (GOOD + float("nan"), torch.tensor(1), "holds non-finite values"),
    "half infinite": ((GOOD + float("inf")).half(), torch.tensor(1), "holds non-finite values"),
    "whole numbers": (GOOD.int(), torch.tensor(1), r"latent is \(2, 1, 8, 8\) I32 instead of \(2, C, h, w\) of floats"),
    "no mirror": (GOOD[:1], torch.tensor(1), r"latent is \(1, 1, 8, 8\) F32 instead of"),
    "nothing": (GOOD[..., :0], torch.tensor(1), r"latent is \(2, 1, 8, 0\) F32 instead of"),
}


@pytest.fixture
def folder(tmp_path):
    """Two classes of two latents each."""
    for number, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        for k in range(2):
            save_file({"latent": GOOD, "label": torch.tensor(number)}, tmp_path / name / f"{k}.safetensors")
    return tmp_path


def dataset(folder, num_classes=None):
    return build_c2i_dataset(Data("latent", Dataset(latent_dir=str(folder))), num_classes=num_classes)


@pytest.mark.parametrize("case", BAD)
def test_training_refuses_what_the_check_names(folder, case):
    latent, label, match = BAD[case]
    save_file({"latent": latent.contiguous(), "label": label}, folder / "b" / "1.safetensors")
    with pytest.raises(ValueError, match=rf"b/1\.safetensors is not a latent file: {match}"):
        dataset(folder).load(3, np.random.default_rng(0))
    (problem,) = check_latents(folder).problems
    with pytest.raises(ValueError, match=rf"b/1\.safetensors: {match}"):
        raise ValueError(problem)


def test_a_label_that_is_no_class_of_the_run_is_one_unreadable_sample(folder):
    """Not the end of the run at the step that draws it."""
    save_file({"latent": GOOD, "label": torch.tensor(10)}, folder / "b" / "1.safetensors")
    options = ["data.data_type=latent", f"data.dataset={{latent_dir: {folder}}}"]
    task = ClassTask(load_config(ROOT / "configs/c2i/digits.yaml", options), None, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"b/1\.safetensors .*label 10, the run has 10 classes"):
        task.dataset.load(3, np.random.default_rng(0))
    assert task.dataset.load(2, np.random.default_rng(0))["label"] == 1


def test_labels_in_another_order_than_the_folder_says_are_refused(folder):
    (folder / RECORD).write_text(json.dumps(classes_identity(["a", "b"])), encoding="utf-8")
    save_file({"latent": GOOD, "label": torch.tensor(0)}, folder / "b" / "1.safetensors")
    samples = dataset(folder)
    assert [samples.load(k, np.random.default_rng(0))["label"] for k in range(3)] == [0, 0, 1]
    with pytest.raises(ValueError, match=r"b/1\.safetensors .*label 0 instead of 1, the number of its class folder"):
        samples.load(3, np.random.default_rng(0))
    assert "b: label 0 instead of 1, the number of the folder" in check_latents(folder).text()
    (folder / "b").rename(folder / "0")
    match = rf"labels in .* are those of 2 other class folders \({RECORD}\) than the 2 that are there now"
    with pytest.raises(ValueError, match=match):
        dataset(folder)
    with pytest.raises(ValueError, match=match):
        raise ValueError(check_latents(folder).text())
    (folder / RECORD).unlink()
    assert dataset(folder).load(0, np.random.default_rng(0))["label"] == 1, "labels as they are"


def test_features_that_are_not_finite_are_refused(tmp_path):
    for name, features in {"a": torch.full((2, 3, 4), float("nan")), "b": torch.ones(2, 3, 4, dtype=torch.int32)}.items():
        save_file({"features": features}, tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name} is not a file of features: .*(non-finite|I32 instead of)"):
            read_features(tmp_path / name, (2, 3, 4), 0)
