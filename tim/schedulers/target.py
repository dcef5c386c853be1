"""What the network's prediction should be: the right-hand side of the transition identity (Eq. 9), in its variants."""

import warnings
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tim.schedulers.derivative import (
    at_least_float32,
    autocast_dtype,
    carries_tangents,
    difference_derivative,
    expand_times,
    jvp_derivative,
    path_tangents,
    precision,
    predict,
    take_batch,
)
from tim.schedulers.transport import Transport
from tim.schedulers.two_point import DEFAULT_RATIO, check_ratio, two_point_change

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISIONS |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Pair = tuple[Tensor, Tensor]  # clean latents and noise (B, C, H, W), whose interpolation is a path
Guidance = tuple[Tensor | float, Tensor | float]  # F_c and F_u (B, C, H, W) at (t, t), or zeros


class Drawn(NamedTuple):
    """A micro-batch at its times: latents, noise and state (B, C, H, W), raw times (B,), the first n_diffusion with r = t."""

    x: Tensor
    z: Tensor
    x_t: Tensor
    t: Tensor
    r: Tensor
    n_diffusion: int
    model_kwargs: dict[str, Any]


class GuidanceByInput(NamedTuple):
    """Of guidance as an input: the share (B,) of F(w, c) - F(null) in the target, and F(x_t, t, t, null) (B, C, H, W)."""

    share: Tensor
    F_uncond: Tensor


