"""Data types: the schema's words are the registry's, and a dataset of one's own needs no more than the trainer asks for."""

from typing import get_args, get_type_hints

import pytest
import torch

from tim.config import Data, Dataset
from tim.data.registry import CLASS_CONDITIONAL, TEXT_TO_IMAGE, build_c2i_dataset, build_t2i_dataset
from tim.data.replacement import ReplacingDataset
from tim.data.sampler import SampleKey


class Numbers:
    """Sample k is an image of k; those divisible by three cannot be read."""

    num_labels = 2

    def __init__(self, count=9):
        self.count = count

    def __len__(self):
        return self.count

    def load(self, index, g):
        if index % 3 == 0:
            raise OSError(f"number {index} is gone")
        return {"image": torch.full((1, 4, 4), float(index)), "label": index % 2}


@pytest.fixture
def allowed(monkeypatch):
    monkeypatch.setenv("TIM_ALLOW_CODE", __name__)


def own(**params):
    return Data(dataset=Dataset(target=f"{__name__}.Numbers", params=params))


def test_the_schema_and_the_registry_know_the_same_types():
    words = get_args(get_args(get_type_hints(Data)["data_type"])[0])
    assert list(words) == [*CLASS_CONDITIONAL, *TEXT_TO_IMAGE]


def test_a_dataset_of_ones_own(allowed):
    dataset = build_c2i_dataset(own(count=5))
    assert isinstance(dataset, Numbers) and len(dataset) == 5
    with pytest.raises(ValueError, match="is not text-to-image; use image_ms"):
        build_t2i_dataset(own(), factor=1)


def test_without_peers_any_sample_stands_in(allowed):
    read = ReplacingDataset(build_c2i_dataset(own()), seed=0)
    seen = {int(read[SampleKey(step, 0, 3, 1)]["index"]) for step in range(60)}
    assert seen == {1, 2, 4, 5, 7, 8}
    assert (
        read[SampleKey(0, 0, 3, 1)]["problem"] == "sample 3: number 3 is gone" and read[SampleKey(0, 0, 4, 1)]["problem"] == ""
    )


@pytest.mark.parametrize(
    "kind,keys,missing",
    [
        ("latent", {"latent_dir": "x"}, "image_dir and image_size"),
        ("latent_tar", {"shard_dir": "x"}, "image_size"),
    ],
)
def test_repa_names_the_keys_it_needs(kind, keys, missing):
    with pytest.raises(ValueError, match=rf"REPA reads the images beside the latents: set data\.dataset\.{missing}$"):
        build_c2i_dataset(Data(kind, Dataset(**keys)), with_image=True)
