"""Weights files: formats, wrappers, and everything that must be refused."""

import pickle
import zipfile

import pytest
import torch
from helpers.networks import randomize
from safetensors.torch import save_file

from tim.models.loading import load_strict, match_keys, read_state_dict


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


def test_code_is_named_and_nobody_is_told_to_run_it(tmp_path):
    torch.save({"a": Bomb()}, tmp_path / "w.pt")
    with pytest.raises(
        ValueError, match=r"w\.pt holds more than tensors and is not loaded: (?i:unsupported) \w+:? .*print"
    ) as error:
        read_state_dict(tmp_path / "w.pt")
    assert "weights_only" not in str(error.value)


def in_itself():
    state = {"a": torch.zeros(2)}
    state["model"] = {"module": state}
    return state


@pytest.mark.parametrize(
    "content,match",
    [
        (in_itself(), "holds no state dict of tensors"),
        ({1: torch.zeros(2)}, "holds no state dict of tensors"),
        ({"a": torch.zeros(1).expand(10**15)}, r"a, \(1000000000000000,\) of torch\.float32, is not stored in full"),
        ({"a": torch.empty(10**15, device="meta")}, "is not stored in full"),
        ({"a": torch.eye(3).to_sparse()}, "is not stored in full"),
    ],
    ids=["in itself", "number for a key", "expanded", "meta", "sparse"],
)
def test_what_claims_to_be_weights(tmp_path, content, match):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=rf"w\.pt.*{match}"):
        read_state_dict(tmp_path / "w.pt")


def test_a_header_of_petabytes_and_a_bomb(tmp_path):
    header = b'{"a": {"dtype": "F32", "shape": [250000000000000], "data_offsets": [0, 1000000000000000]}}'
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0000")
    (tmp_path / "v.safetensors").write_bytes((2**60).to_bytes(8, "little") + header)
    for name in ("v", "w"):
        with pytest.raises(ValueError, match=rf"{name}\.safetensors is damaged"):
            read_state_dict(tmp_path / f"{name}.safetensors")
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for member in plain.infolist():
            packed.writestr(member.filename, plain.read(member))
    with pytest.raises(ValueError, match=r"w\.pt is damaged .*members claim to be larger than the file"):
        read_state_dict(tmp_path / "w.pt")


def test_whole_numbers_are_no_weights(tiny_c2i):
    state = tiny_c2i.state_dict()
    state["final_layer.linear.bias"] = state["final_layer.linear.bias"].long()
    with pytest.raises(ValueError, match=r"1 are no floating point numbers, first: final_layer\.linear\.bias: torch\.int64"):
        load_strict(tiny_c2i, state, "weights.pt")


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


PREFIXED = {
    "DDP of compiled": lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
    "compiled of DDP": lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
    "compiled blocks": lambda s: {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in s.items()},
    "AveragedModel": lambda s: {"n_averaged": torch.tensor(7), **{f"module.{k}": v for k, v in s.items()}},
    "trainer": lambda s: {f"model.{k}": v for k, v in s.items()},
    "average in a trainer": lambda s: {f"ema.module.{k}": v for k, v in s.items()} | {"ema.n_averaged": torch.tensor(7)},
}


@pytest.mark.parametrize("kind", PREFIXED)
def test_prefixes_of_wrappers_are_stripped(kind, tmp_path, tiny_c2i):
    want = {k: v.clone() for k, v in tiny_c2i.state_dict().items()}
    torch.save(PREFIXED[kind](want), tmp_path / "w.pt")
    load_strict(randomize(tiny_c2i, seed=1), read_state_dict(tmp_path / "w.pt"), "w.pt")
    assert all(torch.equal(v, want[k]) for k, v in tiny_c2i.state_dict().items())


def test_both_weights_side_by_side(tmp_path, tiny_c2i):
    """The average is taken, the trained weights when asked for."""
    want = tiny_c2i.state_dict()
    torch.save({f"ema.{k}": v for k, v in want.items()} | {f"model.{k}": v + 1 for k, v in want.items()}, tmp_path / "w.pt")
    for raw in (False, True):
        state = match_keys(want, read_state_dict(tmp_path / "w.pt", raw))
        assert all(torch.equal(state[k], v + raw) for k, v in want.items())


def test_prefixes_stay_where_they_are_the_networks_own_or_explain_nothing(tiny_c2i):
    own = torch.nn.ModuleDict({"model": torch.nn.Linear(2, 2)})
    state = {k: v + 1 for k, v in own.state_dict().items()}
    load_strict(own, state, "own.pt")
    assert torch.equal(own["model"].weight, state["model.weight"])
    strange = {f"model.{k}": v for k, v in tiny_c2i.state_dict().items()} | {"model.extra": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"unknown keys in the file, first: model\.x_embedder"):
        load_strict(tiny_c2i, strange, "w.pt")
    twice = tiny_c2i.state_dict() | {"module.x_embedder.proj.bias": torch.zeros(48)}
    with pytest.raises(ValueError, match=r"first: module\.x_embedder\.proj\.bias"):
        load_strict(tiny_c2i, twice, "w.pt")
