"""The any-step sampler: N transitions x_r = A(t, r) x_t + B(t, r) F(x_t, t, r) from T_max down to T_min."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from tim.schedulers import SAMPLE_TYPES
from tim.schedulers.transports import Transport


@dataclass
class SampleResult:
    """x: final state (B, C, H, W). trajectory: every state from the start on, when asked for. nfe: network
    evaluations spent per image (a guided step costs two)."""

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
    """Which steps are guided: cfg_low T_max < t < cfg_high T_max, strictly; `guide_first_step` closes the window."""
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
    cond: dict,
    uncond: dict | None = None,
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
        cfg_scale, cfg_low, cfg_high, guide_first_step: classifier-free guidance and its window (fractions of T_max).
        stochasticity_ratio: share of noise drawn anew at every step but the first and the last.
        sample_type: 'transition' conditions on r = t_{i+1}, 'diffusion' on r = t_i.
        noise_fn: step index -> fresh noise shaped like z; torch's default generator when None.
        callback: called after each step with (step, reached time, state).
        return_trajectory: keep all N + 1 states.

    Raises:
        ValueError: for an impossible grid, guidance without `uncond`, or a value out of range.
    """
    T_max = transport.T_max if T_max is None else float(T_max)
    T_min = transport.T_min if T_min is None else float(T_min)
    grid = _grid(transport, num_steps, times, T_max, T_min)
    _check(transport, grid, cfg_scale, uncond, stochasticity_ratio, sample_type)
    guided = guided_steps(grid, grid[0], cfg_scale, cfg_low, cfg_high, guide_first_step)
    if cfg_scale > 1 and not any(guided):
        warnings.warn(
            f"cfg_scale={cfg_scale} has no effect: no step of {[round(t, 4) for t in grid[:-1]]} lies strictly inside "
            f"({cfg_low * grid[0]:g}, {cfg_high * grid[0]:g}); guide_first_step closes the window",
            stacklevel=2,
        )

    network_dtype = _network_dtype(model, z)
    state_dtype = torch.float32 if z.device.type == "mps" else torch.float64
    x = transport.initial_scale(grid[0]) * z.to(state_dtype)
    trajectory = [x] if return_trajectory else []
    last = len(grid) - 2
    joined = join_conditions(cond, uncond) if any(guided) else None
    for i, (t, r) in enumerate(pairwise(grid)):
        r_seen = r if sample_type == "transition" else t
        if not guided[i]:
            F = _predict(transport, model, x.to(network_dtype), t, r_seen, cond)
        elif joined is not None:
            F_c, F_u = _predict(transport, model, torch.cat([x, x]).to(network_dtype), t, r_seen, joined).chunk(2)
            F = F_u + cfg_scale * (F_c - F_u)
        else:
            F_c, F_u = (_predict(transport, model, x.to(network_dtype), t, r_seen, y) for y in (cond, uncond))
            F = F_u + cfg_scale * (F_c - F_u)
        rho = stochasticity_ratio if 0 < i < last else 0.0
        noise = None if rho == 0 else (noise_fn(i).to(x) if noise_fn else torch.randn_like(x))
        t_x, r_x = (torch.tensor(u, dtype=state_dtype) for u in (t, r))
        x = transport.from_x_t_to_x_r(x, t_x, r_x, F.to(state_dtype), rho, noise)
        if i == last:
            x = transport.final_state(x, r)
        if return_trajectory:
            trajectory.append(x)
        if callback is not None:
            callback(i, r, x)
    return SampleResult(x, len(guided) + sum(guided), trajectory)


def join_conditions(cond: dict, uncond: dict) -> dict | None:
    """Keywords of one forward over [cond, uncond], or None where the shapes of the two differ."""
    if any(getattr(cond[k], "shape", None) != getattr(uncond.get(k), "shape", None) for k in cond):
        return None
    return {k: torch.cat([v, uncond[k]]) if torch.is_tensor(v) else v for k, v in cond.items()}


def _predict(transport: Transport, model: Callable[..., Tensor], x: Tensor, t: float, r: float, condition: dict) -> Tensor:
    """F(x, t, r, condition), float32 or wider, t and r being the same for all of x."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    t_c, r_c = (
        torch.full((x.shape[0],), float(transport.c_noise(torch.tensor(u, dtype=torch.float64))), dtype=dtype, device=x.device)
        for u in (t, r)
    )
    return model(x, t_c, r_c, **condition).to(dtype)


def _grid(
    transport: Transport, num_steps: int, times: Sequence[float] | Tensor | None, T_max: float, T_min: float
) -> list[float]:
    """The N + 1 times as Python floats, so that the loop never waits for the device."""
    if times is not None:
        grid = [float(t) for t in times]
        if len(grid) < 2 or any(not a > b for a, b in pairwise(grid)):
            raise ValueError(f"times must be at least two strictly decreasing values, got {grid}")
        return grid
    if int(num_steps) != num_steps or num_steps < 1:
        raise ValueError(f"num_steps must be a whole number >= 1, got {num_steps}")
    if not T_min < T_max:
        raise ValueError(f"T_min must be below T_max, got T_min={T_min} and T_max={T_max}")
    if T_min <= 0 < transport.T_min:
        raise ValueError(f"{type(transport).__name__} ends at T_min > 0 (its default is {transport.T_min}), got {T_min}")
    return transport.time_grid(int(num_steps), T_max, T_min).tolist()


def _check(
    transport: Transport,
    grid: list[float],
    cfg_scale: float,
    uncond: dict | None,
    stochasticity_ratio: float,
    sample_type: str,
) -> None:
    if not all(math.isfinite(float(transport.c_noise(torch.tensor(t, dtype=torch.float64)))) for t in grid):
        raise ValueError(f"times {grid} leave the domain of {type(transport).__name__}")
    if sample_type not in SAMPLE_TYPES:
        raise ValueError(f"sample_type={sample_type!r} is not one of {', '.join(map(repr, SAMPLE_TYPES))}")
    if not cfg_scale >= 1:
        raise ValueError(f"cfg_scale must be >= 1 (1 is no guidance), got {cfg_scale}")
    if cfg_scale > 1 and uncond is None:
        raise ValueError(f"cfg_scale={cfg_scale} needs the null condition, got none")
    if not stochasticity_ratio >= 0:
        raise ValueError(f"stochasticity_ratio must be >= 0, got {stochasticity_ratio}")


def _network_dtype(model: Callable[..., Tensor], z: Tensor) -> torch.dtype:
    """The dtype of the model's parameters, or of z for a plain function."""
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return z.dtype if first is None else first.dtype
