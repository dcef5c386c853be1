"""Saving under adversity: killed at every operation, damaged afterwards, in a thread, to a disk that fails."""

import copy
import json
import subprocess
import sys
import threading

import pytest
import torch
from helpers.checkpoints import load, save_checkpoint
from helpers.networks import randomize
from helpers.paths import ROOT
from torch import nn

from tim.checkpoint.formats import build_stager, read_weights, take_snapshot
from tim.checkpoint.store import (
    Saver,
    find_corruption,
    latest_checkpoint,
    list_checkpoints,
    prune_checkpoints,
    tidy_checkpoints,
)

FORMATS = pytest.mark.parametrize("sharded", [False, True], ids=["full", "sharded"])


@pytest.fixture
def trained():
    """A network, its average and an optimiser with moments; one parameter never had a gradient."""
    network, ema = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    network[0](torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return network, ema.requires_grad_(False), optimizer


def flat(network, ema, optimizer) -> dict:
    """All tensors by name."""
    tensors = {f"{n}.{k}": v for n, m in (("model", network), ("ema", ema)) for k, v in m.state_dict().items()}
    for k, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{k}.{name}": v for name, v in moments.items()}
    return {k: v.clone() for k, v in tensors.items()}


@pytest.mark.dist
@pytest.mark.parametrize("how", ["full now", "sharded thread"])
def test_killed_at_any_operation_the_latest_checkpoint_is_whole(tmp_path, how):
    script = ROOT / "tests/helpers/kill_points.py"
    done = subprocess.run([sys.executable, script, tmp_path, *how.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert kills.pop() == {"latest": 2, "whole": True, "ended": True}
    assert len(kills) >= 20 and {"os.mkdir", "fsync", "os.rename", "os.rmdir"} <= {k["operation"] for k in kills}
    assert all(kill["whole"] for kill in kills), kills
    steps = [kill["latest"] for kill in kills]
    assert steps == sorted(steps) and set(steps) == {1, 2}, "old before the rename, new after it"


@FORMATS
def test_round_trip_is_exact(trained, tmp_path, sharded):
    path = save_checkpoint(tmp_path, 7, *trained, {"seed": 3}, sharded=sharded)
    want = flat(*trained)
    fresh = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3))
    optimizer = torch.optim.AdamW(fresh[0].parameters(), lr=5.0)
    assert load(path, *fresh, optimizer) == {"step": 7, "seed": 3}
    got = flat(*fresh, optimizer)
    assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want)
    assert "optimizer.3.step" not in want and optimizer.param_groups[0]["lr"] == 1e-2
    weights = read_weights(path, "ema")
    assert weights.keys() == trained[1].state_dict().keys()
    assert all(torch.equal(weights[k], v) for k, v in trained[1].state_dict().items())


@FORMATS
def test_missing_averages_and_other_networks_are_named(trained, tmp_path, sharded):
    network, ema, optimizer = trained
    path = save_checkpoint(tmp_path, 1, network, None, optimizer, {}, sharded=sharded)
    with pytest.raises(ValueError, match=r"has no EMA weights; set model\.use_ema=false"):
        load(path, network, ema, optimizer)
    other = nn.Sequential(nn.Linear(4, 3), nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"1\.weight: file \(3, 4\), network \(3, 5\)"):
        load(path, other, None, torch.optim.AdamW(other.parameters()))


def test_an_older_layout_is_refused_with_the_way_out(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda value, path, save=torch.save: save({"optimizer": value, "scaler": None}, path))
    path = save_checkpoint(tmp_path, 1, *trained, {})
    with pytest.raises(ValueError, match=r"older layout; start a new project from its weights: model\.ckpt="):
        load(path, *trained)


@FORMATS
@pytest.mark.parametrize("how", ["flip", "cut"])
def test_every_damaged_file_is_refused_by_name(trained, tmp_path, sharded, how):
    good = save_checkpoint(tmp_path, 1, *trained, {}, sharded=sharded)
    names = {p.name for p in good.iterdir()}
    assert names >= ({".metadata", "__0_0.distcp"} if sharded else {"model.safetensors", "ema.safetensors", "optimizer.pt"})
    for name in names:
        bad = save_checkpoint(tmp_path, 2, *trained, {}, sharded=sharded)
        content = bytearray((bad / name).read_bytes())
        content[len(content) // 3] ^= 4
        (bad / name).write_bytes(content if how == "flip" else content[:-1])
        if name != "manifest.json":  # a flip in there accuses the file it speaks of
            with pytest.raises(ValueError, match=rf"damaged: {name} (differs|has \d+ bytes instead of)"):
                load(bad, *trained)
        with pytest.warns(UserWarning, match="passing over damaged checkpoint"):
            assert latest_checkpoint(tmp_path) == good


def test_any_flipped_bit_of_a_manifest_is_survived(trained, tmp_path):
    """It may hit a brace, a name, a digit or a byte that means nothing: an answer always, never a crash."""
    path = save_checkpoint(tmp_path, 1, *trained, {})
    content = (path / "manifest.json").read_bytes()
    refused = 0
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << (place % 8)
        (path / "manifest.json").write_bytes(changed)
        refused += find_corruption(path) is not None
    assert refused > 0.8 * len(content)


def test_retention_counts_only_checkpoints_that_can_be_read(trained, tmp_path):
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, *trained, {})
    (tmp_path / "step-0000004" / "optimizer.pt").write_bytes(b"")
    prune_checkpoints(tmp_path, 2, keep_steps=[1])
    assert [int(p.name[5:]) for p in list_checkpoints(tmp_path)] == [1, 3, 4, 5]
    for step in (3, 5):
        (tmp_path / f"step-{step:07d}" / "state.json").unlink()
    prune_checkpoints(tmp_path, 1, keep_steps=[1])
    assert [int(p.name[5:]) for p in list_checkpoints(tmp_path)] == [1, 3, 4, 5], "nothing good would be left"


