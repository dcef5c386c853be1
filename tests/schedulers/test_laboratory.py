"""Every recipe on data whose flow maps are known: the exact map is where its loss is least, and training moves there.

Gaussians have flow maps in closed form, mixtures of two by fine integration. The path is determined by (x, z); given the state
x_t, all targets but the finite step's are affine in (x, z), so at the mean of (x, z) given x_t they are what training averages
to, and at the exact map they must be the exact map.
"""

import pytest
import torch
from helpers.paths import ROOT
from torch import nn

from tim.schedulers.transition import TransitionSchedule
from tim.schedulers.transports import EDM, OT_FM, VE_SDE, VP_SDE, TrigFlow
from tim.schedulers.two_point import two_point_change
from tim.typed_yaml import read_tree

TRANSPORTS = (OT_FM, TrigFlow, EDM, VP_SDE, VE_SDE)
RECIPES = {
    path.stem: read_tree(path)["model"]["transition_loss"] for path in sorted((ROOT / "configs/c2i/objectives").glob("*"))
}
EXACT = [name for name, options in RECIPES.items() if options["derivative_type"] == "jvp" and "guidance_max" not in options]
COLUMN = (-1, 1, 1, 1)


def raw_time(transport, c):
    """The inverse of c_noise."""
    if isinstance(transport, EDM):
        return torch.exp(4 * c)
    if isinstance(transport, VE_SDE):
        return 2 * torch.exp(c)
    return c / (transport.T - 1) if isinstance(transport, VP_SDE) else c


class Gaussian:
    """N(mean, std²), each channel on its own."""

    mean = torch.tensor([0.7, -1.1], dtype=torch.float64).reshape(1, 2, 1, 1)

    def __init__(self, transport, std=(0.6, 1.3)):
        self.transport = transport
        self.std = torch.tensor(std, dtype=torch.float64).reshape(1, 2, 1, 1)

    def spread(self, at):
        return (at.alpha**2 * self.std**2 + at.sigma**2).sqrt()

    def draw(self, count, g):
        return self.mean + self.std * torch.randn(count, 2, 1, 1, generator=g, dtype=torch.float64)

    def expected(self, x_t, t):
        """Means of x and z given x_t."""
        at = self.transport.interpolant(t)
        excess = (x_t - at.alpha * self.mean) / self.spread(at) ** 2
        return self.mean + at.alpha * self.std**2 * excess, at.sigma * excess

    def flow(self, x_t, t, r):
        at_t, at_r = self.transport.interpolant(t), self.transport.interpolant(r)
        return at_r.alpha * self.mean + self.spread(at_r) / self.spread(at_t) * (x_t - at_t.alpha * self.mean)


class Mixture(Gaussian):
    """Two Gaussians of weights 0.4 and 0.6; the flow by Runge-Kutta steps, equal in ln t where times are noise levels."""

    means = torch.tensor([[-1.0, 0.5], [1.2, -0.4]], dtype=torch.float64)[:, None, :, None, None]
    weights = torch.tensor([0.4, 0.6], dtype=torch.float64).reshape(2, 1)
    width, steps = 0.6, 64

    def draw(self, count, g):
        kind = (torch.rand(count, generator=g) < 0.6).long()
        return self.means[kind, 0] + self.width * torch.randn(count, 2, 1, 1, generator=g, dtype=torch.float64)

    def expected(self, x_t, t):
        at = self.transport.interpolant(t)
        variance = at.alpha**2 * self.width**2 + at.sigma**2
        excess = (x_t - at.alpha * self.means) / variance
        logits = self.weights.log() - 0.5 * (excess * (x_t - at.alpha * self.means)).sum((2, 3, 4))
        share = logits.softmax(0)[:, :, None, None, None]
        x = (share * (self.means + at.alpha * self.width**2 * excess)).sum(0)
        return x, (share * at.sigma * excess).sum(0)

    def velocity(self, x_t, t):
        at, (x, z) = self.transport.interpolant(t), self.expected(x_t, t)
        return at.d_alpha * x + at.d_sigma * z

    def flow(self, x_t, t, r):
        logs = isinstance(self.transport, EDM | VE_SDE)
        start, end = (t.log(), r.log()) if logs else (t, r)
        step = (end - start) / self.steps

        def slope(x, u):
            return self.velocity(x, u.exp()) * u.exp() if logs else self.velocity(x, u)

        for k in range(self.steps):
            u = start + k * step
            a = slope(x_t, u)
            b = slope(x_t + step / 2 * a, u + step / 2)
            c = slope(x_t + step / 2 * b, u + step / 2)
            x_t = x_t + step / 6 * (a + 2 * b + 2 * c + slope(x_t + step * c, u + step))
        return x_t


