"""The scheduler: the sampler's own steps, one by one, for every transport."""

import pytest
import torch
from diffusers import FlowMapEulerDiscreteScheduler

from tim.pipelines import TransitionScheduler
from tim.pipelines.scheduler import plan_of
from tim.schedulers.sampling import follow, sample

TRANSPORTS = ("OT_FM", "TrigFlow", "EDM", "VP_SDE", "VE_SDE")


def network(x, t, r):
    return torch.tanh(x) * (1 + t).reshape(-1, 1, 1, 1) - r.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("rho", [0.0, 0.2])
@pytest.mark.parametrize("name", TRANSPORTS)
def test_steps_are_those_of_the_sampler(name, rho):
    scheduler = TransitionScheduler(name)
    scheduler.set_timesteps(5, stochasticity_ratio=rho)
    z = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    g = torch.Generator().manual_seed(1)
    x = scheduler.init_noise_sigma * z
    for i, t in enumerate(scheduler.timesteps):
        c_t, c_r = (scheduler.c_noise(u).repeat(2) for u in (t, scheduler.times[i + 1]))
        x = scheduler.step(network(x, c_t, c_r), t, x, generator=g).prev_sample
    g = torch.Generator().manual_seed(1)
    fresh = [torch.randn(z.shape, generator=g) for _ in range(3)]  # of the steps between the first and the last
    want = sample(scheduler.transport, network, z, {}, num_steps=5, stochasticity_ratio=rho, noise_fn=lambda i: fresh[i - 1]).x
    assert x.dtype == torch.float64
    torch.testing.assert_close(x, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", TRANSPORTS)
def test_any_two_times_sample_by_sample(name):
    scheduler = TransitionScheduler(name)
    T, low = scheduler.transport.T_max, scheduler.transport.T_min
    t, r = (torch.tensor(times, dtype=torch.float64) for times in ([T, T / 2], [T / 3, low]))
    x, z = torch.randn(2, 1, 4, 4, dtype=torch.float64), torch.randn(2, 1, 4, 4, dtype=torch.float64)
    x_t = scheduler.scale_noise(x, t, z)
    F = scheduler.transport.diffusion_target(x, z, t.reshape(2, 1, 1, 1))
    both = scheduler.step(F, t, x_t, r).prev_sample
    torch.testing.assert_close(both, scheduler.scale_noise(x, r, z), rtol=1e-7, atol=1e-7)
    for i in range(2):
        alone = scheduler.step(F[i : i + 1], float(t[i]), x_t[i : i + 1], float(r[i]), return_dict=False)[0]
        torch.testing.assert_close(alone, both[i : i + 1], rtol=1e-12, atol=1e-12)


def test_half_precision_predictions_leave_the_state_wide():
    scheduler = TransitionScheduler()
    F = torch.randn(1, 1, 2, 2)
    for dtype in (torch.float16, torch.float32):
        assert scheduler.step(F.half(), 1.0, F.to(dtype)).prev_sample.dtype == torch.float32


def test_the_flow_map_scheduler_takes_the_same_steps():
    z = torch.randn(2, 3, 4, 4)
    cpu = torch.device("cpu")
    for times in (None, [0.9, 0.5001, 0.5, 0.0]):  # two of them are one within its tolerance of a timestep
        for steps in (1, 4, 50):
            plans = [
                plan_of(s, cpu, num_steps=steps, times=times) for s in (TransitionScheduler(), FlowMapEulerDiscreteScheduler())
            ]
            ours, theirs = (follow(plan, network, z, {}).x for plan in plans)
            torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="stochasticity_ratio"):
        plan_of(FlowMapEulerDiscreteScheduler(), cpu, num_steps=2, times=None, stochasticity_ratio=0.1)


def test_saved_and_loaded(tmp_path):
    scheduler = TransitionScheduler("EDM", {"sigma_d": 0.7})
    scheduler.save_pretrained(tmp_path)
    loaded = TransitionScheduler.from_pretrained(tmp_path)
    assert type(loaded.transport) is type(scheduler.transport) and vars(loaded.transport) == vars(scheduler.transport)


def test_what_it_refuses():
    with pytest.raises(ValueError, match=r"'tim\.schedulers\.transports\.OTFM'"):
        TransitionScheduler("OTFM")
    with pytest.raises(ValueError, match=r"sigma_dd.*sigma_d"):
        TransitionScheduler("EDM", {"sigma_dd": 1.0})
    scheduler, x = TransitionScheduler(), torch.zeros(2, 1, 2, 2)
    with pytest.raises(ValueError, match=r"no step starts at timestep 0\.3"):
        scheduler.step(x, 0.3, x)
    with pytest.raises(ValueError, match="r_timestep"):
        scheduler.step(x, torch.tensor([1.0, 0.5]), x)
    with pytest.raises(ValueError, match="num_steps"):
        scheduler.set_timesteps(0)