def test_a_checkpoint_that_reads_back_damaged_replaces_nothing(trained, tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, *trained, {"mark": "old"})
    monkeypatch.setattr("tim.checkpoint.formats.save_file", lambda tensors, path: path.write_bytes(b"abc"))
    monkeypatch.setattr("tim.files.flush", lambda path: path.is_file() and path.write_bytes(b""))
    with pytest.raises(OSError, match="cannot be read back"):
        save_checkpoint(tmp_path, 1, *trained, {"mark": "new"})
    monkeypatch.undo()
    assert load(latest_checkpoint(tmp_path), *trained)["mark"] == "old"
    assert load(save_checkpoint(tmp_path, 1, *trained, {"mark": "new"}), *trained)["mark"] == "new"


def test_a_checkpoint_that_was_being_replaced_comes_back(trained, tmp_path):
    save_checkpoint(tmp_path, 3, *trained, {}).rename(tmp_path / ".step-0000003.old")
    (tmp_path / ".step-0000004.part").mkdir()
    tidy_checkpoints(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000003"] and find_corruption(tmp_path / "step-0000003") is None


@FORMATS
def test_a_projector_that_nothing_trains_is_left_out(tiny_c2i, tmp_path, sharded):
    """And may be missing where nothing trains it; files that hold it load as ever."""
    ema = copy.deepcopy(tiny_c2i).requires_grad_(False)
    optimizer = torch.optim.AdamW(p for k, p in tiny_c2i.named_parameters() if not k.startswith("projector."))
    old = save_checkpoint(tmp_path / "old", 1, tiny_c2i, ema, optimizer, {}, sharded)
    tiny_c2i.projector.requires_grad_(False)
    new = save_checkpoint(tmp_path / "new", 1, tiny_c2i, ema, optimizer, {}, sharded)
    want = {k: v.clone() for k, v in tiny_c2i.state_dict().items()}
    for path, lacking in ((old, 0), (new, 6)):
        for name in ("model", "ema"):
            assert len(want) - len(read_weights(path, name)) == lacking
        load(path, randomize(tiny_c2i, 1), randomize(ema, 2), optimizer)
        for network in (tiny_c2i, ema):
            same = {k for k, v in network.state_dict().items() if torch.equal(v, want[k])}
            assert {k for k in want if not k.startswith("projector.")} <= same
            assert ("projector.0.weight" in same) == (lacking == 0)
    before = {k: v.clone() for k, v in tiny_c2i.state_dict().items()}
    with pytest.raises(ValueError, match=r"no projector.*model.ckpt_allow_missing=\[projector.\*\]"):
        load(new, tiny_c2i.requires_grad_(True), ema, optimizer)
    assert all(torch.equal(v, before[k]) for k, v in tiny_c2i.state_dict().items())


@pytest.mark.parametrize("cached", [False, True])
def test_a_staged_snapshot_does_not_follow_the_run(trained, cached, monkeypatch):
    """With memory that is kept from one snapshot to the next, as beside a GPU, and without."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # there is no GPU to lock pages for
    network, ema, optimizer = trained
    stager = build_stager(torch.device("cuda" if cached else "cpu"))
    for _ in range(2):
        snapshot = take_snapshot({"model": network, "ema": ema}, optimizer, stager=stager)
        wanted = take_snapshot({"model": network, "ema": ema}, optimizer).parts["model"]
        before = {k: v.clone() for k, v in snapshot.parts["model"].items()}
        moment = snapshot.parts["optimizer"]["state"]["0.weight"]["step"].clone()
        assert all(torch.equal(v, before[k]) for k, v in wanted.items())
        network[0](torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        assert all(torch.equal(v, snapshot.parts["model"][k]) for k, v in before.items())
        assert torch.equal(moment, snapshot.parts["optimizer"]["state"]["0.weight"]["step"])


def test_kept_memory_makes_room_for_new_moments(monkeypatch):
    """A parameter whose first gradient comes between two snapshots."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    network = torch.nn.ModuleList([torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)])
    optimizer, stager = torch.optim.AdamW(network.parameters()), build_stager(torch.device("cuda"))
    for layer in network:
        layer(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        snapshot = take_snapshot({"model": network}, optimizer, stager=stager)
    for name, parameter in network.named_parameters():
        moments = snapshot.parts["optimizer"]["state"][name]
        assert torch.equal(moments["exp_avg"], optimizer.state[parameter]["exp_avg"])


@pytest.mark.parametrize("background", [False, True])
def test_errors_of_a_save_reach_the_run(background):
    saver = Saver(background)

    def fail():
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        saver.submit(fail)
        saver.submit(lambda: None)
    done = []
    saver.submit(lambda: done.append(threading.current_thread() is threading.main_thread()))
    saver.wait()
    assert done == [not background]