class ExactMap(nn.Module):
    """F of the exact flow: (x_r - A x_t) / B, and the mean of F* at r = t."""

    def __init__(self, data):
        super().__init__()
        self.data = data

    def forward(self, x, t, r, **_):
        transport = self.data.transport
        t, r = (raw_time(transport, u.double()).reshape(COLUMN) for u in (t, r))
        at_once = transport.diffusion_target(*self.data.expected(x, t), t)
        if torch.equal(t, r):
            return at_once
        a, b = transport.transition(t, r)
        same = b == 0
        jump = (self.data.flow(x, t, r) - a * x) / torch.where(same, torch.ones_like(b), b)
        return torch.where(same, at_once, jump)


class Guided(Mixture):
    """What guidance of the scale w makes of one Gaussian by another, the unconditional one; its flow by Runge-Kutta steps."""

    def __init__(self, transport, scale):
        super().__init__(transport)
        self.scale, self.known, self.plain = scale, Gaussian(transport), Gaussian(transport, std=(1.1, 0.8))
        self.plain.mean = torch.tensor([-0.3, 0.4], dtype=torch.float64).reshape(1, 2, 1, 1)

    def expected(self, x_t, t):
        F_cond, F_uncond = (self.transport.diffusion_target(*d.expected(x_t, t), t) for d in (self.known, self.plain))
        return self.transport.estimates(x_t, F_uncond + self.scale * (F_cond - F_uncond), t)


class GuidedMap(nn.Module):
    """F of guided flows of any scale; of the unconditional Gaussian for y = 1."""

    def __init__(self, transport):
        super().__init__()
        self.transport = transport

    def forward(self, x, t, r, y, guidance=None, **_):
        if y[0] == 1:
            return ExactMap(Guided(self.transport, 1.0).plain)(x, t, r)
        return ExactMap(Guided(self.transport, guidance[:, 0].double().reshape(COLUMN)))(x, t, r)


# Of t and r, in the middle of the law; short enough for the integration to be exact.
NORMALS = torch.tensor([[0.3, 0.2], [0.9, 0.7], [-0.4, -0.6], [0.1, -0.1]])


def residual(data, **options):
    """Root mean square of target - F at the exact map and the expected (x, z)."""
    schedule = TransitionSchedule(data.transport, **{**options, "diffusion_ratio": 0.0, "consistency_ratio": 0.0})
    t = schedule.sample_t_and_r(len(NORMALS), normal=NORMALS)[0].double().reshape(COLUMN)
    g = torch.Generator().manual_seed(0)
    x_t, _ = data.transport.path(data.draw(len(t), g), torch.randn(len(t), 2, 1, 1, generator=g, dtype=torch.float64), t)
    network, pair = ExactMap(data), data.expected(x_t, t)
    log = schedule.evaluate(network, None, network, len(t), *pair, {}, time_kwargs={"normal": NORMALS}).log
    return log["denoising_loss"].sqrt().item()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("kind", [Gaussian, Mixture])
