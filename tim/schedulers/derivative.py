"""dF/dt along the path, which the training target contains (Eq. 9): x_t moves with the path, t at unit speed, r is fixed."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from tim.schedulers.transport import Transport

MIN_DIFFERENCE = 1e-4  # below this a central difference drowns in float32 rounding


def expand_times(t: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) to broadcast with `like`."""
    return t.reshape(-1, *([1] * (like.ndim - 1)))


def accepted(model: Callable[..., Tensor], **options: object) -> dict[str, Any]:
    """Those of the options that the model's forward pass takes: a plain network knows neither `jvp` nor `attn_type`."""
    known = _parameters(model)
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return options
    return {key: value for key, value in options.items() if key in known}


def carries_tangents(model: Callable[..., Any]) -> bool:
    """Whether the forward pass has the keyword `tangents` and so returns dF/dt beside F; **kwargs would swallow it."""
    return "tangents" in _parameters(model)


def _parameters(model: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward if isinstance(model, nn.Module) else model).parameters


def conditioning(kwargs: dict[str, Any] | None) -> Any:
    """Keywords of the network (or None) without those by which the objective says what an evaluation is for."""
    return kwargs and {key: value for key, value in kwargs.items() if key not in ("return_zs", "jvp")}


def take_batch(kwargs: dict[str, Any], start: int, batch_size: int, repeat: int = 1) -> dict[str, Any]:
    """Rows [start:] of every tensor that has one row per sample, repeated; everything else as it is."""

    def rows(value: object) -> object:
        if not (torch.is_tensor(value) and value.ndim and value.shape[0] == batch_size):
            return value
        return torch.cat([value[start:]] * repeat) if repeat > 1 else value[start:]

    return {key: rows(value) for key, value in kwargs.items()}


def difference_times(t: Tensor, r: Tensor, transport: Transport, epsilon: float) -> tuple[Tensor, Tensor]:
    """Times (t_hi, t_lo) of the difference quotient, inside [T_min, T_max] and not across r.

    Central with the per-sample half-width e = min(epsilon, distance to the ends, (t - r) / 2). Where e would
    fall under 1e-4 the difference is one-sided: forward when the domain has room above t, else backward.
    """
    above, below = transport.T_max - t, t - transport.T_min
    # Half of t - r: the difference must not look at times before r, where F(., ., r) was never trained.
    central = torch.minimum(torch.minimum(above, below), (t - r) / 2).clamp(max=epsilon)
    forward = above.clamp(max=epsilon)
    room = torch.where(t - r >= MIN_DIFFERENCE, torch.minimum(below, t - r), below)
    backward = room.clamp(max=epsilon)
    one_sided = central < MIN_DIFFERENCE
    go_forward = one_sided & (forward >= MIN_DIFFERENCE)
    go_backward = one_sided & ~go_forward
    # Chosen by masks, sample by sample, so that the device is never waited for.
    zero = torch.zeros_like(t)
    up = torch.where(go_backward, zero, torch.where(go_forward, forward, central))
    down = torch.where(go_forward, zero, torch.where(go_backward, backward, central))
    return t + up, t - down


@torch.no_grad()
def difference_derivative(
    model: Callable[..., Tensor],
    transport: Transport,
    x: Tensor,
    z: Tensor,
    t: Tensor,
    r: Tensor,
    model_kwargs: dict[str, Any],
    epsilon: float,
) -> Tensor:
    """Differential derivative equation (section 3.3): [F(x_hi, t_hi, r) - F(x_lo, t_lo, r)] / (t_hi - t_lo).

    Both evaluations are one forward pass of twice the batch. x_hi and x_lo are interpolated anew from the same x and z, so
    the difference follows the path itself, not its tangent.

    Args:
        x, z: clean latents and noise (B, C, H, W) that define the path.
        t, r: raw times (B,).
        epsilon: largest half-width of the difference.

    Returns:
        dF/dt (B, C, H, W) in at least float32.
    """
    times = torch.cat(difference_times(t, r, transport, epsilon))
    at = transport.interpolant(expand_times(times, x))
    x_both = at.alpha * torch.cat([x, x]) + at.sigma * torch.cat([z, z])
    kwargs = take_batch(model_kwargs, 0, x.shape[0], repeat=2)
    r_both = transport.c_noise(torch.cat([r, r]))
    F_both = model(x_both.to(x.dtype), transport.c_noise(times), r_both, **accepted(model, jvp=True), **kwargs)
    F_hi, F_lo = at_least_float32(F_both).chunk(2)  # before the subtraction, which cancels most digits
    t_hi, t_lo = times.chunk(2)
    return (F_hi - F_lo) / expand_times(t_hi - t_lo, x)


