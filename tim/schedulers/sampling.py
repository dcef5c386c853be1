"""The any-step sampler (arXiv 2509.04394, Alg. 2): N transitions x_r = A(t, r) x_t + B(t, r) F(x_t, t, r)."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tim.schedulers import SAMPLE_TYPES
from tim.schedulers.transports import Transport


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


@torch.no_grad()
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
    callback: Callable[[int, float, Tensor], None] | None = None,
    return_trajectory: bool = False,
) -> SampleResult:
    """Draw samples by `num_steps` transitions.

    Args:
        transport: path and closed forms.
        model: called as model(x, c_noise(t), c_noise(r), **cond) in its own dtype; the state stays float64.
        z: standard normal start (B, C, H, W).
        cond, uncond: conditioning keywords, e.g. {'y': labels} and {'y': null labels}.
        times: N + 1 decreasing times that replace the transport's grid of num_steps.
        T_max, T_min: ends of the grid, the transport's own when None.
        cfg_scale, cfg_low, cfg_high, guide_first_step: classifier-free guidance and its window, see `guided_steps`.
        stochasticity_ratio: share of noise drawn anew at every step but the first and the last.
        sample_type: 'transition' conditions on r = t_{i+1}, 'diffusion' on r = t_i.
        noise_fn: step index -> fresh noise shaped like z; torch's default generator when None.
        callback: called after each step with (step, reached time, state).
        return_trajectory: keep all N + 1 states.

    Raises:
        ValueError: for an impossible grid, guidance without `uncond`, or a value out of range.
    """
    grid = _grid(transport, num_steps, times, T_max, T_min)
    _check(cfg_scale, uncond, stochasticity_ratio, sample_type)
    guided = guided_steps(grid, grid[0], cfg_scale, cfg_low, cfg_high, guide_first_step)
    if cfg_scale > 1 and not any(guided):
        window = f"({cfg_low * grid[0]:g}, {cfg_high * grid[0]:g})"
        inside = f"no step of {[round(t, 4) for t in grid[:-1]]} lies strictly inside {window}"
        warnings.warn(f"cfg_scale={cfg_scale} has no effect: {inside}; guide_first_step closes the window", stacklevel=2)
    weight = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    dtype = z.dtype if weight is None else weight.dtype
    predict = _predictor(transport, model, dtype, cond, uncond if any(guided) else None, cfg_scale)
    states = _states(transport, predict, z, grid, guided, stochasticity_ratio, sample_type, noise_fn)
    x = next(states)
    trajectory = [x] if return_trajectory else []
    for i, x in enumerate(states):
        if return_trajectory:
            trajectory.append(x)
        if callback is not None:
            callback(i, grid[i + 1], x)
    return SampleResult(x, len(guided) + sum(guided), trajectory)


def _states(
    transport: Transport,
    predict: Callable[[Tensor, float, float, bool], Tensor],
    z: Tensor,
    grid: list[float],
    guided: list[bool],
    stochasticity_ratio: float,
    sample_type: str,
    noise_fn: Callable[[int], Tensor] | None,
) -> Iterator[Tensor]:
    """The start and the state after each transition (Alg. 2).

    Args:
        predict: of `_predictor`. The others as in `sample`, checked.
    """
    # Hundreds of small steps add up the rounding of the state, so it is wider than the network's input.
    dtype = torch.float32 if z.device.type == "mps" else torch.float64
    x = transport.initial_scale(grid[0]) * z.to(dtype)
    yield x
    last = len(grid) - 2
    for i, (t, r) in enumerate(pairwise(grid)):
        r_seen = r if sample_type == "transition" else t  # r = t asks for the instantaneous F: a step of the diffusion ODE
        F = predict(x, t, r_seen, guided[i])
        rho = stochasticity_ratio if 0 < i < last else 0.0  # the start is noise already; the end would keep what is added
        noise = None if rho == 0 else (noise_fn(i).to(x) if noise_fn else torch.randn_like(x))
        # On the CPU: scalars of the formulas, which no kernel has to read back from the device.
        t_x, r_x = (torch.tensor(u, dtype=dtype) for u in (t, r))
        x = transport.from_x_t_to_x_r(x, t_x, r_x, F.to(dtype), rho, noise)
        yield transport.final_state(x, r) if i == last else x


def _predictor(
    transport: Transport,
    model: Callable[..., Tensor],
    dtype: torch.dtype,
    cond: dict[str, Any],
    uncond: dict[str, Any] | None,
    scale: float,
) -> Callable[[Tensor, float, float, bool], Tensor]:
    """F(x, t, r), float32 or wider, with classifier-free guidance (arXiv 2207.12598) or without.

    Args:
        dtype: the network's.
        uncond: None when no step is guided.
        scale: w of the guided F_u + w (F_c - F_u).
    """
    # Half precision has no room for c_noise of neighbouring times: they stay float32 whatever the network's dtype is.
    wide = torch.promote_types(dtype, torch.float32)
    joined = None if uncond is None else join_conditions(cond, uncond)  # both in one forward pass where they can be

    def run(x: Tensor, t: float, r: float, condition: dict[str, Any]) -> Tensor:
        c_noise = (float(transport.c_noise(torch.tensor(u, dtype=torch.float64))) for u in (t, r))
        times = (torch.full((x.shape[0],), c, dtype=wide, device=x.device) for c in c_noise)
        return model(x, *times, **condition).to(wide)

    def predict(x: Tensor, t: float, r: float, guided: bool) -> Tensor:
        x = x.to(dtype)
        if not guided or uncond is None:
            return run(x, t, r, cond)
        if joined is not None:
            F_c, F_u = run(torch.cat([x, x]), t, r, joined).chunk(2)
        else:
            F_c, F_u = run(x, t, r, cond), run(x, t, r, uncond)
        return F_u + scale * (F_c - F_u)

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


def _check(cfg_scale: float, uncond: dict[str, Any] | None, stochasticity_ratio: float, sample_type: str) -> None:
    """ValueError for what `sample` cannot do."""
    if sample_type not in SAMPLE_TYPES:
        raise ValueError(f"sample_type={sample_type!r} is not one of {', '.join(map(repr, SAMPLE_TYPES))}")
    if not cfg_scale >= 1:
        raise ValueError(f"cfg_scale must be >= 1 (1 is no guidance), got {cfg_scale}")
    if cfg_scale > 1 and uncond is None:
        raise ValueError(f"cfg_scale={cfg_scale} needs the null condition, got none")
    if not stochasticity_ratio >= 0:
        raise ValueError(f"stochasticity_ratio must be >= 0, got {stochasticity_ratio}")