def test_the_exact_map_is_its_own_target(kind, name, transport):
    assert residual(kind(transport()), **RECIPES[name]) < 1e-9


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("tangent,diffusion_ratio", [("data", 0.0), ("marginal", 0.5), ("data", 1.0)])
def test_guided_flows_of_every_scale_are_their_own_target(tangent, diffusion_ratio, transport):
    """The network is classifier-free guidance of itself, in one evaluation, and jumps along the guided path."""
    network, known = GuidedMap(transport()), Guided(transport(), 1.0).known
    options = {"derivative_type": "jvp", "tangent": tangent, "diffusion_ratio": diffusion_ratio}
    schedule = TransitionSchedule(known.transport, **options, guidance_max=4.0)
    t = schedule.sample_t_and_r(len(NORMALS), normal=NORMALS)[0].double().reshape(COLUMN)
    x_t = known.transport.path(torch.ones(4, 2, 1, 1).double(), torch.full((4, 2, 1, 1), -0.5).double(), t)[0]
    cond, uncond = {"y": torch.zeros(4)}, {"y": torch.ones(4)}
    uniform = torch.tensor([[scale, 0.0, 0.5, 0.5] for scale in (0.0, 0.3, 0.6, 0.99)])
    arguments = (network, None, network, 4, *known.expected(x_t, t), cond)
    keywords = {"null_kwargs": uncond, "time_kwargs": {"normal": NORMALS}, "guidance_kwargs": {"uniform": uniform}}
    assert schedule.evaluate(*arguments, **keywords).log["denoising_loss"].sqrt().item() < 1e-9


def test_model_guidance_trains_a_flow_along_its_own_path_and_not_along_the_datas():
    """Targets guided by a moving average whose unconditional Gaussian is another: their flow is its own target."""
    transport = TrigFlow(enhance_target=True, w_gt=1.0, w_cond=1.5, w_end=1.57)
    guided = Guided(transport, 2.5)
    known, plain, own = ExactMap(guided.known), ExactMap(guided.plain), ExactMap(guided)

    def average(x, t, r, y):
        return (plain if y[0] == 1 else known)(x, t, r)

    def miss(tangent):
        schedule = TransitionSchedule(transport, derivative_type="jvp", tangent=tangent)
        t = schedule.sample_t_and_r(len(NORMALS), normal=NORMALS)[0].double().reshape(COLUMN)
        x_t = transport.path(torch.ones(4, 2, 1, 1).double(), torch.full((4, 2, 1, 1), -0.5).double(), t)[0]
        arguments = (own, average, own, 4, *guided.known.expected(x_t, t), {"y": torch.zeros(4)})
        keywords = {"null_kwargs": {"y": torch.ones(4)}, "time_kwargs": {"normal": NORMALS}}
        return schedule.evaluate(*arguments, **keywords).log["denoising_loss"].sqrt().item()

    assert miss("guided") < 1e-9 and miss("marginal") < 1e-9 and miss("data") > 0.01


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("tangent", ["data", "marginal"])
def test_differences_miss_it_by_the_square_of_their_width(tangent, transport):
    first, second = (residual(Gaussian(transport()), tangent=tangent, differential_epsilon=e) for e in (0.004, 0.002))
    assert 0.2 * first < second < 0.3 * first < 1e-3


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("tangent", ["data", "marginal"])
def test_finite_steps_miss_it_by_their_length(tangent, transport):
    """Along a tangent, not the curved path. To a point the path is straight, and a step of any length exact."""
    options = {"derivative_type": "two_point", "tangent": tangent}
    first, second = (residual(Gaussian(transport()), two_point_ratio=ratio, **options) for ratio in (0.02, 0.01))
    assert 0.45 * first < second < 0.55 * first < 0.02
    point = Gaussian(transport(), std=(0.0, 0.0))
    assert all(residual(point, two_point_ratio=ratio, **options) < 1e-9 for ratio in (0.1, 0.7, 1.0))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_limit_of_finite_steps_is_the_identity(transport):
    """For a network that is not the exact map: B / (dB/dt) (dF*/dt - dF/dt), to first order in the ratio."""
    transport, network = transport(), lambda x, t, r: torch.sin(x) * (1 + t / 100) + torch.cos(t / 100 * (1 + r / 100)) * x**2
    g = torch.Generator().manual_seed(0)
    x, z = (torch.randn(4, 2, 1, 1, generator=g, dtype=torch.float64) for _ in range(2))
    t, r = (u.double().reshape(COLUMN) for u in TransitionSchedule(transport).sample_t_and_r(4, normal=NORMALS)[:2])

    def predict(u):
        return network(transport.path(x, z, u)[0], transport.c_noise(u), transport.c_noise(r))

    slope = torch.func.jvp(predict, (t,), (torch.ones_like(t),))[1]
    want = transport.target(*transport.path(x, z, t), x, z, t, r, slope) - transport.diffusion_target(x, z, t)
    errors = []
    for ratio in (1e-4, 1e-5):
        s = t - ratio * (t - r)
        got = two_point_change(transport, (x, z), t, s, r, predict(t), predict(s))
        errors.append(((got - want).norm() / want.norm()).item())
    assert errors[0] < 1e-2 and errors[1] < 0.11 * errors[0]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_along_the_marginal_the_derivative_forgets_the_draw(transport):
    """Pairs with the same state and times have the same derivative, whatever x and z made the state."""
    data = Gaussian(transport())
    network, t = ExactMap(data), torch.full((1,), float(transport().time_grid(8, *ends(transport()))[4]), dtype=torch.float64)
    schedule = TransitionSchedule(data.transport, derivative_type="jvp", tangent="marginal")
    x_t = torch.tensor([0.4, -0.8], dtype=torch.float64).reshape(1, 2, 1, 1)
    r = (t + data.transport.T_min) / 2
    at = data.transport.interpolant(t.reshape(COLUMN))
    found = []
    for x in (torch.zeros_like(x_t), torch.ones_like(x_t)):
        z = (x_t - at.alpha * x) / at.sigma
        drawn = (x, z, x_t, t, r, 0, {})
        path = schedule.tangent_path(drawn, schedule.own_prediction(network, drawn), (0.0, 0.0))
        found.append(schedule.derivative(network, *path, t, r, 0, {}))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def ends(transport):
    return transport.T_max, transport.T_min


