"""What a stranger brings: an objective of their own, and a plain module without anything of TiM but the forward pass."""

import importlib
import inspect
import sys

import pytest
import torch
from helpers.paths import ROOT

from tim.config import ConfigError, Target, load_config, parse_config, read_tree
from tim.files import read_json_lines
from tim.models.c2i.tim_model import TiM
from tim.models.network import NetworkTraits, build_network, traits_of
from tim.training.compilation import compile_blocks
from tim.training.loop import train
from tim.training.tasks import ClassTask

DIGITS = ROOT / "configs/c2i/digits.yaml"
SMALL = ["training.max_train_steps=2", "training.sample_steps=2", "data.dataloader.batch_size=8", "training.dtype=float64"]
MODULE = """
import torch
from torch import nn

from tim.schedulers.transition import TransitionSchedule


class Scaled(TransitionSchedule):
    def __init__(self, transport, scale=1.0, **kwargs):
        super().__init__(transport, **kwargs)
        self.scale = scale

    def time_weight(self, t, r, n_diffusion):
        return self.scale * super().time_weight(t, r, n_diffusion)


class Lonely:
    num_labels = "ten"

    def __init__(self, transport=None):
        pass

    def evaluate(self):
        pass

    __len__ = load = evaluate


class Plain(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.inward, self.outward = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 1, 3, padding=1)
        self.label, self.times = nn.Embedding(10, width), nn.Linear(2, width)

    def forward(self, x, t, r, y):
        c = self.label(y) + self.times(torch.stack([t, r], dim=-1).to(self.times.weight.dtype))
        return self.outward(torch.tanh(self.inward(x) + c[:, :, None, None]))
"""


@pytest.fixture
def strange(tmp_path, monkeypatch):
    """The module above, importable and allowed as `strange`."""
    monkeypatch.setenv("TIM_ALLOW_CODE", "strange")
    (tmp_path / "strange.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "strange", raising=False)
    yield importlib.import_module("strange")
    sys.modules.pop("strange", None)


def first_loss(project, config) -> float:
    train(config, project, 1, ClassTask)
    return read_json_lines(project / "log.jsonl")[0]["weighted_loss"]


def test_an_objective_of_ones_own_trains(tmp_path, strange):
    small = [*SMALL, "model.network.params.hidden_size=24", "model.network.params.depth=1", "training.sample_steps=null"]
    own = ["model.transition_loss.target=strange.Scaled", "model.transition_loss.scale=2"]
    published = first_loss(tmp_path / "published", load_config(DIGITS, small))
    assert first_loss(tmp_path / "own", load_config(DIGITS, [*small, *own])) == 2 * published


def test_mistakes_in_an_objective_name_the_key(strange):
    own = "model.transition_loss.target=strange.Scaled"
    with pytest.raises(ConfigError, match=r"model\.transition_loss\.scal; did you mean 'scale'"):
        load_config(DIGITS, [own, "model.transition_loss.scal=2"])
    with pytest.raises(ConfigError, match=r"diffusion_ratio=2.0"):
        load_config(DIGITS, [own, "model.transition_loss.diffusion_ratio=2.0"])
    with pytest.raises(ConfigError, match=r"model\.transition_loss\.target='strange.Absent' cannot be imported"):
        load_config(DIGITS, ["model.transition_loss.target=strange.Absent"])


def test_what_lacks_a_part_is_named_before_anything_runs(tmp_path, strange):
    with pytest.raises(ConfigError, match=r"model\.transition_loss\.target='strange\.Lonely' has no transport"):
        parse_config(
            {**(tree := read_tree(DIGITS)), "model": {**tree["model"], "transition_loss": {"target": "strange.Lonely"}}}
        )
    config = load_config(DIGITS, [*SMALL, "data.data_type=null", "data.dataset={name: null, target: strange.Lonely}"])
    with pytest.raises(ValueError, match=r"data\.dataset\.target='strange\.Lonely' has no num_labels"):
        train(config, tmp_path / "run", 1, ClassTask)
    assert not (tmp_path / "run").exists()


def plain_config(*overrides):
    tree = read_tree(DIGITS, [*SMALL, *overrides])
    tree["model"]["network"] = {"target": "strange.Plain", "params": {"width": 4}}
    return parse_config(tree)


@pytest.mark.parametrize("derivative", ["dde", "jvp"])
def test_a_plain_module_trains(tmp_path, strange, derivative):
    config = plain_config(f"model.transition_loss.derivative_type={derivative}")
    train(config, tmp_path / "run", 1, ClassTask)
    assert len(read_json_lines(tmp_path / "run" / "log.jsonl")) == 2
    assert (tmp_path / "run" / "samples" / "step-0000002.png").is_file()
    assert (tmp_path / "run" / "checkpoints" / "step-0000002" / "ema.safetensors").is_file()


def test_a_plain_module_is_refused_for_repa_alone(tmp_path, strange):
    config = plain_config("model.enc_dir=radio.pt")
    with pytest.raises(ValueError, match=r"REPA projector"):
        train(config, tmp_path / "run", 1, ClassTask)


def test_a_plain_module_is_compiled_whole(strange):
    network = strange.Plain()
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.8]), torch.tensor([1, 2])
    before = network(x, t, t / 2, y)
    compile_blocks(network, backend="aot_eager")
    torch.testing.assert_close(network(x, t, t / 2, y=y), before)
    assert list(inspect.signature(network.forward).parameters) == ["x", "t", "r", "y"]
    torch._dynamo.reset()


def test_traits_are_those_of_the_config(strange):
    tim = Target("tim.models.c2i.tim_model.TiM", {"hidden_size": 8, "num_heads": 1, "depth": 1, "encoder_depth": 1})
    assert traits_of(tim) == traits_of(build_network(tim))
    assert traits_of(tim).num_classes == inspect.signature(TiM).parameters["num_classes"].default == 1000
    assert traits_of(Target("strange.Plain")) == traits_of(strange.Plain()) == NetworkTraits()
    with pytest.raises(ValueError, match=r"no torch\.nn\.Module"):
        build_network(Target("strange.Scaled", {"transport": None}))
