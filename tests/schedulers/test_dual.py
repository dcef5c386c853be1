"""F and dF/dt in one pass, against forward-mode differentiation in float64; what it costs."""

import pytest
import torch
from helpers.networks import TINY, randomize
from helpers.paths import ROOT
from torch.utils.flop_counter import FlopCounterMode

from tim.config import load_config
from tim.models.c2i.tim_model import TiM as C2I
from tim.models.t2i.tim_model import TiM as T2I
from tim.models.trunk import NEW_CONDITIONS
from tim.schedulers import derivative, target
from tim.schedulers.transition import TransitionSchedule
from tim.schedulers.transports import EDM, OT_FM, VE_SDE, VP_SDE, TrigFlow

B, TOKENS = 6, 7
GUIDED = {"enhance_target": True, "w_cond": 0.75, "w_gt": 0.5}


def draws(seed=0):
    g = torch.Generator().manual_seed(seed)
    x, z = (torch.randn(B, 4, 8, 12, generator=g, dtype=torch.float64) for _ in range(2))
    return g, x, z


def conditions(network, g):
    """Condition and null condition of a batch; captions of different lengths."""
    if isinstance(network, C2I):
        return {"y": torch.randint(0, 10, (B,), generator=g)}, {"y": torch.full((B,), 10)}
    y = torch.randn(B, TOKENS, 20, generator=g, dtype=torch.float64)
    mask = torch.arange(TOKENS)[None] < torch.randint(1, TOKENS + 1, (B, 1), generator=g)
    return {"y": y, "y_mask": mask}, {"y": y[:, :1], "y_mask": None}