class Small(nn.Module):
    """F by a multilayer perceptron that starts at 0."""

    def __init__(self, transport):
        super().__init__()
        self.transport = transport
        self.layers = nn.Sequential(nn.Linear(5, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 2))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x, t, r, **_):
        raw = [raw_time(self.transport, u).reshape(COLUMN) for u in (t, r)]
        at = self.transport.interpolant(raw[0])
        x = (x / (at.alpha**2 + at.sigma**2).sqrt()).flatten(1)
        angles = [torch.atan2(*self.transport.interpolant(u)[1::-1]).flatten(1) for u in raw]
        return self.layers(torch.cat([x, *angles, angles[0] - angles[1]], dim=1).to(x.dtype)).reshape(-1, 2, 1, 1)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", RECIPES)
def test_training_moves_towards_the_exact_map(name, transport):
    """Of one step too, r well below t, for all recipes but flow matching, which knows nothing of steps."""
    data, steps = Gaussian(transport()), 100
    schedule = TransitionSchedule(data.transport, **RECIPES[name])
    torch.manual_seed(0)
    network, g = Small(data.transport), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    t, r = (u.double() for u in schedule.sample_t_and_r(256, normal=torch.randn(256, 2, generator=g))[:2])
    r = t if RECIPES[name]["diffusion_ratio"] == 1 else r
    x_t, _ = data.transport.path(
        data.draw(256, g), torch.randn(256, 2, 1, 1, generator=g, dtype=torch.float64), t.reshape(COLUMN)
    )
    times = data.transport.c_noise(t), data.transport.c_noise(r)
    exact = ExactMap(data)(x_t, *times)

    def error():
        with torch.no_grad():
            return (network(x_t.float(), *(u.float() for u in times)) - exact).square().mean().item()

    before = error()
    for step in range(steps):
        x, z = data.draw(256, g).float(), torch.randn(256, 2, 1, 1, generator=g)
        loss = schedule.evaluate(network, None, network, 256, x, z, {}, null_kwargs={}, step=step, max_steps=steps).weighted
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert error() < 0.4 * before, error() / before
