"""The any-step sampler (arXiv 2509.04394, Alg. 2): N transitions x_r = A(t, r) x_t + B(t, r) F(x_t, t, r)."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tim.schedulers import SAMPLE_TYPES
from tim.schedulers.transport import Transport, jump


@dataclass
class SampleResult:
    """What a run returns.

    Attributes:
        x: final state (B, C, H, W).
        nfe: network evaluations spent per image (a guided step costs two).
        trajectory: every state from the start on, when asked for.
    """

    x: Tensor
    nfe: int
    trajectory: list[Tensor] = field(default_factory=list)


def guided_steps(
    times: Sequence[float],
    T_max: float,
    cfg_scale: float,
    cfg_low: float,
    cfg_high: float,
    guide_first_step: bool = False,
) -> list[bool]:
    """Which steps are guided: cfg_low T_max < t < cfg_high T_max, strictly; `guide_first_step` closes the window.

    Strictly, because the published numbers are: with the whole window 4 steps cost 7 evaluations, the first being unguided.
    Guidance in a limited window is that of arXiv 2404.07724.

    Args:
        times: the grid, N + 1 decreasing times.

    Returns:
        N values, one for each step.
    """
    low, high = cfg_low * T_max, cfg_high * T_max
    if cfg_scale <= 1:
        return [False] * (len(times) - 1)
    if guide_first_step:
        return [low <= t <= high for t in times[:-1]]
    return [low < t < high for t in times[:-1]]


class Step(NamedTuple):
    """A transition: all that it takes from its two times.

    Attributes:
        reached: r, the time where it ends.
        c_noise: both times as the network sees them (2,) on the device, float64 where it has that.
        jump: (x_t, F, fresh noise or None) to x_r.
        is_guided: by the unconditional prediction.
        is_renoised: takes fresh noise.
    """

    reached: float
    c_noise: Tensor
    jump: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    is_guided: bool
    is_renoised: bool


@dataclass(frozen=True)
class Plan:
    """The steps of a sampler's settings, made once for all batches; see `plan_steps`.

    Attributes:
        transport: path and closed forms.
        initial_scale: of z in the start.
        cfg_scale: w of the guided F_u + w (F_c - F_u).
        steps: N of them, whose tensors lie where the state does, so that nothing is computed or copied for a step.
    """

    transport: Transport
    initial_scale: float
    cfg_scale: float
    steps: tuple[Step, ...]

    @property
    def nfe(self) -> int:
        """Network evaluations per image (a guided step costs two)."""
        return len(self.steps) + sum(step.is_guided for step in self.steps)


def plan_steps(
    transport: Transport,
    device: torch.device,
    *,
    num_steps: int = 4,
    times: Sequence[float] | Tensor | None = None,
    T_max: float | None = None,
    T_min: float | None = None,
    cfg_scale: float = 1.0,
    cfg_low: float = 0.0,
    cfg_high: float = 1.0,
    guide_first_step: bool = False,
    stochasticity_ratio: float = 0.0,
    sample_type: str = "transition",
) -> Plan:
    """Time grid and coefficients of a run.

    Args:
        device: of the state. The others as in `sample`.

    Raises:
        ValueError: for an impossible grid, or a value out of range.
    """
    grid = _grid(transport, num_steps, times, T_max, T_min)
    _check(cfg_scale, stochasticity_ratio, sample_type)
    guided = guided_steps(grid, grid[0], cfg_scale, cfg_low, cfg_high, guide_first_step)
    if cfg_scale > 1 and not any(guided):
        window = f"({cfg_low * grid[0]:g}, {cfg_high * grid[0]:g})"
        inside = f"no step of {[round(t, 4) for t in grid[:-1]]} lies strictly inside {window}"
        warnings.warn(f"cfg_scale={cfg_scale} has no effect: {inside}; guide_first_step closes the window", stacklevel=3)
    steps = []
    for i, (t, r) in enumerate(pairwise(grid)):
        # The start is noise already; the end would keep what is added.
        rho = stochasticity_ratio if 0 < i < len(guided) - 1 else 0.0
        seen = (t, r if sample_type == "transition" else t)  # r = t asks for the instantaneous F: a step of the diffusion ODE
        c_noise = [float(transport.c_noise(torch.tensor(u, dtype=torch.float64))) for u in seen]
        wide = torch.tensor(c_noise, dtype=state_dtype(device)).to(device)
        steps.append(Step(r, wide, _jump(transport, t, r, rho, device), guided[i], rho != 0))
    return Plan(transport, transport.initial_scale(grid[0]), cfg_scale, tuple(steps))


def _jump(
    transport: Transport, t: float, r: float, rho: float, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The transition from t to r as a function of state, prediction and fresh noise."""
    # On the host, where every device finds the same numbers.
    t_x, r_x = (torch.tensor(u, dtype=state_dtype(device)) for u in (t, r))
    if type(transport).from_x_t_to_x_r is not Transport.from_x_t_to_x_r:  # of a transport that says itself how to jump
        return lambda x, F, noise: transport.from_x_t_to_x_r(x, t_x, r_x, F, rho, noise)
    values = [torch.as_tensor(c, dtype=t_x.dtype) for c in transport.jump_coefficients(t_x, r_x, rho)]
    coefficients = torch.stack(values).to(device).unbind()
    return lambda x, F, noise: jump(x, F, coefficients, noise)


