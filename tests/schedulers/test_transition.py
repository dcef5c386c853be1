"""The objective: goldens, identities, corrections, and what it must not do."""

import copy

import pytest
import torch
from helpers.networks import load_golden, relative_error

from tim.schedulers import transports
from tim.schedulers.derivative import MIN_DIFFERENCE, difference_times
from tim.schedulers.losses import denoising_loss
from tim.schedulers.transition import TIME_WEIGHTS, TransitionSchedule
from tim.schedulers.transports import EDM, OT_FM, VE_SDE, VP_SDE, TrigFlow

ALL = (OT_FM, TrigFlow, EDM, VP_SDE, VE_SDE)
LOSSES = [(name, j) for name in ("c2i_tiny", "t2i_tiny") for j in range(6)]


class FixedTimes(TransitionSchedule):
    """A schedule whose times are given."""

    times: tuple

    def sample_t_and_r(self, batch_size, dtype, device):
        return self.times


def fixed(transport, t, r, n_diffusion, **kwargs):
    schedule = FixedTimes(transport, **kwargs)
    schedule.times = (t, r, n_diffusion)
    return schedule


@pytest.mark.parametrize("name,j", LOSSES)
def test_goldens(name, j):
    meta, d, network = load_golden(name)
    case = meta["loss"][j]
    transport = getattr(transports, case["transport"])(**case["transport_params"])
    targets = {}
    original = transport.target
    transport.target = lambda *a, **k: targets.setdefault("F", original(*a, **k))
    schedule = fixed(
        transport,
        d["t_loss"],
        d["r_loss"],
        case["n_diffusion"],
        differential_epsilon=case["differential_epsilon"],
        **case["loss_params"],
    )
    weighted, projection, log = schedule(
        network,
        network,
        network,
        6,
        d["x_clean"],
        d["z_noise"],
        {"y": d["y"]},
        use_dir_loss=True,
        h_target=d["h_target"],
        null_kwargs={"y": d["y_null"]},
    )
    assert relative_error(targets["F"], d[f"loss_{j}.F_target"]) < 1e-3
    assert weighted.item() == pytest.approx(case["weighted_loss"], rel=1e-5)
    assert projection.item() == pytest.approx(case["proj_loss"], rel=1e-5)
    assert log["denoising_loss"].item() == pytest.approx(case["denoising_loss"], rel=1e-5)
    assert set(log) == {"weighted_loss", "denoising_loss", "proj_loss"}
    (weighted + projection).backward()
    grads = {k: p.grad for k, p in network.named_parameters()}
    norm = torch.sqrt(sum((g**2).sum() for g in grads.values() if g is not None))
    assert norm.item() == pytest.approx(case["grad_norm"], rel=1e-3)
    stored = {k.split(".grad.")[1]: v for k, v in d.items() if k.startswith(f"loss_{j}.grad.")}
    assert len(stored) == 5
    for key, value in stored.items():
        assert relative_error(grads[key], value) < 1e-3, key


def smooth_network(x, t, r, y=None, **_):
    """A function with a known derivative in every argument."""
    t, r = (u.reshape(-1, 1, 1, 1) / 100 for u in (t, r))  # VP's c_noise reaches 999
    return torch.sin(x) * (1 + t) + torch.cos(t * (1 + r)) * x**2


def derivative_case(cls, dtype=torch.float64):
    transport = cls()
    g = torch.Generator().manual_seed(0)
    x, z = (torch.randn(8, 2, 3, 3, generator=g, dtype=dtype) for _ in range(2))
    a, b = (transport.sample_t(8, normal=torch.randn(8, generator=g)).to(dtype) for _ in range(2))
    return transport, x, z, torch.maximum(a, b), torch.minimum(a, b)


@pytest.mark.parametrize("cls", ALL)
def test_jvp_equals_the_derivative_along_the_path(cls):
    """d/ds F(x_{t+s}, t+s, r) at s = 0 by reverse mode over a scalar s."""
    transport, x, z, t, r = derivative_case(cls)
    schedule = TransitionSchedule(transport, derivative_type="jvp")
    got = schedule.derivative(smooth_network, x, z, t, r, 0, {})

    def along(s):
        u = (t + s).reshape(-1, 1, 1, 1)
        at = transport.interpolant(u)
        return smooth_network(at.alpha * x + at.sigma * z, transport.c_noise(t + s), transport.c_noise(r))

    want = torch.autograd.functional.jvp(along, torch.zeros(8, dtype=x.dtype), torch.ones(8, dtype=x.dtype))[1]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cls", ALL)
