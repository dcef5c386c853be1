"""Sharded checkpoints of strangers: an index and values that would run code, or claim what the files do not hold."""

import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.paths import ROOT

from tim.checkpoint import formats, sharded, store
from tim.checkpoint.inspection import inspect
from tim.checkpoint.weights import export_weights, find_weights

DIGITS = ROOT / "configs/c2i/digits.yaml"


class Bomb:
    def __reduce__(self):
        return (print, ("unpickled",))


def network():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A sharded checkpoint of a small network and its optimiser, as a run writes it."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    root = tmp_path_factory.mktemp("run") / "checkpoints"
    snapshot = formats.take_snapshot({"model": model}, optimizer, sharded=True)
    return store.write_checkpoint(root, 1, snapshot, {"modules": ["model"]}), model, optimizer


@pytest.fixture
def checkpoint(written, tmp_path):
    """A copy of it, and what makes its manifest true again after a change."""
    shutil.copytree(written[0], folder := tmp_path / "checkpoints" / "step-0000001")

    def seal():
        names = [p.name for p in folder.iterdir() if p.name != store.MANIFEST]
        files = {name: {"bytes": (folder / name).stat().st_size, "sha256": store.sha256(folder / name)} for name in names}
        store.write_json(folder / store.MANIFEST, files)

    return folder, seal


def test_what_was_written_is_read(written):
    folder, model, optimizer = written
    other = network()
    moments = torch.optim.AdamW(other.parameters(), lr=0.1)
    formats.read_into(folder, {"model": other}, moments)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))
    assert torch.equal(moments.state[other.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
    assert moments.param_groups[0]["lr"] == 0.5, "values that are no tensors are read too"


def index_of(found, change):
    """The pickled index after a change."""
    change(found)
    return pickle.dumps(found)


def grow(found):
    found.state_dict_metadata["model.weight"].size = torch.Size([10**8, 10**7])


def lead_outside(found):
    for stored in found.storage_data.values():
        stored.relative_path = "../../../../etc/passwd"


def leave_the_file(found):
    for stored in found.storage_data.values():
        stored.offset = 10**9


def number_keys(found):
    found.state_dict_metadata[3] = found.state_dict_metadata.pop("model.weight")


CHANGES = {
    "code": lambda found: pickle.dumps(Bomb()),
    "code within": lambda found: index_of(found, lambda f: setattr(f, "planner_data", Bomb())),
    "petabytes": lambda found: index_of(found, grow),
    "another file": lambda found: index_of(found, lead_outside),
    "another place": lambda found: index_of(found, leave_the_file),
    "a number for a key": lambda found: index_of(found, number_keys),
    "no index": lambda found: pickle.dumps([1]),
    "many objects": lambda found: b"\x80\x04r\xff\xff\xff\x7f.",
    "cut": lambda found: pickle.dumps(found)[:-50],
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_index_that_lies_is_one_error_wherever_it_is_read(checkpoint, name, capsys, tmp_path):
    folder, seal = checkpoint
    (folder / ".metadata").write_bytes(CHANGES[name](sharded.read_metadata(folder)))
    seal()
    model = network()
    readings = {
        "resume": lambda: formats.read_into(folder, {"model": model}, torch.optim.AdamW(model.parameters())),
        "weights": lambda: find_weights(folder, "raw").read(),
        "export": lambda: export_weights(str(folder), tmp_path / "out.safetensors"),
        "inspect": lambda: inspect(str(folder), [DIGITS]),
    }
    for reading in readings.values():
        assert ".metadata is no index of a sharded checkpoint" in told(reading)
    assert "unpickled" not in capsys.readouterr().out and not (tmp_path / "out.safetensors").exists()


def told(reading):
    """The line that says what is wrong, be it an error or a part of a description."""
    try:
        lines, damaged = reading()
    except ValueError as error:
        lines, damaged = [str(error)], True
    assert damaged and all("\n" not in line for line in lines)
    return " ".join(lines)


def test_values_that_are_no_tensors_run_no_code(checkpoint, capsys):
    """torch.distributed.checkpoint unpickles whatever stands for a learning rate."""
    folder, _ = checkpoint
    shutil.rmtree(folder)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    parts = formats.take_snapshot({"model": model}, optimizer, sharded=True).parts
    parts["optimizer"]["param_groups"][0]["lr"] = Bomb()
    dcp.save(parts, checkpoint_id=folder)
    with pytest.raises(ValueError, match=r"step-0000001 cannot be read .*weights_only|Weights only"):
        formats.read_into(folder, {"model": model}, optimizer)
    assert "unpickled" not in capsys.readouterr().out