def state_dtype(device: torch.device) -> torch.dtype:
    """Hundreds of small steps add up the rounding of the state, so it is wider than the network's input."""
    return torch.float32 if device.type == "mps" else torch.float64


def sample(
    transport: Transport,
    model: Callable[..., Tensor],
    z: Tensor,
    cond: dict[str, Any],
    uncond: dict[str, Any] | None = None,
    *,
    num_steps: int = 4,
    times: Sequence[float] | Tensor | None = None,
    T_max: float | None = None,
    T_min: float | None = None,
    cfg_scale: float = 1.0,
    cfg_low: float = 0.0,
    cfg_high: float = 1.0,
    guide_first_step: bool = False,
    stochasticity_ratio: float = 0.0,
    sample_type: str = "transition",
    noise_fn: Callable[[int], Tensor] | None = None,
    callback: Callable[[int, float, Tensor], Tensor | None] | None = None,
    return_trajectory: bool = False,
) -> SampleResult:
    """Draw samples by `num_steps` transitions.

    Args:
        transport: path and closed forms.
        model: called as model(x, c_noise(t), c_noise(r), **cond) in its own dtype; the state stays float64. The next call
            overwrites x and the times.
        z: standard normal start (B, C, H, W).
        cond, uncond: conditioning keywords, e.g. {'y': labels} and {'y': null labels}.
        times: N + 1 decreasing times that replace the transport's grid of num_steps.
        T_max, T_min: ends of the grid, the transport's own when None.
        cfg_scale, cfg_low, cfg_high, guide_first_step: classifier-free guidance and its window, see `guided_steps`.
        stochasticity_ratio: share of noise drawn anew at every step but the first and the last.
        sample_type: 'transition' conditions on r = t_{i+1}, 'diffusion' on r = t_i.
        noise_fn: step index -> fresh noise shaped like z; torch's default generator when None.
        callback: called after each step with (step, reached time, state); a state that it returns replaces this one.
        return_trajectory: keep all N + 1 states.

    Raises:
        ValueError: for an impossible grid, guidance without `uncond`, or a value out of range.
    """
    plan = plan_steps(
        transport, z.device, num_steps=num_steps, times=times, T_max=T_max, T_min=T_min, cfg_scale=cfg_scale,
        cfg_low=cfg_low, cfg_high=cfg_high, guide_first_step=guide_first_step, stochasticity_ratio=stochasticity_ratio,
        sample_type=sample_type,
    )  # fmt: skip
    return follow(plan, model, z, cond, uncond, noise_fn=noise_fn, callback=callback, return_trajectory=return_trajectory)


@torch.no_grad()
def follow(
    plan: Plan,
    model: Callable[..., Tensor],
    z: Tensor,
    cond: dict[str, Any],
    uncond: dict[str, Any] | None = None,
    *,
    noise_fn: Callable[[int], Tensor] | None = None,
    callback: Callable[[int, float, Tensor], Tensor | None] | None = None,
    return_trajectory: bool = False,
    start: Tensor | None = None,
) -> SampleResult:
    """Draw samples by the steps of a plan (Alg. 2); arguments as in `sample`, and

    Args:
        start: state at the first time, shaped like z, to start from instead of noise.

    Raises:
        ValueError: for guidance without `uncond`.
    """
    if plan.cfg_scale > 1 and uncond is None:
        raise ValueError(f"cfg_scale={plan.cfg_scale} needs the null condition, got none")
    predict = _predictor(plan, model, z, cond, uncond)
    x = plan.initial_scale * z.to(state_dtype(z.device)) if start is None else start.to(z.device, state_dtype(z.device))
    trajectory = [x] if return_trajectory else []
    for i, step in enumerate(plan.steps):
        F = predict(x, step).to(x.dtype)
        noise = None if not step.is_renoised else (noise_fn(i).to(x) if noise_fn else torch.randn_like(x))
        x = step.jump(x, F, noise)
        if i == len(plan.steps) - 1:
            x = plan.transport.final_state(x, step.reached)
        if return_trajectory:
            trajectory.append(x)
        if callback is not None:
            changed = callback(i, step.reached, x)
            x = x if changed is None else changed.to(x)
    return SampleResult(x, plan.nfe, trajectory)


