"""Checkpoints: whole or absent, verified, retired in order."""

import json
import os
import shutil

import pytest
import torch
from helpers.checkpoints import load, save_checkpoint

from tim.checkpoint.store import (
    find_corruption,
    latest_checkpoint,
    list_checkpoints,
    prune_checkpoints,
    read_state,
    tidy_checkpoints,
)
from tim.training.ema import EMA


@pytest.fixture
def trained(tiny_c2i):
    optimizer = torch.optim.AdamW(tiny_c2i.parameters(), lr=1e-3)
    ema = EMA(tiny_c2i, 0.9)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.9, 0.4])
    for _ in range(2):
        tiny_c2i(x, t, t / 2, torch.tensor([1, 2])).square().mean().backward()
        optimizer.step()
        ema.update(tiny_c2i, torch.zeros(()))
    return tiny_c2i, ema, optimizer


def test_ema_follows_the_weights(trained):
    network, ema, _ = trained
    before = [p.clone() for p in ema.network.parameters()]
    ema.update(network, torch.zeros(()))
    for old, new, p in zip(before, ema.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * p.detach())
    assert not any(p.requires_grad for p in ema.network.parameters())


def test_round_trip_is_exact(trained, tmp_path):
    network, ema, optimizer = trained
    path = save_checkpoint(tmp_path, 7, network, ema.network, optimizer, {"seed": 3})
    want = [v.clone() for m in (network, ema.network) for v in m.state_dict().values()]
    moments = [s["exp_avg"].clone() for s in optimizer.state.values()]
    with torch.no_grad():
        for p in (*network.parameters(), *ema.network.parameters()):
            p.add_(1)
    for s in optimizer.state.values():
        s["exp_avg"].zero_()
    state = load(path, network, ema.network, optimizer)
    assert state == {"step": 7, "seed": 3}
    got = [v for m in (network, ema.network) for v in m.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert all(torch.equal(a, s["exp_avg"]) for a, s in zip(moments, optimizer.state.values(), strict=True))


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.pt", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_damage_is_named_and_passed_over(trained, tmp_path, name, how):
    network, ema, optimizer = trained
    good = save_checkpoint(tmp_path, 1, network, ema.network, optimizer, {})
    bad = save_checkpoint(tmp_path, 2, network, ema.network, optimizer, {})
    file = bad / name
    content = bytearray(file.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif how == "cut":
        file.write_bytes(content[:-1])
    else:
        file.unlink()
    assert find_corruption(good) is None
    assert find_corruption(bad) is not None
    with pytest.warns(UserWarning, match="damaged checkpoint"):
        assert latest_checkpoint(tmp_path) == good
    with pytest.raises(ValueError, match="damaged"):
        load(bad, network, ema.network, optimizer)


def test_an_unfinished_save_is_no_checkpoint(trained, tmp_path, monkeypatch):
    network, ema, optimizer = trained
    good = save_checkpoint(tmp_path, 1, network, ema.network, optimizer, {})

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tim.files.flush", crash)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, network, ema.network, optimizer, {})
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path) == good
    assert latest_checkpoint(save_checkpoint(tmp_path, 2, network, ema.network, optimizer, {}).parent).name == "step-0000002"


def test_retention_keeps_the_newest_and_the_listed(trained, tmp_path):
    network, _, optimizer = trained
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, network, None, optimizer, {})
    prune_checkpoints(tmp_path, 2, keep_steps=[1])
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-0000001", "step-0000004", "step-0000005"]
    prune_checkpoints(tmp_path, None, [])
    assert len(list_checkpoints(tmp_path)) == 3


def test_only_step_and_a_number_counts_and_nothing_else_is_touched(trained, tmp_path):
    """Copies, renamed ones, links and files are the user's; order is that of the numbers, however they are written."""
    network, _, optimizer = trained
    for step in (8, 9, 10):
        save_checkpoint(tmp_path, step, network, None, optimizer, {})
    (tmp_path / "step-0000009").rename(tmp_path / "step-9")
    copies = [
        "step-0000010-best",
        "step-0000010 (copy)",
        "step-best",
        "step-",
        "step-+11",
        "step-11.5",
        ".step-0000011 (copy).part",
    ]
    for name in copies:
        shutil.copytree(tmp_path / "step-0000010", tmp_path / name)
    for name in ("step-0000011", ".step-0000012.part", ".step-0000010.old"):
        (tmp_path / name).symlink_to(tmp_path / "step-0000010-best")
    (tmp_path / "step-0000013").write_text("a file")
    foreign = {path for path in tmp_path.iterdir() if path.name not in ("step-0000008", "step-9", "step-0000010")}
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-0000008", "step-9", "step-0000010"]
    assert latest_checkpoint(tmp_path).name == "step-0000010"
    tidy_checkpoints(tmp_path)
    prune_checkpoints(tmp_path, 1, keep_steps=[9])
    assert set(tmp_path.iterdir()) == foreign | {tmp_path / "step-9", tmp_path / "step-0000010"}
    assert load(tmp_path / "step-best", network, None, optimizer)["step"] == 10, "by its own name it is taken"


