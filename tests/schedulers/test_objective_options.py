"""Options of the objective: what each does to the target and the loss, by closed forms."""

from itertools import pairwise

import pytest
import torch
from helpers.networks import TINY, randomize

from tim.models.c2i.tim_model import TiM
from tim.schedulers.guidance import draw_guidance, guidance_share
from tim.schedulers.losses import balance, limit_residual
from tim.schedulers.transition import TransitionSchedule
from tim.schedulers.transports import EDM, OT_FM
from tim.schedulers.two_point import MIN_RATIO, ratio_at

B = 8


def smooth(x, t, r, **_):
    """A network whose prediction is no target of its own."""
    t, r = (u.reshape(-1, 1, 1, 1) for u in (t, r))
    return torch.sin(x) * (1 + t) + torch.cos(t * (1 + r)) * x


def draw(seed=0, shape=(3, 4, 4)):
    g = torch.Generator().manual_seed(seed)
    x, z = (torch.randn(B, *shape, generator=g, dtype=torch.float64) for _ in range(2))
    return x, z, torch.randn(B, 2, generator=g)


def evaluate(transport=None, step=None, max_steps=None, **options):
    """Log of the objective of `smooth`, half of whose samples have r = t."""
    x, z, normal = draw()
    schedule = TransitionSchedule(transport or OT_FM(), **{"derivative_type": "jvp", "diffusion_ratio": 0.5, **options})
    times = {"normal": normal}
    losses = schedule.evaluate(smooth, None, smooth, B, x, z, {}, time_kwargs=times, step=step, max_steps=max_steps)
    return losses.log["denoising_loss"].item()


def residual_of_flow_matching():
    x, z, normal = draw()
    t, r, _ = TransitionSchedule(OT_FM(), diffusion_ratio=0.5).sample_t_and_r(B, normal=normal)
    t, r = t.double(), r.double()
    x_t, _ = OT_FM().path(x, z, t.reshape(-1, 1, 1, 1))
    return x_t, smooth(x_t, t, r), z - x, t, r


def test_a_step_to_the_end_is_flow_matching():
    _, F, F_star, *_ = residual_of_flow_matching()
    want = ((F - F_star) ** 2).mean().item()
    assert evaluate(derivative_type="two_point", two_point_ratio=1.0) == pytest.approx(want, rel=1e-12)
    assert evaluate(derivative_type="two_point", two_point_ratio=[1.0, 0.1], step=0, max_steps=9) == pytest.approx(
        want, rel=1e-12
    )


