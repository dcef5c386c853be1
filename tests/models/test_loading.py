"""Weights files: formats, wrappers, and everything that must be refused."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from tim.models.loading import load_strict, read_state_dict


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"ema": s, "step": 3}, lambda s: {"state_dict": {"model": s}}])
@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_torch_files_are_unwrapped(tmp_path, tiny_c2i, wrap, suffix):
    path = tmp_path / f"weights{suffix}"
    torch.save(wrap({f"module.{k}": v for k, v in tiny_c2i.state_dict().items()}), path)
    state = read_state_dict(path)
    assert all(torch.equal(state[k], v) for k, v in tiny_c2i.state_dict().items())
    load_strict(tiny_c2i, state, path)


def test_safetensors(tmp_path, tiny_c2i):
    save_file(tiny_c2i.state_dict(), tmp_path / "w.safetensors")
    load_strict(tiny_c2i, read_state_dict(tmp_path / "w.safetensors"), "w")


class Bomb:
    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.mark.parametrize("content", ["code", "cut", "numbers"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_bad_files_are_named_and_never_run(tmp_path, tiny_c2i, content, suffix, capsys):
    path = tmp_path / f"weights{suffix}"
    if content == "code":
        path.write_bytes(pickle.dumps({"a": Bomb()}))
    elif content == "cut":
        good = tmp_path / "good"
        save_file(tiny_c2i.state_dict(), good) if suffix == ".safetensors" else torch.save(tiny_c2i.state_dict(), good)
        path.write_bytes(good.read_bytes()[:-500])
    else:
        torch.save({"a": 1}, path)
    with pytest.raises(ValueError, match=f"weights{suffix}"):
        read_state_dict(path)
    assert "unpickled" not in capsys.readouterr().out


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        read_state_dict(tmp_path / "absent.pt")


def test_another_network_is_reported_key_by_key(tiny_c2i):
    state = tiny_c2i.state_dict()
    state["extra.weight"] = torch.zeros(1)
    del state["final_layer.linear.bias"]
    state["x_embedder.proj.bias"] = torch.zeros(7)
    with pytest.raises(ValueError) as error:
        load_strict(tiny_c2i, state, "weights.pt")
    for part in ("weights.pt", "final_layer.linear.bias", "extra.weight", "x_embedder.proj.bias: file (7,), network (48,)"):
        assert part in str(error.value)
