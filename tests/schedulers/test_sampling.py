"""The sampler: goldens, closed forms, guidance window, grids, noise."""

import warnings

import pytest
import torch
from helpers.networks import TINY, load_golden, randomize, relative_error

from tim.models.c2i.tim_model import TiM
from tim.schedulers.sampling import _predictor, follow, guided_steps, plan_steps, sample
from tim.schedulers.transition import TransitionSchedule
from tim.schedulers.transports import EDM, OT_FM, VE_SDE, VP_SDE, TrigFlow

ALL = (OT_FM, TrigFlow, EDM, VP_SDE, VE_SDE)


@pytest.mark.parametrize("name,i", [(n, i) for n in ("c2i_tiny", "t2i_tiny") for i in range(5)])
def test_goldens(name, i):
    meta, d, network = load_golden(name)
    case = meta["sampling"][i]
    states = TransitionSchedule(OT_FM(P_mean=-0.4)).sample(
        network, d["y"], d["y_null"], d["z"], case["T_max"], case["T_min"], case["num_steps"],
        case["cfg_scale"], case["cfg_low"], case["cfg_high"], 0.0, "transition",
    )  # fmt: skip
    assert states.dtype == torch.float32 and states.shape == d[case["key"]].shape
    assert relative_error(states, d[case["key"]]) < 1e-5


def exact_network(transport, x0):
    """F* of a single data point: the flow map of a distribution that is that point."""

    def network(x, c_t, c_r, y=None):
        t = network.time.reshape(1, 1, 1, 1)
        at, hat = transport.interpolant(t), transport.prediction(t)
        z = (x - at.alpha * x0) / at.sigma
        return hat.alpha_hat * x0 + hat.sigma_hat * z

    return network


@pytest.mark.parametrize("sample_type", ["transition", "diffusion"])
@pytest.mark.parametrize("rho", [0.0, 0.3])
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("cls", ALL)
def test_exact_predictions_end_on_the_data(cls, steps, rho, sample_type):
    transport = cls()
    g = torch.Generator().manual_seed(0)
    x0, z = (torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=g) for _ in range(2))
    network = exact_network(transport, x0)
    grid = transport.time_grid(steps, transport.T_max, transport.T_min)
    network.time = grid[0]
    advance = iter(grid[1:])
    result = sample(
        transport, network, z, {}, num_steps=steps, stochasticity_ratio=rho, sample_type=sample_type,
        callback=lambda i, r, x: setattr(network, "time", next(advance)),
    )  # fmt: skip
    end = transport.interpolant(torch.tensor(transport.T_min, dtype=torch.float64))
    scale = transport.final_state(torch.ones(()), transport.T_min)
    spread = float(end.sigma * scale) * 6 + 1e-6  # what noise is left at T_min
    assert (result.x - end.alpha * scale * x0).abs().max() <= spread
    assert result.nfe == steps


@pytest.mark.parametrize("cls", ALL)
def test_diffusion_steps_converge_for_gaussian_data(cls):
    """For N(0, s²) data the velocity is linear, so many small diffusion steps must map unit noise to standard deviation s."""
    transport = cls(sigma_d=1.0)
    s = 0.7

    def network(x, c_t, c_r):
        t = network.time
        at, hat = transport.interpolant(t), transport.prediction(t)
        var = at.alpha**2 * s**2 + at.sigma**2
        return (hat.alpha_hat * at.alpha * s**2 + hat.sigma_hat * at.sigma) / var * x

    steps = 400
    grid = transport.time_grid(steps, transport.T_max, transport.T_min)
    network.time = grid[0]
    advance = iter(grid[1:])
    z = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    x = sample(
        transport, network, z, {}, num_steps=steps, sample_type="diffusion",
        callback=lambda i, r, x: setattr(network, "time", next(advance)),
    ).x  # fmt: skip
    assert x.item() == pytest.approx(s, rel=0.02)


