"""Adapters in a network: where they are, that they change nothing untrained, and that derivatives see them."""

import sys

import pytest
import torch
from helpers.networks import TINY, randomize

from tim.config import Lora
from tim.models.adapters import add_adapters, is_adapter_key
from tim.models.t2i.tim_model import TiM

SETTINGS = {
    "default": {},
    "dora": {"use_dora": True, "rank_pattern": {"blocks.1.attn.qkv": 2}},
    "everything-else": {
        "lora_bias": True,
        "use_rslora": True,
        "target_modules": ["qkv", "kv", "adaLN_modulation.fc2", "x_embedder.proj", "delta_embedder.mlp.2"],
        "modules_to_save": ["final_layer.linear", "q_norm", "fc1_g"],
    },
}


@pytest.fixture
def network():
    return randomize(TiM(cap_feat_dim=20, **TINY).double())


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_derivatives_see_adapters(network, settings, use_checkpoint):
    """F is kept until they are trained; then dF/dt in the pass of F is that of forward-mode differentiation."""
    network.use_checkpoint = use_checkpoint
    x, dx = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    t, y = torch.rand(3, dtype=torch.float64), torch.randn(3, 5, 20, dtype=torch.float64)
    r, dt = t / 2, torch.ones_like(t)
    before = network(x, t, r, y).detach()
    add_adapters(network, Lora(rank=3, **settings))
    assert torch.equal(network(x, t, r, y), before)
    trained = [p for p in network.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p.add_(0.1 * torch.randn_like(p))
    value, tangent = network(x, t, r, y, tangents=(dx, dt, torch.zeros_like(t)))
    assert (value - before).abs().max() > 0.01
    _, want = torch.func.jvp(lambda x, t: network(x, t, r, y, jvp=True, attn_type="vanilla_attn"), (x, t), (dx, dt))
    torch.testing.assert_close(tangent, want.detach(), rtol=1e-11, atol=1e-12)
    value.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_defaults_are_attention_and_mlp_of_the_blocks(network):
    add_adapters(network, Lora(rank=3))
    adapted = {key.partition(".lora_")[0] for key in network.state_dict() if is_adapter_key(key)}
    layers = ["attn.qkv", "attn.proj", "cross_attn.q", "cross_attn.kv", "cross_attn.proj", "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2"]
    assert adapted == {f"blocks.{k}.{layer}" for k in range(2) for layer in layers}
    assert {key for key, p in network.named_parameters() if p.requires_grad} == set(
        filter(is_adapter_key, network.state_dict())
    )


@pytest.mark.parametrize(
    "settings,match",
    [
        ({"target_modules": ["qvk"]}, "target_modules: the network has no 'qvk'; did you mean 'qkv'"),
        ({"modules_to_save": ["final"]}, "modules_to_save: the network has no 'final'"),
        ({"target_modules": ["final_layer.linear"], "exclude_modules": ["linear"]}, "no layer is left"),
        ({"use_dora": True, "lora_bias": True}, "lora_bias"),
        ({"rank_pattern": {"(qkv": 2}}, r"rank_pattern: the network has no '\(qkv'; did you mean 'qkv'"),
    ],
)
def test_layers_that_are_not_there_are_named(network, settings, match):
    with pytest.raises(ValueError, match=match):
        add_adapters(network, Lora(**settings))


def test_without_peft_the_extra_is_named(network, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install -e \.\[lora\]"):
        add_adapters(network, Lora())
