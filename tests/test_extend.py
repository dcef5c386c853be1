"""docs/extend.md as a reader follows it: its files in a folder of their own, trained and sampled from there."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from helpers.paths import ROOT

from tim import rng
from tim.config import ConfigError, load_config

TRAINER, SAMPLER = (str(ROOT / "projects" / name) for name in ("train/trainer_c2i.py", "sample/sample_c2i_ddp.py"))
SHORT = [
    "training.max_train_steps=4",
    "training.checkpointing_steps=4",
    "training.sample_steps=4",
    "data.dataloader.batch_size=16",
]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with the files of the page, each named by the first line of its block."""
    folder = tmp_path_factory.mktemp("my-project")
    blocks = re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", (ROOT / "docs/extend.md").read_text(encoding="utf-8"), re.S)
    for name, text in blocks:
        (folder / name).write_text(text, encoding="utf-8")
    assert sorted(p.suffix for p in folder.iterdir()) == [".py"] * 4 + [".yaml"]
    return folder


@pytest.fixture
def allowed(monkeypatch):
    """The code of the page, by the line that the page gives."""
    (line,) = re.findall(r"export (TIM_ALLOW_CODE)=(\S+)", (ROOT / "docs/extend.md").read_text(encoding="utf-8"))
    monkeypatch.setenv(*line)
    return line[1]


def start(folder, *words):
    """What a command prints, in a process of its own, from that folder."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=folder, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_strangers_parts_train_and_sample(project, allowed, monkeypatch):
    said = start(project, TRAINER, "--config", "stripes.yaml", "--project_dir", "runs/stripes", "--seed", 0, *SHORT)
    assert set(re.findall(r"--allow-code (\w+)", said)) == set(allowed.split(",")), "the sampling command can be copied"
    run = project / "runs" / "stripes"
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4] and all(np.isfinite(r["weighted_loss"]) for r in records)
    assert (run / "samples" / "step-0000004.png").is_file()
    words = [
        "--config",
        "stripes.yaml",
        "--ckpt",
        "runs/stripes",
        "--sample-dir",
        "samples",
        "--num-fid-samples",
        4,
        "--num-steps",
        4,
        "--allow-code",
        allowed,
    ]
    monkeypatch.delenv("TIM_ALLOW_CODE")
    start(project, SAMPLER, *words)
    assert len(list((project / "samples").glob("*/*.png"))) == 4


@pytest.mark.parametrize("part", ["dataset", "network", "transport", "objective"])
def test_each_part_trains_alone(project, part, tmp_path, monkeypatch, allowed):
    """With the digits' config for everything else."""
    from tim.training.loop import train
    from tim.training.tasks import ClassTask

    monkeypatch.chdir(project)
    own = yaml.safe_load((project / "stripes.yaml").read_text())
    base = {"base": str(ROOT / "configs/c2i/digits.yaml")}
    tree = {
        "dataset": {"data": {"data_type": None, "dataset": {"name": None, **own["data"]["dataset"]}}},
        "network": {"model": {"network": {"target": "small_net.Convolutions", "params": {"num_classes": 10}}}},
        "transport": {"model": {"transport": own["model"]["transport"]}},
        "objective": {"model": {"transition_loss": {"target": "late_weight.LateWeight", "power": 0.5}}},
    }[part]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**base, **tree}))
    small = ["training.max_train_steps=2", "training.sample_steps=null", "data.dataloader.batch_size=8"]
    config = load_config(tmp_path / "own.yaml", small)
    train(config, tmp_path / "run", 0, ClassTask)
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "override,message",
    [
        ("data.dataset.params.cuont=3", r"unknown key data\.dataset\.params\.cuont; did you mean 'count'"),
        ("data.dataset.target=stripe_data.Stripe", r"data\.dataset\.target='stripe_data\.Stripe' cannot be imported"),
        ("data.data_type=package", r"data\.dataset\.target replaces data\.data_type"),
    ],
)
def test_mistakes_name_the_key(project, monkeypatch, allowed, override, message):
    monkeypatch.chdir(project)
    with pytest.raises(ConfigError, match=message):
        load_config("stripes.yaml", [override])


def test_the_transport_is_sound(project, monkeypatch):
    """Its derivatives are those of its coefficients, and following F* with A and B stays on the path."""
    monkeypatch.syspath_prepend(project)
    from quadratic import Quadratic

    transport, t = Quadratic(), torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    for coefficients in (transport.interpolant, transport.prediction):
        _, slopes = torch.func.jvp(lambda u, c=coefficients: tuple(c(u))[:2], (t,), (torch.ones_like(t),))
        for got, want in zip(tuple(coefficients(t))[2:], slopes, strict=True):
            torch.testing.assert_close(got, want)
    x, z, r = *torch.randn(2, 7, dtype=torch.float64), t / 2
    a, b = transport.transition(t, r)
    (at_t, at_r), hat = map(transport.interpolant, (t, r)), transport.prediction(t)
    moved = a * (at_t.alpha * x + at_t.sigma * z) + b * (hat.alpha_hat * x + hat.sigma_hat * z)
    torch.testing.assert_close(moved, at_r.alpha * x + at_r.sigma * z)


def test_the_dataset_repeats_itself(project, monkeypatch):
    monkeypatch.syspath_prepend(project)
    from stripe_data import Stripes

    data = Stripes(count=8)
    first, again, other = (data.load(3, rng.generator(0, "data", step))["image"] for step in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.abs().max() <= 1
