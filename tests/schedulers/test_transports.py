"""The transports in float64: closed forms against the four scalar functions, autograd and the goldens."""

import json

import pytest
import torch
from helpers.networks import relative_error
from helpers.paths import GOLDENS
from safetensors.torch import load_file

from tim.schedulers import transports
from tim.schedulers.transition import TransitionSchedule
from tim.schedulers.transport import Transport
from tim.schedulers.transports import EDM, OT_FM, VE_SDE, VP_SDE, TrigFlow

SIGMAS = (0.3, 0.5, 1.0, 2.0)
CASES = [(cls, s) for cls in (OT_FM, TrigFlow, EDM, VP_SDE, VE_SDE) for s in SIGMAS]
IDS = [f"{cls.__name__}-{s}" for cls, s in CASES]


@pytest.fixture(params=CASES, ids=IDS)
def transport(request) -> Transport:
    cls, sigma_d = request.param
    return cls(sigma_d=sigma_d)


def times(transport: Transport, count: int = 64) -> torch.Tensor:
    """Times in (T_min, T_max), half of them by the law, half spread evenly on the transport's own grid."""
    g = torch.Generator().manual_seed(1)
    drawn = transport.sample_t(count // 2, normal=torch.randn(count // 2, generator=g)).double()
    grid = transport.time_grid(count // 2 + 1, transport.T_max, transport.T_min)[1:-1]
    return torch.cat([drawn, grid]).reshape(-1, 1, 1, 1)


def ordered(transport: Transport, n: int) -> list[torch.Tensor]:
    """n arrays of times, elementwise decreasing."""
    t = times(transport)
    stack = torch.stack([t[torch.randperm(len(t), generator=torch.Generator().manual_seed(i))] for i in range(n)])
    return list(stack.sort(dim=0, descending=True).values)


def pair(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(count, 2, 3, 3, generator=g, dtype=torch.float64) for _ in range(2))


def state(transport: Transport, x, z, t):
    at = transport.interpolant(t)
    return at.alpha * x + at.sigma * z


def slope(value: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """d value / d t by autograd, zero where value does not depend on t."""
    if not value.requires_grad:
        return torch.zeros_like(t)
    return torch.autograd.grad(value.sum(), t, retain_graph=True)[0]


def test_transition_is_exact_for_the_exact_prediction(transport):
    t, r = ordered(transport, 2)
    x, z = pair(len(t))
    F = transport.diffusion_target(x, z, t)
    x_r = transport.from_x_t_to_x_r(state(transport, x, z, t), t, r, F)
    assert relative_error(x_r, state(transport, x, z, r)) < 1e-10


def test_transitions_compose(transport):
    t, s, r = ordered(transport, 3)
    x, z = pair(len(t))
    x_t = state(transport, x, z, t)
    direct = transport.from_x_t_to_x_r(x_t, t, r, transport.diffusion_target(x, z, t))
    x_s = transport.from_x_t_to_x_r(x_t, t, s, transport.diffusion_target(x, z, t))
    assert relative_error(transport.from_x_t_to_x_r(x_s, s, r, transport.diffusion_target(x, z, s)), direct) < 1e-10


def test_closed_forms_equal_the_generic_ones(transport):
    t, r = ordered(transport, 2)
    for mine, generic in zip(transport.transition(t, r), Transport.transition(transport, t, r), strict=True):
        torch.testing.assert_close(mine, generic, rtol=1e-9, atol=1e-11)
    mine, generic = transport.identity_factor(t, r), Transport.identity_factor(transport, t, r)
    torch.testing.assert_close(mine, generic, rtol=1e-8, atol=1e-11)


def test_transition_and_identity_vanish_at_equal_times(transport):
    t = times(transport)
    a, b = transport.transition(t, t)
    torch.testing.assert_close(a, torch.ones_like(t), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(b, torch.zeros_like(t), rtol=0, atol=1e-12)
    assert transport.identity_factor(t, t).abs().max() == 0


def test_derivatives_match_autograd(transport):
    t = times(transport).requires_grad_()
    at, hat = transport.interpolant(t), transport.prediction(t)
    for value, derivative in (
        (at.alpha, at.d_alpha),
        (at.sigma, at.d_sigma),
        (hat.alpha_hat, hat.d_alpha_hat),
        (hat.sigma_hat, hat.d_sigma_hat),
    ):
        torch.testing.assert_close(derivative.detach(), slope(value, t), rtol=1e-9, atol=1e-12)


def test_identity_factor_is_b_over_its_time_derivative(transport):
    t, r = ordered(transport, 2)
    t = t.requires_grad_()
    b = transport.transition(t, r)[1]
    d_b = slope(b, t)
    torch.testing.assert_close(transport.identity_factor(t, r).detach(), (b / d_b).detach(), rtol=1e-8, atol=1e-12)


def test_target_of_a_perfect_flow_map_is_the_flow_map(transport):
    """For one data point the flow map is known: F(x_t, t, r) = F* of that point, and the identity must return it."""
    t, r = ordered(transport, 2)
    x, z = pair(len(t))
    hat = transport.prediction(t)
    dF_dt = hat.d_alpha_hat * x + hat.d_sigma_hat * z  # F* along the path of (x, z)
    target = transport.target(state(transport, x, z, t), None, x, z, t, r, dF_dt)
    assert relative_error(target, transport.diffusion_target(x, z, t)) < 1e-10


def test_target_is_the_fixed_point_of_the_transition(transport):
    """d/dt (A x_t + B F) = 0 along the path, for any F whose derivative is given: solve for F and compare."""
    t, r = ordered(transport, 2)
    keep = ((t - r) / t > 1e-3).flatten()
    t, r = t[keep].requires_grad_(), r[keep]
    x, z = pair(len(t))
    dF = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    a, b = transport.transition(t, r)
    d_a, d_b = slope(a, t), slope(b, t)
    at = transport.interpolant(t.detach())
    v_t = at.d_alpha * x + at.d_sigma * z
    solved = -(d_a * state(transport, x, z, t) + a * v_t + b * dF) / d_b
    target = transport.target(state(transport, x, z, t), v_t, x, z, t, r, dF)
    assert relative_error(target.detach(), solved.detach()) < 1e-8


def test_estimates_invert_state_and_prediction(transport):
    t = times(transport)
    x, z = pair(len(t))
    x_hat, z_hat = transport.estimates(state(transport, x, z, t), transport.diffusion_target(x, z, t), t)
    assert relative_error(x_hat, x) < 1e-6 and relative_error(z_hat, z) < 1e-6


def test_renoising_keeps_the_marginal(transport):
    """x_r keeps mean alpha_r x and variance sigma_r²: the parts of old and fresh noise add up to sigma_r²."""
    t, r = ordered(transport, 2)
    x, z = pair(len(t))
    F, x_t = transport.diffusion_target(x, z, t), state(transport, x, z, t)
    for rho in (0.2, 1.0, 3.0):
        mean = transport.from_x_t_to_x_r(x_t, t, r, F, rho, noise=torch.zeros_like(x))
        fresh = transport.from_x_t_to_x_r(x_t, t, r, F, rho, noise=torch.ones_like(x)) - mean
        at_r = transport.interpolant(r)
        old = (mean - at_r.alpha * x) / z
        torch.testing.assert_close(old**2 + fresh**2, (at_r.sigma**2).expand_as(x), rtol=1e-6, atol=1e-7)
        assert (fresh >= 0).all() and fresh.max() > 0


@pytest.mark.parametrize("cls", [OT_FM, TrigFlow, EDM, VP_SDE, VE_SDE])
def test_drawn_times_stay_in_the_domain_and_follow_the_law(cls):
    transport = cls()
    n = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    t = transport.sample_t(20000, normal=n)
    assert t.dtype == torch.float32 and t.min() >= transport.T_min and t.max() <= transport.T_max
    median = {
        OT_FM: 0.5,
        TrigFlow: torch.atan(torch.exp(torch.tensor(-1.0)) / 0.5).item(),
        EDM: torch.exp(torch.tensor(-1.2)).item(),
        VP_SDE: 0.5,
        VE_SDE: (0.02 * 100) ** 0.5,
    }[cls]
    assert t.median().item() == pytest.approx(median, rel=0.05)


def test_a_law_of_ones_own_depends_on_the_sample_alone():
    """A subclass may override sample_t(batch_size, dtype, device); the objective keeps the draws apart, whatever the batch."""

    class Uniform(OT_FM):
        def sample_t(self, batch_size, dtype, device):
            return torch.rand(batch_size, dtype=dtype, device=device)

    schedule, normal = TransitionSchedule(Uniform()), torch.randn(600, 2)
    before = torch.get_rng_state()
    t, r, _ = schedule.sample_t_and_r(600, normal=normal)
    assert torch.equal(torch.get_rng_state(), before)
    assert (t >= r).all() and len(set(t.tolist())) == 600
    drawn = torch.cat([t, r]).sort().values
    assert (drawn - torch.linspace(0, 1, 1200)).abs().max() < 0.06, "uniform on [0, 1]"
    t_half, r_half, _ = schedule.sample_t_and_r(7, normal=normal[100:107])
    assert torch.equal(t_half, t[100:107]) and torch.equal(r_half, r[100:107])


@pytest.mark.parametrize("cls", [OT_FM, TrigFlow, EDM, VP_SDE, VE_SDE])
def test_grids_decrease_from_end_to_end(cls):
    transport = cls()
    for steps in (1, 2, 7, 250):
        grid = transport.time_grid(steps, transport.T_max, transport.T_min)
        assert grid.dtype == torch.float64 and len(grid) == steps + 1
        assert grid[0] == transport.T_max and grid[-1] == transport.T_min and (grid.diff() < 0).all()


@pytest.mark.parametrize("entry", json.loads((GOLDENS / "transports.json").read_text()), ids=lambda e: e["transport"])
def test_goldens(entry):
    d = load_file(GOLDENS / "transports.safetensors")
    name = entry["transport"]
    transport = getattr(transports, name)(**entry["params"], enhance_target=True, **entry["enhanced"])
    t, r = (d[f"{name}.{u}"].view(-1, 1, 1, 1) for u in "tr")
    at = transport.interpolant(t)
    for key, value in zip(("alpha", "sigma", "d_alpha", "d_sigma"), at, strict=True):
        torch.testing.assert_close(value, d[f"{name}.{key}"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(transport.c_noise(d[f"{name}.t"]), d[f"{name}.c_noise"], rtol=1e-6, atol=1e-6)
    x, z = d["x"], d["z"]
    x_t, v_t = at.alpha * x + at.sigma * z, at.d_alpha * x + at.d_sigma * z
    assert relative_error(transport.target(x_t, v_t, x, z, t, r, d["dF"]), d[f"{name}.target"]) < 1e-5
    assert relative_error(transport.from_x_t_to_x_r(x_t, t, r, d["F"]), d[f"{name}.x_r"]) < 1e-5
    enhanced = transport.target(x_t, v_t, x, z, t, r, d["dF"], d["F_cond"], d["F_uncond"], enhance_target=True)
    assert relative_error(enhanced, d[f"{name}.target_enhanced"]) < 1e-5


@pytest.mark.parametrize("make", [lambda: OT_FM(T_min=1.0), lambda: EDM(sigma_d=0.0), lambda: VE_SDE(sigma_min=0.0)])
def test_impossible_transports_are_refused(make):
    with pytest.raises(ValueError, match="needs"):
        make()
