"""The network: goldens, published layouts, backends, positions, gradients."""

import json
import math

import pytest
import torch
from helpers.networks import TINY, randomize, relative_error
from helpers.paths import GOLDENS, ROOT

from tim.config import load_config
from tim.models.attention import ATTN_TYPES, attention
from tim.models.c2i.tim_model import TiM as C2I
from tim.models.rope import apply_rope, grid_positions, rope_table
from tim.models.t2i.tim_model import TiM as T2I

MANIFESTS = {
    "c2i_tim_b_p4": ("c2i/tim_b_p4", 128.8),
    "c2i_tim_xl_p2_256": ("c2i/tim_xl_p2_256", 664.1),
    "c2i_tim_xl_p1_512": ("c2i/tim_xl_p1_512", 664.2),
    "t2i_tim_xl_p1_t2i": ("t2i/tim_xl_p1_t2i", 865.0),
}


def test_goldens(golden):
    _, d, network = golden
    with torch.no_grad():
        out, h_proj = network(d["x"], d["t"], d["r"], d["y"], return_zs=True)
        assert relative_error(out, d["out"]) < 1e-5
        assert relative_error(h_proj, d["h_proj"]) < 1e-5
        assert relative_error(network(d["x"], d["t"], d["t"], d["y"]), d["out_t_eq_r"]) < 1e-5


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_published_layouts_load_strictly(manifest):
    """The shipped config builds exactly the published keys and shapes, and the parameter count of the paper."""
    config, millions = MANIFESTS[manifest]
    layout = json.loads((GOLDENS / "state_dicts" / f"{manifest}.manifest.json").read_text())
    with torch.device("meta"):
        network = load_config(ROOT / "configs" / f"{config}.yaml").model.network.build()
        state = {key: torch.empty(shape) for key, shape in layout.items()}
    network.load_state_dict(state, strict=True, assign=True)
    count = sum(p.numel() for k, p in network.named_parameters() if not k.startswith("projector."))
    assert count / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("new_condition", ["t-r", "r", "t,r", "t,t-r", "r,t-r", "t,r,t-r"])
@pytest.mark.parametrize("use_new_embed", [False, True])
def test_interval_embedding(new_condition, use_new_embed):
    network = randomize(C2I(num_classes=10, **{**TINY, "new_condition": new_condition, "use_new_embed": use_new_embed}))
    t, r = torch.tensor([0.9, 0.4]), torch.tensor([0.3, 0.1])
    T = network.t_embedder
    D = network.delta_embedder if use_new_embed else T
    want = {
        "t-r": lambda: D(t - r),
        "r": lambda: D(r),
        "t,r": lambda: T(t) + D(r),
        "t,t-r": lambda: T(t) + D(t - r),
        "r,t-r": lambda: T(r) + D(t - r),
        "t,r,t-r": lambda: T(t) + T(r) + D(t - r),
    }[new_condition]()
    torch.testing.assert_close(network.interval_embedding(t, r), want)


def test_attention_backends_agree():
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 10, 16, generator=g)
    k, v = (torch.randn(2, 3, 7, 16, generator=g) for _ in range(2))
    mask = torch.tensor([[True] * 7, [True] * 3 + [False] * 4])
    for m in (None, mask):
        outs = [attention(q, k, v, kind, m) for kind in (None, "fused_attn", "vanilla_attn")]
        for out in outs[1:]:
            torch.testing.assert_close(out, outs[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="is not one of"):
        attention(q, k, v, "fused")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="flash"):
            attention(q, k, v, ATTN_TYPES[0])


def test_networks_agree_over_backends(tiny_c2i):
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([0.9, 0.4]), torch.tensor([1, 2])
    fused, vanilla = (tiny_c2i(x, t, t / 2, y, attn_type=kind) for kind in ("fused_attn", "vanilla_attn"))
    torch.testing.assert_close(fused, vanilla, rtol=1e-4, atol=1e-5)


def test_padding_and_batch_mates_do_not_reach_a_caption(tiny_t2i):
    x, t = torch.randn(2, 4, 8, 12), torch.tensor([0.9, 0.4])
    y = torch.randn(2, 7, 20)
    mask = torch.tensor([[True] * 7, [True] * 3 + [False] * 4])
    batch = tiny_t2i(x, t, t / 2, y, y_mask=mask)
    alone = tiny_t2i(x[1:], t[1:], t[1:] / 2, y[1:, :3])
    assert relative_error(batch[1:], alone) < 1e-5
    y[1, 3:] = 1e3
    assert relative_error(tiny_t2i(x, t, t / 2, y, y_mask=mask), batch) < 1e-6


def test_gradient_checkpointing_changes_no_gradient():
    grads = []
    for use_checkpoint in (False, True):
        network = randomize(C2I(num_classes=10, use_checkpoint=use_checkpoint, **TINY))
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        out, h = network(x, torch.tensor([0.9, 0.4]), torch.tensor([0.3, 0.1]), torch.tensor([1, 2]), return_zs=True)
        (out.square().mean() + h.square().mean()).backward()
        grads.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-8)