@dataclass(eq=False)
class TransitionTarget:
    """The student's prediction and what it should be.

    Args:
        transport: the path and its closed forms.
        diffusion_ratio: share of the batch trained with r = t, whose target is F* (Tab. 11).
        consistency_ratio: share trained with r = T_min (Tab. 11).
        derivative_type: 'dde' (finite differences, forwards only; section 3.3, Tab. 1), 'jvp' (exact, carried along
            with F by the training pass at half of dde's cost) or 'two_point' (a finite step, see `two_point`).
        differential_epsilon: half-width of the dde difference, in raw time (Tab. 10).
        derivative_dtype: dtype of the network in the derivative passes. None is float32 for 'dde' and 'two_point', whose
            differences would magnify the rounding of half precision a hundredfold, and that of the training pass for 'jvp',
            which with a dtype takes a pass of its own (measured in docs/numerics.md).
        two_point_ratio: for 'two_point', the step's share of [r, t], or [start, end] annealed over training.
        tangent: the path that the derivative follows: of the data ('data', as published), of the network's own prediction
            at (t, t) ('marginal', of improved MeanFlow, arXiv 2512.02012: one more forward), or with model guidance of the
            guided target ('guided'). Along the data's path Eq. 51 is that of no flow.
        guidance_path: another name of tangent.
        guidance_max: train a network that takes guidance as an input (see `guidance`), for scales from 1 to this.

    Attributes:
        always_run_derivative: set by the trainer when processes share sharded weights: each must then evaluate the network
            as often as the others, whatever times it drew.

    Raises:
        ValueError: for a value outside these.
    """

    transport: Transport
    diffusion_ratio: float = 0.0
    consistency_ratio: float = 0.0
    derivative_type: str = "dde"
    differential_epsilon: float = 0.005
    _: KW_ONLY
    derivative_dtype: str | torch.dtype | None = None
    two_point_ratio: float | list[float] = DEFAULT_RATIO
    tangent: str = "data"
    guidance_path: str | None = None
    guidance_max: float | None = None
    always_run_derivative: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        check_choice("derivative_type", self.derivative_type, ("dde", "jvp", "two_point"))
        if isinstance(self.derivative_dtype, str):
            check_choice("derivative_dtype", self.derivative_dtype, tuple(PRECISIONS))
        if not self.differential_epsilon > 0:
            raise ValueError(f"differential_epsilon must be > 0, got {self.differential_epsilon}")
        check_ratio(self.two_point_ratio)
        if self.two_point_ratio != DEFAULT_RATIO and self.derivative_type != "two_point":
            warnings.warn("two_point_ratio has no effect without derivative_type: two_point", stacklevel=4)
        if self.guidance_max is not None:
            if not self.guidance_max >= 1:
                raise ValueError(f"guidance_max must be >= 1, got {self.guidance_max}")
            if self.transport.enhance_target:
                raise ValueError("guidance_max and enhance_target of the transport both guide the target; set one of them")
        name = "tangent" if self.guidance_path is None else "guidance_path"
        if self.guidance_path is not None and self.tangent not in ("data", self.guidance_path):
            raise ValueError(f"guidance_path={self.guidance_path!r} is another name of tangent={self.tangent!r}; give one")
        self.tangent = getattr(self, name)
        check_choice(name, self.tangent, ("data", "guided", "marginal"))
        if self.tangent == "guided" and not self.transport.enhance_target:
            raise ValueError(f"{name}='guided' follows a guided target: set enhance_target of the transport, or take 'data'")

    def student(
        self, model: nn.Module, bare: nn.Module, drawn: Drawn, path: Pair, return_zs: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """F(x_t, t, r) of the student, its dF/dt along the path (B, C, H, W), and with return_zs its REPA projection.

        Args:
            bare: the student without a wrapper.
            path: along which t moves.
        """
        x, _, x_t, t, r, n, model_kwargs = drawn
        tangents = None
        rides = self.derivative_type == "jvp" and self.derivative_dtype is None and carries_tangents(bare)
        if rides and n < len(t):
            _, velocity = self.transport.path(path[0][n:], path[1][n:], expand_times(t[n:], x))
            tangents = path_tangents(self.transport, velocity.to(x.dtype), t[n:])
        times = self.transport.c_noise(t), self.transport.c_noise(r)
        F_pred, dF_dt, h_proj = predict(model, x_t.to(x.dtype), *times, model_kwargs, tangents, return_zs)
        if rides and dF_dt is None:
            dF_dt = at_least_float32(torch.zeros_like(F_pred))
        elif self.derivative_type != "two_point" and dF_dt is None:
            dF_dt = self.derivative(bare, *path, t, r, n, model_kwargs)
        return F_pred, dF_dt, h_proj

    @torch.no_grad()
    def target(
        self,
        bare: nn.Module,
        drawn: Drawn,
        v_t: Tensor,
        path: Pair,
        guidance: Guidance,
        dF_dt: Tensor | None,
        F_pred: Tensor,
        ratio: float,
    ) -> Tensor:
        """What F should be now (B, C, H, W): the right-hand side of Eq. 9, or what two points of the path make of it."""
        x, z, x_t, t, r, *_ = drawn
        at, ends = expand_times(t, x), expand_times(r, x)
        if dF_dt is None:
            F_target = self.diffusion_target(x, z, t, guidance)
            return F_target if ratio == 1 else F_target + self._second_point(bare, drawn, path, F_pred, ratio)
        if self.tangent == "guided":  # the pair's own F* is the guided one, and changes along its path
            return self.transport.target(x_t, v_t, *path, at, ends, dF_dt)
        return self.transport.target(x_t, v_t, x, z, at, ends, dF_dt, *guidance, self.transport.enhance_target)

    def _second_point(self, bare: nn.Module, drawn: Drawn, path: Pair, F_t: Tensor, ratio: float) -> Tensor:
        """`two_point_change` of the samples with t != r, 0 for the others (B, C, H, W)."""
        x, z, x_t, t, r, n_diffusion, model_kwargs = drawn
        change = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        n = self._first_evaluated(n_diffusion, len(t))
        if n == len(t):
            return change
        x, z, x_t, path_x, path_z, t, r, F_t = (u[n:] for u in (x, z, x_t, *path, t, r, F_t))
        s = torch.maximum(t - ratio * (t - r), r)
        x_s, _ = self.transport.path(path_x, path_z, expand_times(s, x))
        c_t, c_s, c_r = map(self.transport.c_noise, (t, s, r))
        kwargs, ambient = take_batch(model_kwargs, n, len(change)), autocast_dtype(x.device.type)
        with precision(x.device.type, self._precision):
            F_s = bare(x_s.to(x.dtype), c_s, c_r, **kwargs)
            if autocast_dtype(x.device.type) != ambient:  # both ends of the difference have to be rounded alike
                F_t = bare(x_t.to(x.dtype), c_t, c_r, **kwargs)
        along = (path_x, path_z) if self.tangent == "guided" else (x, z)
        t, s, r = (expand_times(u, x) for u in (t, s, r))
        tail = two_point_change(self.transport, along, t, s, r, at_least_float32(F_t), at_least_float32(F_s))
        change[n_diffusion:] = tail[n_diffusion - n :]
        return change

    def _first_evaluated(self, n_diffusion: int, batch_size: int) -> int:
        """The first sample that passes for the target have to see: n_diffusion, or of none the last when all must run."""
        # Another process may have samples with t != r: run along, with one whose result is left out.
        along = n_diffusion == batch_size and self.always_run_derivative and self.diffusion_ratio < 1
        return n_diffusion - along

    @property
    def _precision(self) -> torch.dtype | None:
        """`derivative_dtype` as a dtype; None is that of the training pass."""
        if self.derivative_dtype is None and self.derivative_type != "jvp":
            return torch.float32
        return PRECISIONS[self.derivative_dtype] if isinstance(self.derivative_dtype, str) else self.derivative_dtype

    @torch.no_grad()
    def guidance(
        self, ema_model: nn.Module | None, x_t: Tensor, t: Tensor, cond: dict[str, Any], uncond: dict[str, Any] | None
    ) -> Guidance:
        """F_c and F_u of the EMA model at (t, t), the instantaneous predictions of Eq. 51; zeros without model guidance."""
        if not self.transport.enhance_target:
            return 0.0, 0.0
        if ema_model is None or uncond is None:
            raise ValueError("enhance_target needs ema_model and null_kwargs: set model.use_ema to true")
        # Two passes and not one joined: captions and the empty caption may have different lengths.
        c_t = self.transport.c_noise(t)
        F_cond, F_uncond = (ema_model(x_t, c_t, c_t, **condition) for condition in (cond, uncond))
        return at_least_float32(F_cond), at_least_float32(F_uncond)

    @torch.no_grad()
    def own_prediction(self, bare: nn.Module, drawn: Drawn) -> Tensor | None:
        """F(x_t, t, t) of the student (m, C, H, W), of the last samples, those with t != r; None when nothing needs it.

        It is what `marginal` follows and what guidance as an input changes; with t = r the training pass itself predicts it.
        """
        x, _, x_t, t, _, n_diffusion, model_kwargs = drawn
        n = self._first_evaluated(n_diffusion, len(t))
        if n == len(t) or (self.tangent != "marginal" and self.guidance_max is None):
            return None
        times = self.transport.c_noise(t[n:])
        return at_least_float32(bare(x_t[n:].to(x.dtype), times, times, **take_batch(model_kwargs, n, len(t))))

    @torch.no_grad()
    def guided_by_input(self, drawn: Drawn, change: GuidanceByInput, F_cond: Tensor, first: int, last: int) -> Drawn:
        """The samples, of which those from `first` until before `last` go on the path whose F* is the guided one.

        It leads through the same states.

        Args:
            F_cond: F(x_t, t, t, w, c) of these samples (last - first, C, H, W).
        """
        if first == last:
            return drawn
        x, z, x_t, t = (u[first:last] for u in drawn[:4])
        difference = at_least_float32(F_cond) - change.F_uncond[first:last]
        F_star = self.transport.diffusion_target(x, z, expand_times(t, x))
        pair = self.path_along(x_t, F_star + expand_times(change.share[first:last], x) * difference, t, x.dtype)
        x, z = (torch.cat([whole[:first], part, whole[last:]]) for whole, part in zip((drawn.x, drawn.z), pair, strict=True))
        return drawn._replace(x=x, z=z)

    def diffusion_target(self, x: Tensor, z: Tensor, t: Tensor, guidance: Guidance) -> Tensor:
        """F~ (B, C, H, W): the diffusion target at times t (B,), with model guidance inside its window."""
        at = expand_times(t, x)
        F_star = self.transport.diffusion_target(x, z, at)
        return self.transport.guided_target(F_star, at, *guidance) if self.transport.enhance_target else F_star

    @torch.no_grad()
    def tangent_path(self, drawn: Drawn, F_own: Tensor | None, guidance: Guidance) -> Pair:
        """Clean latents and noise whose path through x_t the derivative follows, by `tangent`.

        Args:
            F_own: see `own_prediction`.
        """
        x, z, x_t, t, *_ = drawn
        if self.tangent == "guided":
            return self.path_along(x_t, self.diffusion_target(x, z, t, guidance), t, x.dtype)
        if self.tangent == "data" or F_own is None:
            return x, z
        n = len(t) - len(F_own)
        tail = self.path_along(x_t[n:], F_own, t[n:], x.dtype)
        return torch.cat([x[:n], tail[0]]), torch.cat([z[:n], tail[1]])

    def path_along(self, x_t: Tensor, F: Tensor, t: Tensor, dtype: torch.dtype) -> Pair:
        """Clean latents and noise of the path through x_t whose velocity is the one that F stands for.

        dx/dt = a0 x_t + b0 F with a0 = dA/dr and b0 = dB/dr at r = t (Eq. 3-7).

        Args:
            x_t, F: state and prediction at (t, t) (B, C, H, W).
            t: raw times (B,).
        """
        path_x, path_z = self.transport.estimates(x_t, F, expand_times(t, x_t))
        return path_x.to(dtype), path_z.to(dtype)

    def derivative(
        self, model: nn.Module, x: Tensor, z: Tensor, t: Tensor, r: Tensor, n_diffusion: int, model_kwargs: dict[str, Any]
    ) -> Tensor:
        """dF/dt of `model` along the path of (x, z) by `derivative_type`, in `derivative_dtype`.

        Args:
            x, z: clean latents and noise (B, C, H, W); t, r: raw times (B,).
            n_diffusion: leading samples with t = r, which are not evaluated.

        Returns:
            (B, C, H, W) in at least float32, zero for the first n_diffusion samples.
        """
        dF_dt = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        n = self._first_evaluated(n_diffusion, len(t))
        if n == len(t):
            return dF_dt
        arguments = (model, self.transport, x[n:], z[n:], t[n:], r[n:], take_batch(model_kwargs, n, len(t)))
        with precision(x.device.type, self._precision):
            if self.derivative_type == "dde":
                tail = difference_derivative(*arguments, self.differential_epsilon)
            else:
                tail = jvp_derivative(*arguments)
        dF_dt[n_diffusion:] = tail[n_diffusion - n :]
        return dF_dt


def check_choice(name: str, value: object, choices: tuple) -> None:
    """ValueError for a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")
