"""Configurations as nobody meant them: whatever a file says, it is used or refused in one line."""

import copy
import math
import random
import signal
import sys

import pytest
import yaml
from helpers.paths import ROOT

from tim.config import ConfigError
from tim.training.command import train_c2i, train_t2i

SHIPPED = sorted((ROOT / "configs").glob("[ct]2i/*.yaml"))
NAN = float("nan")
DIGITS = ROOT / "configs/c2i/digits.yaml"
SMALL = {"hidden_size": 8, "num_heads": 1, "depth": 1, "lora_hidden_size": 4}
TARGETS = [
    "os.system", "subprocess.Popen", "builtins.eval", "canary.Own", "canary", "tim", "tim.", "tim..rng", ".",
    "tim.typed_yaml.os.system", "tim.typed_yaml.yaml", "tim.files.replacing", "tim.training.loop.Path",
    "tim.training.setup.DataLoader", "tim.rng.normals", "tim.absent.Thing", "tim.schedulers.transports.Transport",
    "tim.schedulers.transports.VE_SDE", "tim.schedulers.transports.EDM", "tim.models.radio.Radio",
    "tim.models.t2i.tim_model.TiM", "tim.data.c2i.PackageDataset", "torch.nn.Linear", "torch.nn.Module",
    "torch.optim.Optimizer", "torch.optim.LBFGS", "torch.optim.SGD", "torch.optim.Muon", "torch.optim.lr_scheduler.StepLR",
    "torch.optim.os.system", "heavyball.ForeachSOAP",
]  # fmt: skip
NUMBERS = [0, -1, 1, 3, 2**31, 10**9, 10**18, -(10**18), 10**400, 0.0, -0.5, 1.5, 1e-300, 1e300, NAN, math.inf, -math.inf]
WORDS = ["", " ", "x", "latest", "no", "é\u2028\n", "a\0b", "../../x", "/dev/zero", "a" * 300, "a" * 10**5, "1e-4", "???"]
REFERENCES = [
    "${model}", "${model.transport}", "${absent.key}", "${oc.env:HOME}", "${${model.vae_dir}:x}", "${oc.decode:'[1]'}", "${",
    "${training.max_train_steps}", "$${training}", "-${training.max_train_steps}.${training.max_train_steps}",
]  # fmt: skip
LISTS = [[], [1], [0.9], [0.9, 0.95, 0.99], ["x", None], [NAN, 0.9], [[[]]], list(range(3000))]
DICTS = [{}, {"a": 1}, {1: 2}, {"target": "os.system"}, {"target": "canary.Own", "params": {}}, {"x": {"y": [{}]}}]
VALUES = [None, True, False, b"bytes", *NUMBERS, *WORDS, *REFERENCES, *LISTS, *DICTS]
ADDED = ["x", "base", "params", "target", "ckpt", "fsdp_config", "walltime", "betas", "features_dir"]


def places(tree, path=()):
    """Where the keys of a nested dictionary are."""
    for key, value in tree.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def mutate(tree, draw):
    """Change one thing."""
    *parents, key = draw.choice(list(places(tree)))
    inner = tree
    for name in parents:
        inner = inner[name]
    kind = draw.choice(["delete", "add", "rename", "target", *["replace"] * 6])
    if kind == "delete":
        del inner[key]
    elif kind == "add":
        inner[draw.choice(ADDED)] = draw.choice(VALUES)
    elif kind == "rename":
        inner[draw.choice([f"{key}s", key[:-1], key.upper(), 1])] = inner.pop(key)
    elif kind == "target":
        owner = draw.choice([tree.get("model"), tree.get("training"), tree.get("data")])
        part = draw.choice(["transport", "transition_loss", "network", "optimizer", "dataset"])
        if isinstance(owner, dict) and isinstance(owner.get(part), dict):
            owner[part]["target"] = draw.choice(TARGETS)
    else:
        near = isinstance(inner[key], int | float) and draw.random() < 0.5
        inner[key] = copy.deepcopy(draw.choice(NUMBERS if near else VALUES))


def outcome(run, words):
    """The class of the error that a command ended with, None without; a command that hangs is a failure."""
    signal.alarm(20)
    try:
        run(list(map(str, words)))
    except (ValueError, FileNotFoundError) as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 2000, "one line that can be read"
        return type(error)
    finally:
        signal.alarm(0)
    return None


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A module that a configuration could import."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "canary.py").write_text("from torch.optim import AdamW as Own")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield
    assert "canary" not in sys.modules, "a configuration imported what it named"


def test_mutated_configurations_are_used_or_refused(tmp_path, canary, monkeypatch, capsys):
    """300 of them, digits through all that a training run builds."""
    monkeypatch.chdir(tmp_path)
    trees = {path: yaml.safe_load(path.read_text(encoding="utf-8")) for path in SHIPPED}
    trees[DIGITS]["model"]["network"]["params"] |= SMALL
    config, outcomes = tmp_path / "config.yaml", []
    for seed in range(300):
        draw = random.Random(seed)
        source = draw.choice([DIGITS] * 10 + SHIPPED)
        tree, overrides = copy.deepcopy(trees[source]), []
        if "base" in tree:
            tree["base"] = str(source.parent / tree["base"])
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            if draw.random() < 0.2:
                overrides.append(f"{'.'.join(map(str, draw.choice(list(places(tree)))))}={draw.choice(VALUES)}")
            else:
                mutate(tree, draw)
        config.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
        words = ["--config", config, "--project_dir", tmp_path / "run", "--dry-run" if source == DIGITS else "--print-config"]
        try:
            outcomes.append(outcome(train_t2i if source.parent.name == "t2i" else train_c2i, [*words, *overrides]))
        except Exception as error:
            pytest.fail(f"seed {seed}: {type(error).__name__}: {error}; {overrides} {config.read_text(encoding='utf-8')}")
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "modules"}, "nothing was written"
    assert outcomes.count(None) > 20 and outcomes.count(ConfigError) > 200
