"""Checkpoint folders of accelerate's save_state, written by accelerate itself as the published trainer does."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from helpers.commands import command, reset_accelerate
from helpers.paths import GOLDENS, ROOT
from safetensors.torch import load_file

from tim.checkpoint.accelerate_folder import PUBLISHED_ORDER, published_names
from tim.checkpoint.weights import empty_network, find_weights
from tim.config import load_config, to_yaml
from tim.models.network import build_network

DIGITS = ROOT / "configs" / "c2i" / "digits.yaml"
SMALL = ["model.network.params.hidden_size=24", "model.network.params.depth=1", "training.sample_steps=null"]
SMALL += ["data.dataloader.batch_size=8", "training.max_train_steps=5"]
TRAINER = ["projects/train/trainer_c2i.py", "--config", DIGITS, *SMALL]


def published(config):
    """The network with its modules in the order in which the published code registers them."""
    network = build_network(config.model.network)
    modules = {name: network._modules[name] for name in PUBLISHED_ORDER}
    network._modules.clear()
    network._modules.update(modules)
    return network


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """(checkpoint-3, names of the parameters in their order, moments by name): three steps of AdamW on any loss."""
    config = load_config(DIGITS, SMALL)
    torch.manual_seed(3)
    accelerator = Accelerator(cpu=True)
    ema, network = published(config).requires_grad_(False), published(config)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    ema, model, optimizer, scheduler = accelerator.prepare(ema, network, optimizer, scheduler)
    for _ in range(3):
        x, t, y = torch.randn(4, 1, 8, 8), torch.rand(4), torch.arange(4)
        out, zs = model(x, t, t / 2, y, return_zs=True)
        accelerator.backward((out - x).square().mean() + zs.square().mean())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    path = tmp_path_factory.mktemp("accelerate") / "checkpoint-3"
    accelerator.save_state(path)
    names = {p: name for name, p in network.named_parameters()}
    moments = {names[p]: state for p, state in optimizer.optimizer.state.items()}
    reset_accelerate()
    return path, moments


def copied(folder, place):
    shutil.copytree(folder[0], place)
    return place


@pytest.mark.parametrize("name", ["c2i_tim_b_p4", "c2i_tim_xl_p1_512", "t2i_tim_xl_p1_t2i"])
def test_parameters_are_numbered_as_in_the_published_networks(name):
    manifest = json.loads((GOLDENS / "state_dicts" / f"{name}.manifest.json").read_text())
    kind, _, config = name.partition("_")
    assert published_names(empty_network(load_config(ROOT / "configs" / kind / f"{config}.yaml"))) == list(manifest)
    with pytest.raises(ValueError, match="this one has 0"):
        published_names(torch.nn.Sequential(torch.nn.Linear(1, 1)))


def test_it_is_what_accelerate_writes(folder):
    assert {p.name for p in folder[0].iterdir()} == {
        "model.safetensors", "model_1.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl",
    }  # fmt: skip


@pytest.mark.parametrize("where", ["checkpoints/checkpoint-3", "checkpoint-3"])
def test_a_project_of_such_folders_goes_on(folder, tmp_path, where):
    """Weights, average, moments and step are taken over, and the next start goes on from our own checkpoint."""
    path = copied(folder, tmp_path / where)
    (path / "random_states_0.pkl").write_bytes(b"never read")
    (tmp_path / "checkpoint-12").mkdir()  # empty
    still = ["training.learning_rate=1e-30", "training.optimizer.params.betas=[0.5,0.75]", "model.ema_decay=1.0"]
    done = command(*TRAINER, "--project_dir", tmp_path, *still, "training.max_train_steps=4")
    assert f"going on from {path}" in done.stderr and "at step 3" in done.stderr
    ours = tmp_path / "checkpoints" / "step-0000004"
    for theirs, name in (("model_1", "model"), ("model", "ema")):
        want, got = load_file(path / f"{theirs}.safetensors"), load_file(ours / f"{name}.safetensors")
        assert got.keys() == {k for k in want if not k.startswith("projector.")}
        assert all(torch.allclose(got[k], want[k], rtol=0, atol=1e-20) for k in got)
    state = torch.load(ours / "optimizer.pt", weights_only=True)["state"]
    assert state.keys() == {k for k in folder[1] if not k.startswith("projector.")}
    for name, moments in state.items():
        assert moments["step"] == 4
        # With betas 1/2 and 3/4 the new moments hold these shares of the old ones, and of one gradient.
        gradient = 2 * moments["exp_avg"] - folder[1][name]["exp_avg"]
        want = 0.75 * folder[1][name]["exp_avg_sq"] + 0.25 * gradient**2
        torch.testing.assert_close(moments["exp_avg_sq"], want, rtol=1e-3, atol=1e-9)
    again = command(*TRAINER, "--project_dir", tmp_path)
    assert "resuming from" in again.stderr and "step-0000004" in again.stderr
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [4, 5]


def test_weights_of_such_a_folder(folder, tmp_path):
    """The average, the trained weights on demand; --ckpt and model.ckpt take the folder or its project."""
    path = copied(folder, tmp_path / "checkpoints" / "checkpoint-3")
    for source in (path, tmp_path):
        assert [find_weights(source, kind).source.name for kind in (None, "ema", "raw")] == [
            "model.safetensors", "model.safetensors", "model_1.safetensors",
        ]  # fmt: skip
        assert find_weights(source, "raw").stem == "checkpoint-3"
    (tmp_path / "small.yaml").write_text(to_yaml(load_config(DIGITS, SMALL)))
    draw = ["projects/sample/sample_c2i_ddp.py", "--config", tmp_path / "small.yaml", "--num-fid-samples", 1, "--num-steps", 1]
    command(*draw, "--ckpt", tmp_path, "--sample-dir", tmp_path / "out")
    assert [p.name.partition("-8x8")[0] for p in (tmp_path / "out").iterdir() if p.is_dir()] == ["checkpoint-3"]
    shown = command("tools/inspect_checkpoint.py", tmp_path, "--config", tmp_path / "small.yaml").stdout
    assert shown.count(f"fits: {tmp_path}/small.yaml") == 2
    (path / "model_1.safetensors").rename(path / "model.safetensors")  # of a run without average
    assert find_weights(path).kind == "raw"
    with pytest.raises(ValueError, match="no EMA weights"):
        find_weights(path, "ema")


def damage(path, how):
    """Make a folder one that cannot be taken over; returns overrides and what is said."""
    if how == "no average":
        (path / "model_1.safetensors").unlink()
        return [], r"no moving average; set model\.use_ema=false"
    if how == "other files":  # of a newer one, such as sharded weights
        (path.parent / "checkpoint-7" / "pytorch_model_fsdp_0").mkdir(parents=True)
        return [], r"checkpoint-7 cannot be continued: it has no weights in one file, model\.safetensors"
    if how == "no optimiser":
        (path / "optimizer.bin").unlink()
        return [], r"optimizer\.bin is missing"
    if how == "code":
        torch.save({"state": print, "param_groups": []}, path / "optimizer.bin")
        return [], r"optimizer\.bin is no AdamW state"
    if how == "no step":
        path.rename(path.parent / "best")
        return [f"training.resume_from_checkpoint={path.parent}/best"], "does not say the step"
    if how == "another network":
        return ["model.network.params.depth=2"], r"keys missing from the file, first: blocks\.1"
    if how == "another optimiser":
        return [
            "training.optimizer.target=torch.optim.SGD",
            "training.optimizer.params=null",
        ], "has the moments of AdamW, and training.optimizer is SGD"
    saved = torch.load(path / "optimizer.bin", weights_only=True)
    if how == "a moment less":
        del saved["state"][5]
        torch.save(saved, path / "optimizer.bin")
        return [], r"optimizer\.bin has no moments of t_embedder\.mlp\.2\.bias"
    first, last = saved["param_groups"][0]["params"][0], saved["param_groups"][0]["params"][-1]
    saved["state"][first], saved["state"][last] = saved["state"][last], saved["state"][first]
    torch.save(saved, path / "optimizer.bin")
    return [], r"does not fit x_embedder\.proj\.weight"


HOW = [
    "no average",
    "other files",
    "no optimiser",
    "code",
    "no step",
    "another network",
    "another optimiser",
    "another order",
    "a moment less",
]


@pytest.mark.parametrize("how", HOW)
def test_what_does_not_map_is_refused_with_the_way_out(folder, tmp_path, how):
    path = copied(folder, tmp_path / "checkpoints" / "checkpoint-3")
    overrides, match = damage(path, how)
    from tim.training.loop import train
    from tim.training.tasks import ClassTask

    with pytest.raises(ValueError, match=rf"{match}.*model\.ckpt={path.parent}"):
        train(load_config(DIGITS, [*SMALL, *overrides]), tmp_path, 0, ClassTask)
    assert not (tmp_path / "log.jsonl").exists() and not list(tmp_path.glob("checkpoints/step-*"))


def test_a_fresh_start_beside_such_folders_is_refused(folder, tmp_path):
    """model.ckpt is the way to start from one, in another project."""
    path = copied(folder, tmp_path / "old" / "checkpoint-3")
    fresh = [*TRAINER, "training.resume_from_checkpoint=null", "training.max_train_steps=1"]
    refused = command(*fresh, "--project_dir", tmp_path / "old", check=False)
    assert refused.returncode == 2 and "holds checkpoints of an earlier run" in refused.stderr
    command(*fresh, "--project_dir", tmp_path / "new", f"model.ckpt={path}", "training.learning_rate=1e-30")
    got = load_file(tmp_path / "new" / "checkpoints" / "step-0000001" / "model.safetensors")
    want = load_file(path / "model.safetensors")
    assert all(torch.allclose(v, want[k], rtol=0, atol=1e-20) for k, v in got.items())