def test_the_target_of_straight_paths_is_a_mixture():
    """F^ = ratio F~ + (1 - ratio) F(x_s, s, r), and the loss is of F + (F^ - F) / ratio."""
    x_t, F, F_star, t, r = residual_of_flow_matching()
    s = t - 0.3 * (t - r)
    F_s = smooth(x_t + (s - t).reshape(-1, 1, 1, 1) * F_star, s, r)
    residual = (0.3 * F_star + 0.7 * F_s - F) / 0.3
    residual[: B // 2] = (F_star - F)[: B // 2]
    got = evaluate(derivative_type="two_point", two_point_ratio=0.3)
    assert got == pytest.approx((residual**2).mean().item(), rel=1e-12)


def test_half_precision_leaves_the_finite_step_as_it_is():
    """Both ends of the difference, which is divided by the ratio, are predicted in float32."""
    network = randomize(TiM(num_classes=10, **TINY))
    g = torch.Generator().manual_seed(0)
    x, z = (torch.randn(B, 4, 8, 8, generator=g) for _ in range(2))
    arguments = (network, None, network, B, x, z, {"y": torch.arange(B)})
    times = {"normal": torch.randn(B, 2, generator=g)}

    def loss(half, **options):
        schedule = TransitionSchedule(OT_FM(), derivative_type="two_point", two_point_ratio=MIN_RATIO, **options)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            return schedule.evaluate(*arguments, time_kwargs=times).log["denoising_loss"].item()

    assert loss(half=True) == pytest.approx(loss(half=False), rel=0.02)
    assert loss(half=True, derivative_dtype="bfloat16") > 1.2 * loss(half=False)


def test_ratios_are_annealed_along_a_sigmoid_and_stay_above_rounding():
    values = [ratio_at([1.0, 0.1], p / 10) for p in range(11)]
    assert values[0] == 1.0 and values[-1] == pytest.approx(0.1) and values[5] == pytest.approx(0.55)
    assert all(a > b for a, b in pairwise(values))
    assert values[0] - values[1] < 0.2 * (values[4] - values[5])
    assert ratio_at(1e-4, 0.5) == ratio_at([1.0, 1e-5], 1.0) == MIN_RATIO


def test_the_warm_up_begins_as_flow_matching_and_ends_as_it_was():
    _, F, F_star, *_ = residual_of_flow_matching()
    assert evaluate(tangent_warmup=10, step=0) == pytest.approx(((F - F_star) ** 2).mean().item(), rel=1e-12)
    assert evaluate(tangent_warmup=10, step=10) == evaluate(tangent_warmup=10) == evaluate()
    assert evaluate(tangent_warmup=10, step=5) not in (evaluate(), evaluate(tangent_warmup=10, step=0))


def test_residuals_are_clipped_or_scaled_where_t_is_not_r():
    F_target, F_pred, _ = draw()
    clipped = limit_residual(F_target, F_pred, 3, 0.5, False) - F_pred
    assert torch.equal(clipped[:3], (F_target - F_pred)[:3])
    torch.testing.assert_close(clipped[3:], (F_target - F_pred)[3:].clamp(-0.5, 0.5), rtol=1e-12, atol=1e-14)
    scaled = limit_residual(F_target, F_pred, 3, None, True) - F_pred
    torch.testing.assert_close((scaled[3:] ** 2).flatten(1).mean(1), torch.ones(5, dtype=torch.float64))
    direction = torch.nn.functional.cosine_similarity(scaled.flatten(1), (F_target - F_pred).flatten(1))
    torch.testing.assert_close(direction, torch.ones(B, dtype=torch.float64))
    same = limit_residual(F_pred, F_pred, 0, None, True)
    assert torch.equal(same, F_pred), "a residual of 0 has no direction"


@pytest.mark.parametrize("options", [{}, {"residual_clip": 3.0}, {"residual_direction": True}])
def test_a_target_that_is_not_finite_is_left_out_whatever_is_done_to_residuals(options):
    x, z, normal = draw()

    def network(x, t, r, **_):
        """At its second point the last sample is lost."""
        lost = (torch.arange(B) == B - 1) & (t < t_of_last)
        return torch.where(lost.reshape(-1, 1, 1, 1), torch.inf, smooth(x, t, r))

    schedule = TransitionSchedule(OT_FM(), derivative_type="two_point", **options)
    t_of_last = schedule.sample_t_and_r(B, normal=normal)[0][-1]
    losses = schedule.evaluate(network, None, network, B, x, z, {}, time_kwargs={"normal": normal})
    assert losses.kept.tolist() == [True] * (B - 1) + [False] and losses.weighted.isfinite()


def test_a_ratio_may_be_a_pair_and_is_warned_of_where_nothing_reads_it():
    pair = evaluate(derivative_type="two_point", two_point_ratio=(1.0, 0.1), step=4, max_steps=9)
    assert pair == evaluate(derivative_type="two_point", two_point_ratio=[1.0, 0.1], step=4, max_steps=9)
    with pytest.warns(UserWarning, match="two_point_ratio has no effect without derivative_type: two_point"):
        TransitionSchedule(OT_FM(), two_point_ratio=0.2)


def test_balanced_losses_have_one_mean_and_gradient_alike():
    losses = torch.tensor([1.0, 3.0, 10.0, 30.0, 7.0], requires_grad=True)
    kept = torch.tensor([True, True, True, True, False])
    got = balance(losses, 2, kept)
    torch.testing.assert_close(got[2:4], torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(torch.autograd.grad(got.sum(), losses)[0], torch.tensor([1.0, 1.0, 0.1, 0.1, 0.1]))
    assert torch.equal(balance(losses, 0, kept), losses) and torch.equal(balance(losses, 5, kept), losses)


@pytest.mark.parametrize("transport", [OT_FM, EDM])
def test_every_option_trains_together(transport):
    options = {"residual_clip": 3.0, "residual_direction": True, "balance": True, "tangent_warmup": 4, "tangent": "marginal"}
    assert evaluate(transport(), step=2, max_steps=8, **options) > 0


# ---- guidance as an input -----------------------------------------------------------------------
def test_guidance_is_drawn_from_1_to_its_largest_over_intervals_around_the_middle():
    guidance = draw_guidance(torch.rand(4000, 4, generator=torch.Generator().manual_seed(0)), 4.0)
    scale, low, high = guidance.unbind(1)
    assert (scale == 1).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert scale.min() >= 1 and 3.95 < scale.max() <= 4 and scale[scale > 1].median() == pytest.approx(2, abs=0.1)
    everywhere = (low == 0) & (high == 1)
    assert everywhere.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert low.max() <= 0.5 <= high.min() and draw_guidance(torch.zeros(1, 4), 4.0).tolist() == [[1.0, 0.0, 1.0]]


def test_the_share_of_guidance_counts_inside_its_interval():
    guidance = torch.tensor([[4.0, 0.2, 0.8]] * 3 + [[1.0, 0.0, 1.0]])
    t = torch.tensor([0.1, 0.5, 0.8, 0.5]) * 80
    assert guidance_share(guidance, t, 80.0).tolist() == [0.0, 0.75, 0.75, 0.0]


def test_a_sample_without_a_condition_is_not_guided():
    """It is told what the unconditional prediction is told, which guidance is measured from."""
    uniform = torch.full((2, 4), 0.9)
    guided, dropped = draw_guidance(uniform, 4.0, torch.tensor([False, True])).tolist()
    assert dropped == [1.0, 0.0, 1.0] and guided == draw_guidance(uniform, 4.0)[0].tolist() != dropped


def test_a_network_with_the_input_starts_as_the_one_without():
    plain, network = TiM(num_classes=10, **TINY), TiM(num_classes=10, guidance_input=True, **TINY)
    randomize(plain)
    missing, unexpected = network.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and {key.split(".")[0] for key in missing} == {"guidance_embedders"}
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([0.9, 0.4]), torch.tensor([1, 10])
    guidance = torch.tensor([[3.0, 0.1, 0.9], [1.0, 0.0, 1.0]])
    want = plain(x, t, t / 2, y)
    assert torch.equal(network(x, t, t / 2, y), want) and torch.equal(network(x, t, t / 2, y, guidance=guidance), want)
    randomize(network)
    none = network(x, t, t / 2, y)
    assert torch.equal(none, network(x, t, t / 2, y, guidance=guidance[[1, 1]]))
    assert not torch.allclose(none, network(x, t, t / 2, y, guidance=guidance))
    with pytest.raises(ValueError, match="guidance_input: true"):
        plain(x, t, t / 2, y, guidance=guidance)


@pytest.mark.parametrize(
    "transport,largest,match",
    [(OT_FM(), 0.5, "guidance_max must be >= 1"), (OT_FM(enhance_target=True), 4.0, "both guide the target")],
)
def test_impossible_guidance_is_refused(transport, largest, match):
    with pytest.raises(ValueError, match=match):
        TransitionSchedule(transport, guidance_max=largest)


def test_guidance_needs_the_unconditional_prediction():
    x, z, _ = draw()
    schedule = TransitionSchedule(OT_FM(), guidance_max=2.0)
    with pytest.raises(ValueError, match="null_kwargs"):
        schedule.evaluate(smooth, None, smooth, B, x, z, {})
