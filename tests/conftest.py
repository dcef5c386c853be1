"""Fixtures the tests share."""

import os

import pytest
import torch
from helpers.commands import reset_accelerate
from helpers.networks import TINY, load_golden, randomize

os.environ["HF_HUB_OFFLINE"] = "1"  # a missing folder is an error at once, not a search on a hub


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first: at the end of a run in several processes no long file is left to one of them."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name long texts by their length: whole they would fill the screen."""
    return f"{argname}-of-{len(val)}" if isinstance(val, str | bytes) and len(val) > 120 else None


@pytest.fixture(autouse=True)
def fresh_state():
    """Seed torch; let each test choose its own mixed precision."""
    torch.manual_seed(0)
    yield
    reset_accelerate()


@pytest.fixture
def one_thread():
    """As many threads as `command` gives each of several processes: sums are split in the same way, to the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["c2i_tiny", "t2i_tiny"])
def golden(request):
    return load_golden(request.param)


@pytest.fixture
def tiny_c2i():
    from tim.models.c2i.tim_model import TiM

    return randomize(TiM(num_classes=10, **TINY))


@pytest.fixture
def tiny_t2i():
    from tim.models.t2i.tim_model import TiM

    return randomize(TiM(cap_feat_dim=20, **TINY))


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """A .pth with seeded random weights of the real Inception."""
    from helpers.inception_weights import save_random_inception

    return save_random_inception(tmp_path_factory.mktemp("inception") / "inception.pth")
