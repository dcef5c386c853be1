"""The networks as models of diffusers: the same numbers, keys and refusals, saved and loaded in every way."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
import yaml
from helpers.networks import TINY, randomize, relative_error
from helpers.paths import GOLDENS, ROOT
from safetensors.torch import load_file, save_file

from tim.config import load_config
from tim.models.c2i.tim_model import TiM as ClassTiM
from tim.pipelines import TiMClassTransformer2DModel, TiMTransformer2DModel
from tim.schedulers.derivative import carries_tangents

MANIFESTS = {
    "c2i_tim_b_p4": ("c2i/tim_b_p4", TiMClassTransformer2DModel),
    "c2i_tim_xl_p2_256": ("c2i/tim_xl_p2_256", TiMClassTransformer2DModel),
    "c2i_tim_xl_p1_512": ("c2i/tim_xl_p1_512", TiMClassTransformer2DModel),
    "t2i_tim_xl_p1_t2i": ("t2i/tim_xl_p1_t2i", TiMTransformer2DModel),
}


def of_golden(meta):
    cls = TiMTransformer2DModel if meta["kind"] == "t2i" else TiMClassTransformer2DModel
    return cls.from_single_file(GOLDENS / f"{meta['kind']}_tiny" / "weights.safetensors", meta["network"])


@torch.no_grad()
def test_goldens_hold_through_a_saved_folder(golden, tmp_path):
    meta, d, plain = golden
    of_golden(meta).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 1
    network = type(of_golden(meta)).from_pretrained(tmp_path)
    assert {k: v.shape for k, v in network.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    inputs = d["x"], d["t"], d["r"], d["y"]
    out = network(*inputs)
    assert torch.equal(out, plain(*inputs)) and relative_error(out, d["out"]) < 1e-5
    condition = {"encoder_hidden_states" if meta["kind"] == "t2i" else "class_labels": d["y"]}
    call = {"hidden_states": d["x"], "timestep": d["t"], "r_timestep": d["r"], **condition}
    assert torch.equal(network(**call).sample, out)
    assert torch.equal(network(**call, return_dict=False)[0], out)
    instantaneous = network(hidden_states=d["x"], timestep=d["t"], **condition).sample
    assert relative_error(instantaneous, d["out_t_eq_r"]) < 1e-5


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_published_layouts(manifest):
    config, cls = MANIFESTS[manifest]
    layout = json.loads((GOLDENS / "state_dicts" / f"{manifest}.manifest.json").read_text())
    with torch.device("meta"):
        network = cls(**load_config(ROOT / "configs" / f"{config}.yaml").model.network.params)
    assert {k: list(v.shape) for k, v in network.state_dict().items()} == layout


def test_a_time_and_a_mask_as_diffusers_gives_them(tiny_t2i):
    network = TiMTransformer2DModel(cap_feat_dim=20, **TINY).eval()
    network.load_state_dict(tiny_t2i.state_dict())
    x, y, mask = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 20), torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
    t, r = torch.full((2,), 0.5), torch.full((2,), 0.25)
    out = network(hidden_states=x, timestep=0.5, r_timestep=0.25, encoder_hidden_states=y, encoder_attention_mask=mask).sample
    assert torch.equal(out, tiny_t2i(x, t, r, y, y_mask=mask.bool()))


def test_half_precision_keeps_the_time_embedders(golden, tmp_path):
    meta, d, plain = golden
    of_golden(meta).save_pretrained(tmp_path, variant="small")
    cls = type(of_golden(meta))
    loaded = cls.from_pretrained(tmp_path, variant="small", torch_dtype=torch.bfloat16)
    single = cls.from_single_file(
        GOLDENS / f"{meta['kind']}_tiny" / "weights.safetensors", tmp_path, torch_dtype=torch.bfloat16
    )
    for network in (loaded, single):
        kept = {k for k, p in network.named_parameters() if p.dtype == torch.float32}
        assert kept == {k for k in network.state_dict() if k.startswith(("t_embedder.", "delta_embedder."))}
        out = network(d["x"].bfloat16(), d["t"], d["r"], d["y"])
        assert (
            out.dtype == network.dtype == torch.bfloat16 and relative_error(out, plain(d["x"], d["t"], d["r"], d["y"])) < 0.05
        )


def test_from_single_file_takes_runs_and_refuses_others(text_run, class_run):
    network = TiMTransformer2DModel.from_single_file(text_run / "w.safetensors", text_run / "config.yaml")
    assert not network.training and network.config.cap_feat_dim == 20
    for source, config, match in (
        (text_run / "w.safetensors", None, "config is missing"),
        (text_run / "w.safetensors", class_run / "config.yaml", "not of a TiMTransformer2DModel"),
        (text_run / "w.safetensors", {"deph": 2}, "deph.*depth"),
        (class_run / "w.safetensors", text_run / "config.yaml", "another network"),
    ):
        with pytest.raises(ValueError, match=match):
            TiMTransformer2DModel.from_single_file(source, config)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.bin"):
        TiMTransformer2DModel.from_single_file(text_run / "nowhere.bin", text_run / "config.yaml")


def test_a_pickle_without_projector_loads(class_run, tmp_path):
    state = load_file(class_run / "w.safetensors")
    torch.save({k: v for k, v in state.items() if not k.startswith("projector.")}, tmp_path / "w.bin")  # of a run without REPA
    one, two = (
        TiMClassTransformer2DModel.from_single_file(path, class_run / "config.yaml")
        for path in (tmp_path / "w.bin", class_run / "w.safetensors")
    )
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([0.9, 0.4]), torch.tensor([0, 1])
    assert torch.equal(one(x, t, t / 2, y), two(x, t, t / 2, y)) and all(p.requires_grad for p in one.parameters())


def test_a_folder_with_other_weights_is_refused(tmp_path):
    network = TiMClassTransformer2DModel(num_classes=10, **TINY)
    network.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    for changed, match in (
        ({k: v for k, v in state.items() if k != "final_layer.linear.bias"}, "final_layer.linear.bias"),
        ({**state, "extra": torch.zeros(1)}, "extra"),
        ({**state, "final_layer.linear.bias": torch.zeros(3)}, "final_layer.linear.bias"),
    ):
        save_file(changed, path, {"format": "pt"})
        with pytest.raises(ValueError, match=match):
            TiMClassTransformer2DModel.from_pretrained(tmp_path)


def test_copies_checkpointing_compiling_and_backends_change_nothing(tiny_c2i):
    network = TiMClassTransformer2DModel(num_classes=10, **TINY)
    network.load_state_dict(tiny_c2i.state_dict())
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([0.9, 0.4]), torch.tensor([0.3, 0.1]), torch.tensor([1, 2])
    want = tiny_c2i(*inputs)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert twin.config == network.config and torch.equal(twin(*inputs), want)

    def gradients():
        network.zero_grad()
        network(*inputs).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])

    plain = gradients()
    network.enable_gradient_checkpointing()
    assert network.is_gradient_checkpointing and network.use_checkpoint
    torch.testing.assert_close(gradients(), plain, rtol=1e-5, atol=1e-8)
    network.disable_gradient_checkpointing()
    assert not network.use_checkpoint
    network.set_attention_backend("native")
    torch.testing.assert_close(network(*inputs), want, rtol=1e-5, atol=1e-6)
    network.reset_attention_backend()
    network.compile_repeated_blocks(backend="eager")
    torch.testing.assert_close(network(*inputs), want, rtol=1e-5, atol=1e-6)


def test_an_attention_backend_is_used(tiny_t2i, monkeypatch):
    from diffusers.models import attention_dispatch

    seen = []
    real = attention_dispatch.dispatch_attention_fn
    monkeypatch.setattr(
        attention_dispatch, "dispatch_attention_fn", lambda *a, **k: (seen.append(k["backend"].value), real(*a, **k))[1]
    )
    network = TiMTransformer2DModel(cap_feat_dim=20, **TINY)
    network.load_state_dict(tiny_t2i.state_dict())
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([0.9, 0.4]), torch.tensor([0.3, 0.1]), torch.randn(2, 5, 20)
    network.set_attention_backend("_native_math")
    out = network(*inputs, y_mask=mask)
    assert set(seen) == {"_native_math"}
    torch.testing.assert_close(out, tiny_t2i(*inputs, y_mask=mask), rtol=1e-4, atol=1e-5)
    network.reset_attention_backend()
    with pytest.raises(ValueError, match="flashy"):
        network(*inputs, attn_type="flashy")


def test_the_trainer_can_build_and_differentiate_them(class_run):
    tree = yaml.safe_load((class_run / "config.yaml").read_text())
    tree["model"]["network"]["target"] = "tim.pipelines.networks.TiMClassTransformer2DModel"
    (class_run / "own.yaml").write_text(yaml.safe_dump(tree))
    network = load_config(class_run / "own.yaml").model.network.build()
    assert carries_tangents(network)
    randomize(network)
    plain = ClassTiM(**tree["model"]["network"]["params"])
    plain.load_state_dict(network.state_dict())
    x, t, r, y = torch.randn(2, 1, 8, 8), torch.tensor([0.9, 0.4]), torch.tensor([0.3, 0.1]), torch.tensor([1, 2])
    tangents = torch.randn(2, 1, 8, 8), torch.ones(2), torch.zeros(2)
    for got, want in zip(network(x, t, r, y, tangents=tangents), plain(x, t, r, y, tangents=tangents), strict=True):
        assert torch.equal(got, want)


def test_training_and_sampling_do_without_diffusers():
    code = "import sys, tim.pipelines, tim.models.c2i.tim_model, tim.models.t2i.tim_model; sys.exit('diffusers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