def test_dde_converges_to_jvp(cls):
    transport, x, z, t, r = derivative_case(cls)
    inside = (t - r > 0.02) & (t < transport.T_max - 0.01) & (t > transport.T_min + 0.05)
    x, z, t, r = (v[inside] for v in (x, z, t, r))
    exact = TransitionSchedule(transport, derivative_type="jvp").derivative(smooth_network, x, z, t, r, 0, {})
    errors = []
    for epsilon in (0.004, 0.002):
        schedule = TransitionSchedule(transport, differential_epsilon=epsilon)
        errors.append((schedule.derivative(smooth_network, x, z, t, r, 0, {}) - exact).abs().max())
    assert errors[1] < 0.3 * errors[0]  # second order: a quarter


@pytest.mark.parametrize("cls", ALL)
def test_difference_times_stay_inside_the_domain_and_on_one_side_of_r(cls):
    transport = cls()
    ends = torch.tensor([transport.T_min, transport.T_max])
    g = torch.Generator().manual_seed(0)
    a, b = (transport.sample_t(4000, normal=torch.randn(4000, generator=g) * 2) for _ in range(2))
    t, r = torch.maximum(a, b), torch.minimum(a, b)
    t = torch.cat([t, ends[1:].expand(100), r[:100] + 1e-5, r[:100]]).clamp(max=transport.T_max)
    r = torch.cat([r, r[:100], r[:100], r[:100]])
    hi, lo = difference_times(t, r, transport, 0.005)
    assert hi.max() <= transport.T_max + 1e-6 * transport.T_max and lo.min() >= transport.T_min - 1e-7
    assert (hi > lo).all(), "every sample has a difference"
    room = t - r >= 2 * MIN_DIFFERENCE
    assert (lo[room] >= r[room] - 1e-7 * transport.T_max).all()
    central = (hi - t > 0) & (t - lo > 0)
    spacing = 2 * torch.finfo(torch.float32).eps * t
    assert (((hi - t) - (t - lo)).abs() <= 2 * spacing + 1e-7)[central].all()


@pytest.mark.parametrize("kind", ["dde", "jvp"])
def test_vp_has_no_nan_up_to_both_ends(kind, tiny_c2i):
    """The reference's differences leave the domain and turn into NaN."""
    transport = VP_SDE()
    t = torch.tensor([1.0, 1.0, 0.002, 1e-5, 0.5])
    r = torch.tensor([1e-5, 0.9999, 1e-5, 1e-5, 0.4999])
    schedule = fixed(transport, t, r, 0, derivative_type=kind)
    x, z = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8)
    weighted, _, log = schedule(tiny_c2i, None, tiny_c2i, 5, x, z, {"y": torch.arange(5)})
    weighted.backward()
    assert torch.isfinite(weighted) and torch.isfinite(log["denoising_loss"])
    assert all(torch.isfinite(p.grad).all() for p in tiny_c2i.parameters() if p.grad is not None)


@pytest.mark.parametrize("cls", [EDM, VE_SDE])
def test_guided_targets_are_finite_and_see_c_noise_once(cls, tiny_c2i):
    transport = cls(enhance_target=True, w_cond=0.75, w_start=0.0, w_end=100.0)
    seen = []

    def spy(x, t, r, **kwargs):
        seen.append(t)
        return tiny_c2i(x, t, r, **kwargs)

    t = torch.tensor([1.0, 5.0, 50.0])
    schedule = fixed(transport, t, t / 2, 0)
    x, z, y = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.arange(3)
    weighted, _, _ = schedule(tiny_c2i, spy, tiny_c2i, 3, x, z, {"y": y}, null_kwargs={"y": torch.full_like(y, 10)})
    assert torch.isfinite(weighted)
    assert len(seen) == 2 and all(torch.equal(s, transport.c_noise(t)) for s in seen)


def test_model_guidance_only_inside_the_window():
    transport = OT_FM(enhance_target=True, w_gt=1.0, w_cond=0.75, w_start=0.3, w_end=0.8)
    t = torch.tensor([0.1, 0.3, 0.5, 0.8, 0.9]).reshape(-1, 1, 1, 1)
    F, F_c, F_u = (torch.randn(5, 1, 2, 2) for _ in range(3))
    got = transport.guided_target(F, t, F_c, F_u)
    want = F + 0.75 * (F_c - F_u)
    torch.testing.assert_close(got[1:4], want[1:4])
    assert torch.equal(got[[0, 4]], F[[0, 4]])