def path_tangents(transport: Transport, velocity: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d/dt of the arguments of F: of x_t its velocity (B, C, H, W), of c_noise(t) (B,) by the chain rule, of c_noise(r) 0."""
    rate = torch.func.jvp(transport.c_noise, (t,), (torch.ones_like(t),))[1]
    return velocity, rate, torch.zeros_like(t)


def predict(
    model: Callable[..., Any],
    x_t: Tensor,
    c_t: Tensor,
    c_r: Tensor,
    model_kwargs: dict[str, Any],
    tangents: tuple[Tensor, Tensor, Tensor] | None = None,
    return_zs: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The student's pass, with all that is wanted of it.

    Args:
        tangents: of x_t, c_t and c_r for the last samples of the batch.

    Returns:
        F(x_t, t, r) (B, C, H, W); with tangents, dF/dt like it in at least float32, without gradient, and 0 for the samples
        before them; with return_zs, the REPA projection (B, N, z_dim).
    """
    options: dict[str, Any] = {"return_zs": True} if return_zs else {}
    options |= {} if tangents is None else {"tangents": tangents}
    results = model(x_t, c_t, c_r, **model_kwargs, **options)
    F_pred, *others = results if options else (results,)
    dF_dt = None
    if tangents is not None:
        tail = at_least_float32(others.pop(0))
        dF_dt = torch.cat([tail.new_zeros(len(x_t) - len(tail), *tail.shape[1:]), tail])
    return F_pred, dF_dt, others[0] if return_zs else None


@torch.no_grad()
def jvp_derivative(
    model: Callable[..., Any],
    transport: Transport,
    x: Tensor,
    z: Tensor,
    t: Tensor,
    r: Tensor,
    model_kwargs: dict[str, Any],
) -> Tensor:
    """Exact derivative in a pass of its own: by the model's `tangents`, or forward-mode differentiation where it takes none.

    Arguments and result are those of `difference_derivative`, without epsilon.
    """
    x_t, v_t = (u.to(x.dtype) for u in transport.path(x, z, expand_times(t, x)))
    if carries_tangents(model):
        times = transport.c_noise(t), transport.c_noise(r)
        return at_least_float32(model(x_t, *times, **model_kwargs, tangents=path_tangents(transport, v_t, t))[1])
    return forward_mode_derivative(model, transport, x_t, v_t, t, r, model_kwargs)


@torch.no_grad()
def forward_mode_derivative(
    model: Callable[..., Tensor],
    transport: Transport,
    x_t: Tensor,
    v_t: Tensor,
    t: Tensor,
    r: Tensor,
    model_kwargs: dict[str, Any],
) -> Tensor:
    """dF/dt by forward-mode differentiation, for networks that do not carry tangents themselves.

    Args:
        x_t, v_t: state and its velocity along the path (B, C, H, W).
        t, r: raw times (B,).
    """
    # Fused attention kernels have no forward-mode derivative.
    options = {**model_kwargs, **accepted(model, jvp=True, attn_type="vanilla_attn")}
    with forward_ad.dual_level():  # r carries no tangent: it is fixed
        x_dual = forward_ad.make_dual(x_t, v_t)
        t_dual = transport.c_noise(forward_ad.make_dual(t, torch.ones_like(t)))
        F_dual = model(x_dual, t_dual, transport.c_noise(r), **options)
        tangent = forward_ad.unpack_dual(F_dual).tangent
    return at_least_float32(torch.zeros_like(x_t) if tangent is None else tangent)  # None: F depends on neither x nor t


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The half precision in which networks compute here, None outside of autocast."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def precision(device_type: str, dtype: torch.dtype | None) -> AbstractContextManager:
    """A context for the derivative passes: ambient precision for None, full for float32 and float64, autocast for half."""
    if dtype is None:
        return nullcontext()
    # Under the trainer's autocast the network would run in half whatever its weights are; only a nested context changes that.
    if dtype in (torch.float16, torch.bfloat16):
        return torch.autocast(device_type, dtype=dtype)
    return torch.autocast(device_type, enabled=False)