def _predictor(
    plan: Plan, model: Callable[..., Tensor], z: Tensor, cond: dict[str, Any], uncond: dict[str, Any] | None
) -> Callable[[Tensor, Step], Tensor]:
    """F(x, step), float32 or wider, with classifier-free guidance (arXiv 2207.12598) or without.

    What the network takes lies in buffers that all steps write to, and what it returns, which a recorded CUDA graph overwrites
    in its next call, is copied.

    Args:
        z: shaped like the state; its dtype is that of the network's input where the network has no weights to tell.
    """
    weight = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    dtype = z.dtype if weight is None else weight.dtype
    # Half precision has no room for c_noise of neighbouring times: they stay float32 whatever the network's dtype is.
    wide = torch.promote_types(dtype, torch.float32)
    guided = uncond is not None and any(step.is_guided for step in plan.steps)
    joined = join_conditions(cond, uncond) if guided and uncond is not None else None  # in one forward pass where they can be

    def buffers(rows: int) -> tuple[Tensor, ...]:
        # Not parts of larger ones: compilers would look at the whole.
        times = (torch.empty(rows, dtype=wide, device=z.device) for _ in "tr")
        return torch.empty((rows, *z.shape[1:]), dtype=dtype, device=z.device), *times

    single, double = buffers(len(z)), None if joined is None else buffers(2 * len(z))

    def run(x: Tensor, step: Step, condition: dict[str, Any], inputs: tuple[Tensor, ...]) -> Tensor:
        state, *times = inputs
        state.unflatten(0, (-1, len(x))).copy_(x)  # once, or twice for both predictions
        for time, c_noise in zip(times, step.c_noise, strict=True):
            time.copy_(c_noise)
        return model(state, *times, **condition).to(wide, copy=True)

    def predict(x: Tensor, step: Step) -> Tensor:
        if not step.is_guided or uncond is None:
            return run(x, step, cond, single)
        if joined is not None and double is not None:
            F_c, F_u = run(x, step, joined, double).chunk(2)
        else:
            F_c, F_u = run(x, step, cond, single), run(x, step, uncond, single)
        return F_u + plan.cfg_scale * (F_c - F_u)

    return predict


def join_conditions(cond: dict[str, Any], uncond: dict[str, Any]) -> dict[str, Any] | None:
    """Keywords of one forward over [cond, uncond], or None where the shapes of the two differ, as captions' may."""
    if any(getattr(cond[k], "shape", None) != getattr(uncond.get(k), "shape", None) for k in cond):
        return None
    return {k: torch.cat([v, uncond[k]]) if torch.is_tensor(v) else v for k, v in cond.items()}


def _grid(
    transport: Transport, num_steps: int, times: Sequence[float] | Tensor | None, T_max: float | None, T_min: float | None
) -> list[float]:
    """The N + 1 times as Python floats, so that the loop never waits for the device."""
    T_max = transport.T_max if T_max is None else float(T_max)
    T_min = transport.T_min if T_min is None else float(T_min)
    if times is not None:
        grid = [float(t) for t in times]
        if len(grid) < 2 or any(not a > b for a, b in pairwise(grid)):
            raise ValueError(f"times must be at least two strictly decreasing values, got {grid}")
    else:
        if int(num_steps) != num_steps or num_steps < 1:
            raise ValueError(f"num_steps must be a whole number >= 1, got {num_steps}")
        if not T_min < T_max:
            raise ValueError(f"T_min must be below T_max, got T_min={T_min} and T_max={T_max}")
        if T_min <= 0 < transport.T_min:
            raise ValueError(f"{type(transport).__name__} ends at T_min > 0 (its default is {transport.T_min}), got {T_min}")
        grid = transport.time_grid(int(num_steps), T_max, T_min).tolist()
    if not all(math.isfinite(float(transport.c_noise(torch.tensor(t, dtype=torch.float64)))) for t in grid):
        raise ValueError(f"times {grid} leave the domain of {type(transport).__name__}")
    return grid


def _check(cfg_scale: float, stochasticity_ratio: float, sample_type: str) -> None:
    """ValueError for what `sample` cannot do."""
    if sample_type not in SAMPLE_TYPES:
        raise ValueError(f"sample_type={sample_type!r} is not one of {', '.join(map(repr, SAMPLE_TYPES))}")
    if not cfg_scale >= 1:
        raise ValueError(f"cfg_scale must be >= 1 (1 is no guidance), got {cfg_scale}")
    if not stochasticity_ratio >= 0:
        raise ValueError(f"stochasticity_ratio must be >= 0, got {stochasticity_ratio}")