@pytest.mark.parametrize("kind", ["renamed", "link", "file"])
def test_what_a_user_put_in_the_place_of_a_checkpoint_is_kept(trained, tmp_path, kind):
    network, _, optimizer = trained
    place = save_checkpoint(tmp_path, 9, network, None, optimizer, {}).rename(tmp_path / "step-0000010")
    if kind == "link":
        place.rename(tmp_path / "best")
        place.symlink_to("best")
    elif kind == "file":
        shutil.rmtree(place)
        place.write_text("mine")
    with pytest.warns(UserWarning, match=r"is no checkpoint of its step and becomes step-0000010 \(1\)"):
        save_checkpoint(tmp_path, 10, network, None, optimizer, {})
    kept = tmp_path / "step-0000010 (1)"
    assert kept.read_text() == "mine" if kind == "file" else read_state(kept)["step"] == 9
    assert kept.is_symlink() == (kind == "link") and [path.name for path in list_checkpoints(tmp_path)] == ["step-0000010"]


@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_a_pipe_in_a_checkpoint_is_damage_and_not_waited_for(trained, tmp_path, name):
    network, _, optimizer = trained
    for step in (1, 2):
        save_checkpoint(tmp_path, step, network, None, optimizer, {})
    (tmp_path / "step-0000002" / name).unlink()
    os.mkfifo(tmp_path / "step-0000002" / name)
    with pytest.warns(UserWarning, match=f"passing over .*{name}"):
        assert latest_checkpoint(tmp_path).name == "step-0000001"


@pytest.mark.parametrize("step", ["Infinity", "6.5", '"6"', "-6", "true", "null", "1" * 30])
def test_a_step_that_is_no_number_of_steps_is_damage(trained, tmp_path, step):
    network, _, optimizer = trained
    path = save_checkpoint(tmp_path, 6, network, None, optimizer, {})
    (path / "state.json").write_text(f'{{"step": {step}}}')
    with pytest.raises(ValueError, match=r"state\.json does not say the state of a run"):
        read_state(path)
    with pytest.warns(UserWarning, match="passing over"):
        assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("sharded", [False, True], ids=["full", "sharded"])
def test_a_manifest_names_all_that_its_format_needs(trained, tmp_path, sharded):
    network, ema, optimizer = trained
    good = save_checkpoint(tmp_path, 1, network, ema.network, optimizer, {}, sharded)
    bad = save_checkpoint(tmp_path, 2, network, ema.network, optimizer, {"modules": ["model", "ema"]}, sharded)
    manifest = json.loads((bad / "manifest.json").read_text())
    contents = [json.dumps({k: v for k, v in manifest.items() if k != name}) for name in manifest]
    contents += [
        "{}",
        "[]",
        "null",
        "",
        "[" * 100_000,
        json.dumps({**manifest, "model.bin": {}}),
        '{"\\u0000": {"bytes": 1, "sha256": ""}}',
    ]
    assert len(contents) >= 10
    for content in contents:
        (bad / "manifest.json").write_text(content)
        assert find_corruption(bad) is not None, content
    name = max(manifest, key=lambda name: manifest[name]["bytes"])
    (bad / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != name}))
    (bad / name).unlink()
    with pytest.warns(UserWarning, match=f"passing over .*step-0000002: .*{name}"):
        assert latest_checkpoint(tmp_path) == good
    (bad / "manifest.json").unlink()
    (bad / "manifest.json").mkdir()
    with pytest.warns(UserWarning, match=r"no readable manifest\.json"):
        assert latest_checkpoint(tmp_path) == good


def test_a_checkpoint_of_another_network_is_refused(trained, tmp_path):
    from helpers.networks import TINY

    from tim.models.c2i.tim_model import TiM

    network, ema, optimizer = trained
    path = save_checkpoint(tmp_path, 1, network, ema.network, optimizer, {})
    other = TiM(num_classes=10, **{**TINY, "depth": 3})
    with pytest.raises(ValueError, match=r"blocks\.2\."):
        load(path, other, None, torch.optim.AdamW(other.parameters()))