@pytest.mark.parametrize("cls", ALL)
def test_guided_path_moves_along_the_guided_velocity(cls):
    """The derivative along the guided path has x-tangent a0 x_t + b0 F~, with a0 = dA/dr and b0 = dB/dr at r = t."""
    transport, x, z, t, _ = derivative_case(cls)
    transport.enhance_target, transport.w_cond, transport.w_start, transport.w_end = True, 0.75, 0.0, 1e9
    schedule = TransitionSchedule(transport, guidance_path="guided")
    t_x = t.reshape(-1, 1, 1, 1)
    at = transport.interpolant(t_x)
    x_t = at.alpha * x + at.sigma * z
    F_c, F_u = torch.randn_like(x), torch.randn_like(x)
    px, pz = schedule.path_along(x_t, schedule.diffusion_target(x, z, t, (F_c, F_u)), t, x.dtype)
    torch.testing.assert_close(at.alpha * px + at.sigma * pz, x_t, rtol=1e-7, atol=1e-7)
    r = t_x.clone().requires_grad_()
    a, b = transports.Transport.transition(transport, t_x, r)
    (a0,) = torch.autograd.grad(a.sum(), r, retain_graph=True)
    (b0,) = torch.autograd.grad(b.sum(), r)
    F_guided = transport.guided_target(transport.diffusion_target(x, z, t_x), t_x, F_c, F_u)
    velocity = at.d_alpha * px + at.d_sigma * pz
    torch.testing.assert_close(velocity, a0 * x_t + b0 * F_guided, rtol=1e-5, atol=1e-6)