def test_rope_grids():
    assert grid_positions(2, 3, "row_major").tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert grid_positions(2, 3, "legacy").tolist() == [[0, 0], [1, 0], [0, 1], [1, 1], [0, 2], [1, 2]]
    square = grid_positions(4, 4, "row_major")
    assert torch.equal(grid_positions(4, 4, "legacy"), square.flip(-1))


@pytest.mark.parametrize("cls,kwargs", [(C2I, {"num_classes": 10}), (T2I, {"cap_feat_dim": 20})])
def test_rope_grid_changes_non_square_outputs(cls, kwargs):
    y = torch.tensor([1]) if cls is C2I else torch.randn(1, 5, 20)
    x, t = torch.randn(1, 4, 8, 12), torch.tensor([0.7])
    a, b = (randomize(cls(rope_grid=g, **kwargs, **TINY), scale=0.3)(x, t, t / 2, y) for g in ("legacy", "row_major"))
    assert relative_error(a, b) > 1e-2


def test_rope_is_the_rotation_it_says():
    """Scores depend on coordinate differences only, and each pair turns by position * frequency."""
    head_dim = 8
    table = rope_table(torch.tensor([[3, 5]]), head_dim, torch.float64)
    u = torch.randn(1, 1, 1, head_dim, dtype=torch.float64)
    turned = apply_rope(u, table)[0, 0, 0]
    for pair, (position, i) in enumerate([(3, 0), (3, 1), (5, 0), (5, 1)]):
        angle = position * 10000 ** (-2 * i / (head_dim / 2))
        a, b = u[0, 0, 0, 2 * pair : 2 * pair + 2].tolist()
        want = [a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)]
        assert turned[2 * pair : 2 * pair + 2].tolist() == pytest.approx(want, rel=1e-9, abs=1e-12)


def test_rope_has_one_meaning_for_the_compiler_and_eagerly(monkeypatch):
    table = rope_table(grid_positions(3, 4, "row_major"), 16, torch.float32)
    u = torch.randn(2, 3, 12, 16)
    eager = apply_rope(u, table)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(apply_rope(u, table), eager, rtol=1e-6, atol=1e-6)


def test_a_fresh_network_predicts_zero_and_is_initialised_as_published():
    network = C2I(num_classes=10, **{**TINY, "hidden_size": 192})
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.9, 0.4])
    assert network(x, t, t, torch.tensor([0, 1])).abs().max() == 0
    for name in ("y_embedder.embedding_table", "t_embedder.mlp.0", "t_embedder.mlp.2"):
        assert network.get_submodule(name).weight.std().item() == pytest.approx(0.02, rel=0.1), name
    xavier = (6 / (192 + 256)) ** 0.5
    assert network.delta_embedder.mlp[0].weight.abs().max().item() == pytest.approx(xavier, rel=0.02)
    patch = (6 / (192 + 16)) ** 0.5
    assert network.x_embedder.proj.weight.abs().max().item() == pytest.approx(patch, rel=0.02)


def test_half_precision_keeps_float32_times(tiny_c2i):
    """Times 0.500 and 0.501 are one bfloat16 number, but two conditions."""
    network = tiny_c2i.to(torch.bfloat16)
    x, y = torch.randn(1, 4, 8, 8, dtype=torch.bfloat16), torch.tensor([1])
    a, b = (network.t_embedder(torch.tensor([t])) for t in (0.5, 0.501))
    assert not torch.equal(a, b)
    assert network(x, torch.tensor([0.5]), torch.tensor([0.1]), y).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "kwargs,match",
    [
        ({"hidden_size": 50}, "hidden_size=50"),
        ({"input_size": 9}, "patch_size=2"),
        ({"new_condition": "t,x"}, "new_condition"),
        ({"rope_grid": "column"}, "rope_grid"),
        ({"encoder_depth": 5}, "encoder_depth=5"),
    ],
)
def test_impossible_networks_are_refused(kwargs, match):
    with pytest.raises(ValueError, match=match):
        C2I(**{**TINY, **kwargs})


def test_wrong_inputs_are_named(tiny_c2i, tiny_t2i):
    t = torch.tensor([0.5])
    with pytest.raises(ValueError, match="patch_size=2"):
        tiny_c2i(torch.randn(1, 4, 7, 8), t, t, torch.tensor([0]))
    with pytest.raises(ValueError, match="4 channels"):
        tiny_c2i(torch.randn(1, 3, 8, 8), t, t, torch.tensor([0]))
    with pytest.raises(ValueError, match="cap_feat_dim=20"):
        tiny_t2i(torch.randn(1, 4, 8, 8), t, t, torch.randn(1, 5, 16))