def losses_and_gradients(network, transport, repa=True, normal=None, **options):
    """The objective's three results and the gradient of every parameter."""
    g, x, z = draws()
    cond, uncond = conditions(network, g)
    features = torch.randn(B, 24, TINY["z_dim"], generator=g, dtype=torch.float64) if repa else None
    times = {"normal": torch.randn(B, 2, generator=g) if normal is None else normal}
    options = {"diffusion_ratio": 0.34, "consistency_ratio": 0.17, "weight_time_type": "sqrt", **options}
    schedule = TransitionSchedule(transport, derivative_type="jvp", weight_time_tangent=True, **options)
    network.zero_grad()
    drawn = {"time_kwargs": times, "guidance_kwargs": {"uniform": torch.rand(B, 4, generator=g)}}
    weighted, projection, log = schedule(
        network, network, network, B, x, z, cond, use_dir_loss=True, h_target=features, null_kwargs=uncond, **drawn
    )
    (weighted + projection).backward()
    return [*log.values()], {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def by_forward_mode(monkeypatch, *args, **kwargs):
    """`losses_and_gradients` of a network that is taken for one without tangents."""
    with monkeypatch.context() as patch:
        for module in (derivative, target):
            patch.setattr(module, "carries_tangents", lambda network: False)
        return losses_and_gradients(*args, **kwargs)


def build(cls, **params):
    own = {"num_classes": 10} if cls is C2I else {"cap_feat_dim": 20}
    return randomize(cls(**{**TINY, "rope_grid": "row_major", **own, **params}).double())


CASES = {
    **{f"c2i-{t.__name__}": (C2I, t, {}, {}) for t in (OT_FM, TrigFlow, EDM, VP_SDE, VE_SDE)},
    **{f"t2i-{t.__name__}": (T2I, t, {}, {}) for t in (OT_FM, TrigFlow, EDM, VP_SDE, VE_SDE)},
    **{f"condition-{c}": (C2I, OT_FM, {"new_condition": c}, {}) for c in NEW_CONDITIONS},
    "one-embedder": (C2I, OT_FM, {"use_new_embed": False, "qk_norm": False, "distance_aware": False}, {}),
    "c2i-checkpointing": (C2I, OT_FM, {"use_checkpoint": True}, {}),
    "t2i-checkpointing": (T2I, OT_FM, {"use_checkpoint": True}, {}),
    "flash-checkpointing": (C2I, OT_FM, {"use_checkpoint": True, "tangent_form": "flash"}, {}),
    "without-repa": (T2I, TrigFlow, {}, {"repa": False}),
    "guidance-data": (C2I, OT_FM, {}, {"guidance_path": "data"}),
    "guidance-guided": (T2I, OT_FM, {}, {"guidance_path": "guided"}),
    "guidance-guided-EDM": (C2I, EDM, {}, {"guidance_path": "guided"}),
    "marginal": (C2I, OT_FM, {}, {"tangent": "marginal"}),
    "marginal-masked-EDM": (T2I, EDM, {}, {"tangent": "marginal"}),
    "guidance-input": (C2I, TrigFlow, {"guidance_input": True}, {"guidance_max": 4.0}),
    "guidance-input-masked": (T2I, OT_FM, {"guidance_input": True}, {"guidance_max": 4.0, "tangent": "marginal"}),
    "all-diffusion": (C2I, OT_FM, {}, {"diffusion_ratio": 1.0, "consistency_ratio": 0.0}),
    "no-diffusion": (C2I, OT_FM, {}, {"diffusion_ratio": 0.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_forward_mode(case, monkeypatch):
    """The gradients too: they are of the loss whose target holds dF/dt, sample by sample."""
    cls, transport, params, options = CASES[case]
    transport = transport(**(GUIDED if "guidance_path" in options else {}))
    network = build(cls, **params)
    log, gradients = losses_and_gradients(network, transport, **options)
    want_log, want = by_forward_mode(monkeypatch, network, transport, **options)
    assert torch.stack(log).tolist() == pytest.approx(torch.stack(want_log).tolist(), rel=1e-12)
    assert gradients.keys() == want.keys()
    for name, gradient in gradients.items():
        assert (gradient - want[name]).norm() <= 1e-12 * want[name].norm() + 1e-15, name


@pytest.mark.parametrize("cls", [C2I, T2I])
@pytest.mark.parametrize("rows", [1, 4, B])
def test_the_value_is_the_plain_pass_bit_for_bit_and_the_tangent_has_no_graph(cls, rows):
    network = build(cls)
    g, x, velocity = draws()
    cond, _ = conditions(network, g)
    t, r = (torch.rand(B, generator=g, dtype=torch.float64) for _ in range(2))
    one = torch.ones(rows, dtype=torch.float64)
    F, dF_dt, zs = network(x, t, r, **cond, return_zs=True, tangents=(velocity[:rows], one, torch.zeros_like(one)))
    plain, plain_zs = network(x, t, r, **cond, return_zs=True)
    assert torch.equal(F, plain) and torch.equal(zs, plain_zs)
    assert dF_dt.shape == (rows, 4, 8, 12) and not dF_dt.requires_grad and F.requires_grad


def flops(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("name,cond", [("c2i/tim_xl_p2_256", "class"), ("t2i/tim_xl_p1_t2i", "caption")])
def test_the_derivative_costs_about_half_of_the_difference_quotients(name, cond):
    """Of a batch of 64 of the published networks, half of them with r = t."""
    with torch.device("meta"):
        network = load_config(ROOT / f"configs/{name}.yaml").model.network.build().requires_grad_(False)
        side = network.input_size
        x, t = torch.zeros(64, network.in_channels, side, side), torch.zeros(64)
        y = torch.zeros(64, dtype=torch.long) if cond == "class" else torch.zeros(64, 256, network.cap_feat_dim)
        tangents = (x[32:], t[32:], t[32:])
    forward = flops(lambda: network(x, t, t, y))
    dual = flops(lambda: network(x, t, t, y, tangents=tangents)) - forward
    difference = flops(lambda: network(x, t, t, y))  # two passes over the 32 samples with r < t
    assert 0.3 * difference < dual <= 0.55 * difference