def test_guided_path_equals_the_data_path_outside_of_the_guided_window(tiny_c2i):
    t, null = torch.tensor([0.9, 0.6]), {"y": torch.full((2,), 10)}
    losses = []
    for path in ("data", "guided"):
        torch.manual_seed(0)
        transport = OT_FM(enhance_target=True, w_cond=0.75, w_start=0.1, w_end=0.2)
        schedule = fixed(transport, t, t / 3, 0, tangent=path)
        x, z = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
        log = schedule(tiny_c2i, tiny_c2i, tiny_c2i, 2, x, z, {"y": torch.arange(2)}, null_kwargs=null)[2]
        losses.append(log["denoising_loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_shares_of_the_batch():
    schedule = TransitionSchedule(OT_FM(), diffusion_ratio=0.5, consistency_ratio=0.1)
    t, r, n = schedule.sample_t_and_r(40, torch.bfloat16, "cpu")
    assert n == 20 and t.dtype == r.dtype == torch.float32
    assert torch.equal(t[:20], r[:20]) and (r[36:] == 0).all()
    assert (t[20:36] > r[20:36]).all() and (r[20:36] > 0).all()


def test_shares_hold_over_the_global_batch():
    """Two combs through a global batch of 10 together have what one batch of 10 has."""
    schedule = TransitionSchedule(OT_FM(), diffusion_ratio=0.5, consistency_ratio=0.1)
    normal = torch.randn(10, 2)
    whole_t, whole_r, n = schedule.sample_t_and_r(10, torch.float32, "cpu", normal=normal)
    parts = []
    for rank in (0, 1):
        places = torch.arange(rank, 10, 2)
        t, r, part_n = schedule.sample_t_and_r(
            5, torch.float32, "cpu", normal=normal[places], position=places, global_batch_size=10
        )
        assert torch.equal(t, whole_t[places]) and torch.equal(r, whole_r[places])
        assert torch.equal(t[:part_n], r[:part_n])
        parts.append(part_n)
    assert sum(parts) == n == 5


@pytest.mark.parametrize("kind", list(TIME_WEIGHTS))
def test_time_weights(kind):
    t, r, s = torch.tensor([0.9, 0.5]), torch.tensor([0.9, 0.2]), 0.5
    schedule = TransitionSchedule(OT_FM(sigma_d=s), weight_time_type=kind, weight_time_tangent=True)
    delta = torch.tan(torch.tensor(0.5)) - torch.tan(torch.tensor(0.2))
    want = {
        "constant": 1.0,
        "reciprocal": 1 / (delta + s),
        "sqrt": (delta + s) ** -0.5,
        "square": (delta + s) ** -2,
        "Soft-Min-SNR": 1 / (delta**2 + s**2),
    }[kind]
    weight = schedule.time_weight(t, r, 1)
    assert weight[0] == 1 and weight[1].item() == pytest.approx(float(want), rel=1e-6)


def test_tangent_weight_of_noise_level_transports():
    """EDM and VE weigh by sigma / (alpha sigma_d), positive and increasing, instead of the tangent of a noise level."""
    for transport in (EDM(), VE_SDE()):
        t = torch.tensor([0.02, 1.6, 80.0])
        torch.testing.assert_close(transport.weight_tangent(t), t / transport.sigma_d)


def test_dde_is_one_forward_and_skips_the_diffusion_samples(tiny_c2i):
    sizes = []

    def spy(x, t, r, **kwargs):
        sizes.append((len(x), kwargs["jvp"], len(kwargs["y"])))
        return tiny_c2i(x, t, r, **kwargs)

    t = torch.full((6,), 0.7)
    r = torch.tensor([0.7, 0.7, 0.1, 0.2, 0.3, 0.0])
    schedule = fixed(OT_FM(), t, r, 2)
    x, z = torch.randn(6, 4, 8, 8), torch.randn(6, 4, 8, 8)
    schedule(tiny_c2i, None, spy, 6, x, z, {"y": torch.arange(6)})
    assert sizes == [(8, True, 8)]


def test_callers_dictionaries_and_global_rng_are_left_alone(tiny_c2i):
    schedule = TransitionSchedule(OT_FM(enhance_target=True), diffusion_ratio=0.5)
    model_kwargs, null_kwargs = {"y": torch.arange(4)}, {"y": torch.full((4,), 10)}
    before = copy.deepcopy((model_kwargs, null_kwargs))
    x, z = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    rng_before = torch.random.get_rng_state()
    schedule(
        tiny_c2i, tiny_c2i, tiny_c2i, 4, x, z, model_kwargs, h_target=torch.randn(4, 16, 12, generator=torch.Generator()),
        null_kwargs=null_kwargs, time_kwargs={"normal": torch.zeros(4, 2)},
    )  # fmt: skip
    assert torch.equal(torch.random.get_rng_state(), rng_before)
    for old, new in zip(before, (model_kwargs, null_kwargs), strict=True):
        assert old.keys() == new.keys() and torch.equal(old["y"], new["y"])


def test_return_zs_among_the_conditions_changes_nothing(tiny_c2i):
    """Trainers of the published code ask for the projection there, with features and without."""
    schedule = TransitionSchedule(OT_FM(enhance_target=True, w_cond=0.5), diffusion_ratio=0.5)
    x, z = torch.randn(2, 4, 4, 8, 8)
    cond, null = {"y": torch.arange(4)}, {"y": torch.full((4,), 10)}
    times = {"normal": torch.randn(4, 2)}
    for h_target in (None, torch.randn(4, 16, 12)):
        arguments = (tiny_c2i, tiny_c2i, tiny_c2i, 4, x, z)
        want = schedule(*arguments, cond, h_target=h_target, null_kwargs=null, time_kwargs=times)
        asked = {"h_target": h_target, "null_kwargs": null | {"return_zs": True}, "time_kwargs": times}
        for ema_kwargs in (None, cond | {"return_zs": True}):
            got = schedule(*arguments, cond | {"return_zs": True, "jvp": False}, ema_kwargs=ema_kwargs, **asked)
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("where", ["x", "z"])
def test_a_non_finite_sample_is_dropped_without_poisoning_the_gradient(where, tiny_c2i):
    t, r = torch.full((4,), 0.7), torch.tensor([0.7, 0.1, 0.2, 0.3])
    x, z, y = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.arange(4)

    def run(x, z, keep):
        schedule = fixed(OT_FM(), t[keep], r[keep], 1)
        tiny_c2i.zero_grad()
        loss, _, log = schedule(tiny_c2i, None, tiny_c2i, len(keep), x[keep], z[keep], {"y": y[keep]}, use_dir_loss=True)
        loss.backward()
        return log, torch.cat([p.grad.flatten() for p in tiny_c2i.parameters() if p.grad is not None])

    want_log, want = run(x, z, [0, 1, 3])
    bad = {"x": x.clone(), "z": z.clone()}
    bad[where][2, 0, 0, 0] = float("nan")
    got_log, got = run(bad["x"], bad["z"], [0, 1, 2, 3])
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert got_log["denoising_loss"].item() == pytest.approx(want_log["denoising_loss"].item(), rel=1e-5)


def test_projection_is_zero_without_features(tiny_c2i):
    schedule = TransitionSchedule(OT_FM())
    _, projection, log = schedule(
        tiny_c2i, None, tiny_c2i, 2, torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), {"y": torch.arange(2)}
    )
    assert projection.item() == 0 and log["proj_loss"].item() == 0


@pytest.mark.parametrize("kind", ["dde", "jvp"])
def test_half_precision_spoils_the_difference_unless_it_runs_in_float32(kind, tiny_c2i):
    """The default is float32 for dde and the ambient precision for jvp, whose error stays small."""
    transport, _, _, t, r = derivative_case(OT_FM, torch.float32)
    x, z, kwargs = torch.randn(8, 4, 8, 8), torch.randn(8, 4, 8, 8), {"y": torch.arange(8)}

    def derivative(dtype):
        return TransitionSchedule(transport, derivative_type=kind, derivative_dtype=dtype).derivative(
            tiny_c2i, x, z, t, r, 0, kwargs
        )

    exact = derivative(None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        errors = {d: ((derivative(d) - exact).norm() / exact.norm()).item() for d in (None, "float32", "bfloat16")}
    assert errors["float32"] < 1e-6
    if kind == "dde":
        assert errors[None] < 1e-6 and errors["bfloat16"] > 0.1
    else:
        assert errors[None] == errors["bfloat16"] < 0.05


@pytest.mark.parametrize(
    "kwargs,match",
    [
        ({"derivative_type": "dd"}, "derivative_type='dd'"),
        ({"weight_time_type": "sqr"}, "weight_time_type"),
        ({"diffusion_ratio": 0.8, "consistency_ratio": 0.4}, "sum to <= 1"),
        ({"differential_epsilon": 0}, "differential_epsilon"),
        ({"guidance_path": "x"}, "guidance_path='x'"),
        ({"tangent": "x"}, "tangent='x'"),
        ({"tangent": "guided"}, "set enhance_target"),
        ({"guidance_path": "guided"}, "set enhance_target"),
        ({"tangent": "marginal", "guidance_path": "guided"}, "give one"),
        ({"two_point_ratio": 0.0}, "two_point_ratio=0.0 must be a number in"),
        ({"two_point_ratio": [1.0, 1.5]}, "two_point_ratio"),
        ({"two_point_ratio": [1.0]}, "two_point_ratio"),
        ({"two_point_ratio": "0.1"}, "two_point_ratio='0.1' must be a number in"),
        ({"tangent_warmup": -1}, "tangent_warmup"),
        ({"residual_clip": 0.0}, "residual_clip"),
        ({"derivative_dtype": "int8"}, "derivative_dtype"),
    ],
)
def test_impossible_settings_are_refused(kwargs, match):
    with pytest.raises(ValueError, match=match):
        TransitionSchedule(OT_FM(), **kwargs)


def test_sigmoid_weight_is_for_flow_matching_alone():
    with pytest.raises(ValueError, match="OT_FM alone"):
        TransitionSchedule(EDM(), weight_time_sigmoid=True)


def test_model_guidance_without_an_ema_model_is_refused(tiny_c2i):
    with pytest.raises(ValueError, match="ema_model"):
        TransitionSchedule(OT_FM(enhance_target=True))(
            tiny_c2i, None, tiny_c2i, 2, torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), {"y": torch.arange(2)}
        )


def test_the_directional_term_is_the_cosine_wherever_f_has_a_direction():
    """Where F is 0, as in the first step of training, it has no gradient instead of one of 1e8."""
    F_target = torch.randn(2, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    F_pred = torch.randn(2, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kept = torch.ones(2, dtype=torch.bool)
    cosine = (F_pred * F_target).sum(1) / F_pred.norm(dim=1) / F_target.norm(dim=1)
    plain = denoising_loss(F_pred, F_target, kept, use_dir_loss=False)
    directional = denoising_loss(F_pred, F_target, kept, use_dir_loss=True) - plain
    assert torch.allclose(directional, (1 - cosine).flatten(1).mean(1), rtol=1e-12, atol=0)

    start = F_pred.clone()
    start[:, :, 0] = 0
    start.requires_grad_()
    losses = (denoising_loss(start, F_target, kept, use_dir_loss).sum() for use_dir_loss in (True, False))
    (directional,), (plain,) = (torch.autograd.grad(loss, start) for loss in losses)
    assert torch.equal(directional[:, :, 0], plain[:, :, 0]) and not torch.equal(directional[:, :, 1], plain[:, :, 1])