def test_guidance_window_is_strict():
    times = [1.0, 0.75, 0.5, 0.25, 0.0]
    assert guided_steps(times, 1.0, 2.5, 0.0, 1.0) == [False, True, True, True]
    assert guided_steps(times, 1.0, 2.5, 0.0, 1.0, guide_first_step=True) == [True] * 4
    assert guided_steps(times, 1.0, 2.5, 0.25, 0.75) == [False, False, True, False]
    assert guided_steps(times, 1.0, 1.0, 0.0, 1.0) == [False] * 4


def test_nfe_is_what_the_network_saw(tiny_c2i):
    calls = []

    def spy(x, t, r, y):
        calls.append(len(x))
        return tiny_c2i(x, t, r, y)

    z, y = torch.randn(3, 4, 8, 8), torch.arange(3)
    null = torch.full_like(y, 10)
    assert sample(OT_FM(), spy, z, {"y": y}, {"y": null}, num_steps=4, cfg_scale=2.5).nfe == 7
    assert calls == [3, 6, 6, 6]
    closed = sample(OT_FM(), spy, z, {"y": y}, {"y": null}, num_steps=1, cfg_scale=2.5, guide_first_step=True)
    assert closed.nfe == 2


def test_one_guided_step_warns(tiny_c2i):
    z, y = torch.randn(1, 4, 8, 8), torch.zeros(1, dtype=torch.long)
    with pytest.warns(UserWarning, match="has no effect"):
        sample(OT_FM(), tiny_c2i, z, {"y": y}, {"y": y + 10}, num_steps=1, cfg_scale=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(OT_FM(), tiny_c2i, z, {"y": y}, num_steps=1)


def test_guidance_mixes_the_two_predictions(tiny_c2i):
    z, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    null = torch.full_like(y, 10)
    got = sample(OT_FM(), tiny_c2i, z, {"y": y}, {"y": null}, times=[0.8, 0.3], cfg_scale=3.0, guide_first_step=True).x
    with torch.no_grad():
        t, r = torch.full((2,), 0.8), torch.full((2,), 0.3)
        F_c, F_u = tiny_c2i(z, t, r, y), tiny_c2i(z, t, r, null)
    want = z + (0.3 - 0.8) * (F_u + 3.0 * (F_c - F_u))
    torch.testing.assert_close(got.float(), want, rtol=1e-5, atol=1e-5)


def test_custom_grid_and_callback(tiny_c2i):
    seen = []
    z, y = torch.randn(1, 4, 8, 8), torch.zeros(1, dtype=torch.long)
    result = sample(
        OT_FM(), tiny_c2i, z, {"y": y}, times=[1.0, 0.9, 0.2, 0.0], return_trajectory=True,
        callback=lambda i, r, x: seen.append((i, r, x.clone())),
    )  # fmt: skip
    assert [s[:2] for s in seen] == [(0, 0.9), (1, 0.2), (2, 0.0)]
    assert len(result.trajectory) == 4 and torch.equal(seen[-1][2], result.x)


def test_network_sees_float32_times_and_its_own_dtype(tiny_c2i):
    network, seen = tiny_c2i.to(torch.bfloat16), []
    network.register_forward_pre_hook(lambda _, args: seen.append([a.clone() for a in args[:3]]))
    x = sample(OT_FM(), network, torch.randn(1, 4, 8, 8), {"y": torch.zeros(1, dtype=torch.long)}, num_steps=500).x
    assert x.dtype == torch.float64
    assert all(a.dtype == torch.bfloat16 and t.dtype == r.dtype == torch.float32 for a, t, r in seen)
    assert all(t > r for _, t, r in seen), "no step of zero length"


def test_a_plan_is_made_once_for_any_number_of_batches(tiny_c2i, monkeypatch):
    y, settings = torch.arange(2), {"num_steps": 5, "cfg_scale": 2.0, "stochasticity_ratio": 0.3}
    transport, noise = EDM(), torch.randn(2, 4, 8, 8)
    plan = plan_steps(transport, noise.device, **settings)
    for z in torch.randn(2, 2, 4, 8, 8):
        arguments = tiny_c2i, z, {"y": y}, {"y": y + 8}
        want = sample(transport, *arguments, **settings, noise_fn=lambda i: noise)
        with monkeypatch.context() as patched:
            for formula in ("interpolant", "prediction", "c_noise", "transition", "time_grid"):
                patched.setattr(EDM, formula, None)  # the loop has no use for them
            got = follow(plan, *arguments, noise_fn=lambda i: noise)
        assert torch.equal(got.x, want.x) and got.nfe == want.nfe == plan.nfe == 9


def test_a_step_is_one_graph_for_each_kind_of_step():
    """Without a break, and without a new one for other times: guided or not, renoised or not."""
    graphs, y, network = [], torch.arange(2), randomize(TiM(num_classes=10, **{**TINY, "depth": 1}))

    def compiler(graph, _):
        graphs.append(graph)
        return graph

    plan = plan_steps(OT_FM(), y.device, num_steps=8, cfg_scale=2.0, stochasticity_ratio=0.3)
    predict = _predictor(plan, network, torch.empty(2, 4, 8, 8), {"y": y}, {"y": torch.full_like(y, 10)})
    step = torch.compile(lambda x, s, noise: s.jump(x, predict(x, s).to(x.dtype), noise), backend=compiler, fullgraph=True)
    x = noise = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        for s in plan.steps:
            x = step(x, s, noise if s.is_renoised else None)
    assert len(graphs) == 3 and x.isfinite().all()


def test_a_transport_may_say_itself_how_to_jump(tiny_c2i):
    class Own(OT_FM):
        def from_x_t_to_x_r(self, x_t, t, r, F, s_ratio=0.0, noise=None):
            return x_t * (1 + r - t)

    z, y = torch.randn(2, 4, 8, 8), torch.arange(2)
    assert torch.allclose(sample(Own(), tiny_c2i, z, {"y": y}, num_steps=2).x, z.double() / 4)


def test_renoising_spares_the_first_and_last_step_and_uses_the_given_noise(tiny_c2i):
    asked = []

    def noise(step):
        asked.append(step)
        return torch.zeros(2, 4, 8, 8)

    z, y = torch.randn(2, 4, 8, 8), torch.arange(2)
    for transport in (OT_FM(), EDM()):
        asked.clear()
        sample(transport, tiny_c2i, z, {"y": y}, num_steps=5, stochasticity_ratio=0.5, noise_fn=noise)
        assert asked == [1, 2, 3]


@pytest.mark.parametrize(
    "kwargs,match",
    [
        ({"num_steps": 0}, "num_steps"),
        ({"T_min": 1.0}, "T_min=1.0"),
        ({"cfg_scale": 0.5}, "cfg_scale"),
        ({"cfg_scale": 2.0}, "null condition"),
        ({"stochasticity_ratio": -1}, "stochasticity_ratio"),
        ({"sample_type": "ode"}, "sample_type"),
        ({"times": [0.1, 0.5]}, "decreasing"),
    ],
)
def test_impossible_requests_are_refused(kwargs, match, tiny_c2i):
    with pytest.raises(ValueError, match=match):
        sample(OT_FM(), tiny_c2i, torch.randn(1, 4, 8, 8), {"y": torch.zeros(1, dtype=torch.long)}, **kwargs)


@pytest.mark.parametrize("cls", [EDM, VE_SDE])
def test_noise_levels_never_end_at_zero(cls, tiny_c2i):
    with pytest.raises(ValueError, match="T_min > 0"):
        sample(cls(), tiny_c2i, torch.randn(1, 4, 8, 8), {"y": torch.zeros(1, dtype=torch.long)}, T_min=0.0)


def test_a_run_from_another_state_and_one_that_is_changed_on_its_way():
    transport, calls = OT_FM(), []

    def still(x, t, r):
        calls.append(x.clone())
        return torch.zeros_like(x)

    z, start = torch.randn(1, 1, 2, 2), torch.randn(1, 1, 2, 2)
    plan = plan_steps(transport, z.device, num_steps=3, T_max=0.5)
    result = follow(plan, still, z, {}, start=start, callback=lambda i, r, x: x + 1 if i == 1 else None)
    torch.testing.assert_close(torch.cat(calls), torch.cat([start, start, start + 1]))
    torch.testing.assert_close(result.x, start.double() + 1)
