"""The objective of transition models (arXiv 2509.04394, section 3), step by step."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tim.schedulers import sampling
from tim.schedulers.derivative import (
    at_least_float32,
    carries_tangents,
    conditioning,
    difference_derivative,
    expand_times,
    jvp_derivative,
    path_tangents,
    precision,
    predict,
    take_batch,
)
from tim.schedulers.losses import TIME_WEIGHTS, denoising_loss, finite_samples, mean_of_kept, projection_loss
from tim.schedulers.transports import OT_FM, Transport, draw_times

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISIONS |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(eq=False)
class TransitionSchedule:
    """Training objective of a transport, and the compatible door to its sampler.

    It is a `tim.schedulers.objective.Objective`, and the one to inherit from to change a step.

    Args:
        transport: the path and its closed forms.
        diffusion_ratio: share of the batch trained with r = t (Tab. 11).
        consistency_ratio: share trained with r = T_min (Tab. 11).
        derivative_type: 'dde' (finite differences, forwards only; section 3.3, Tab. 1) or 'jvp' (exact, carried along
            with F by the training pass at half of dde's cost).
        differential_epsilon: half-width of the dde difference, in raw time (Tab. 10).
        weight_t_and_r: weigh by t - r (after the time transform) instead of t.
        weight_time_type: one of `TIME_WEIGHTS`.
        weight_time_tangent, weight_time_sigmoid: time transform tan(u) (Eq. 12) or u / (1 - u); the second for OT_FM alone.
        guidance_path: with model guidance, differentiate along the path of the data ('data', as published) or of the
            guided target ('guided'), along which alone Eq. 51 is an exact flow map.
        derivative_dtype: dtype of the network in the derivative passes. None is float32 for 'dde', whose difference
            would magnify the rounding of half precision a hundredfold, and that of the training pass for 'jvp', which a
            dtype gives a pass of its own (measured in docs/numerics.md).

    Attributes:
        kept: (B,) bool of the last call, the samples that entered its loss: their input, prediction and target are finite.
        always_run_derivative: set by the trainer when processes share sharded weights: each must then evaluate dF/dt as
            often as the others, whatever times it drew.

    Raises:
        ValueError: for a value outside these.
    """

    transport: Transport
    diffusion_ratio: float = 0.0
    consistency_ratio: float = 0.0
    derivative_type: str = "dde"
    differential_epsilon: float = 0.005
    weight_t_and_r: bool = True
    weight_time_type: str = "constant"
    weight_time_tangent: bool = False
    weight_time_sigmoid: bool = False
    guidance_path: str = "data"
    derivative_dtype: str | torch.dtype | None = None
    kept: Tensor = field(init=False, repr=False)
    always_run_derivative: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        _check_choice("derivative_type", self.derivative_type, ("dde", "jvp"))
        _check_choice("weight_time_type", self.weight_time_type, tuple(TIME_WEIGHTS))
        _check_choice("guidance_path", self.guidance_path, ("data", "guided"))
        if isinstance(self.derivative_dtype, str):
            _check_choice("derivative_dtype", self.derivative_dtype, tuple(PRECISIONS))
        if min(self.diffusion_ratio, self.consistency_ratio) < 0 or self.diffusion_ratio + self.consistency_ratio > 1:
            raise ValueError(
                f"diffusion_ratio={self.diffusion_ratio} and consistency_ratio={self.consistency_ratio} must be >= 0 "
                "and sum to <= 1"
            )
        if not self.differential_epsilon > 0:
            raise ValueError(f"differential_epsilon must be > 0, got {self.differential_epsilon}")
        if self.weight_time_sigmoid and self.weight_time_tangent:
            raise ValueError("set only one of weight_time_tangent and weight_time_sigmoid")
        if self.weight_time_sigmoid and not isinstance(self.transport, OT_FM):
            raise ValueError(
                f"weight_time_sigmoid is u/(1-u), meaningful for OT_FM alone; use weight_time_tangent with "
                f"{type(self.transport).__name__}"
            )

    # ---- the interval ---------------------------------------------------------------------------
    def sample_t_and_r(
        self,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        normal: Tensor | None = None,
        position: Sequence[int] | Tensor | None = None,
        global_batch_size: int | None = None,
    ) -> tuple[Tensor, Tensor, int]:
        """Draw the interval ends t >= r: two independent draws of the transport's time law (Tab. 8), sorted.

        Args:
            batch_size: samples here.
            dtype: dtype of the latents; times are float32 whatever it is.
            normal: standard normal draws (batch_size, 2) to map to times; drawn here when None.
            position, global_batch_size: increasing places (batch_size,) of these samples in the global batch, so
                that the diffusion and consistency shares hold over the global batch; this batch alone when None.

        Returns:
            t, r (batch_size,) float32 and n_diffusion: the first n_diffusion samples have r = t.
        """
        if normal is None:
            normal = torch.randn(batch_size, 2)
        first, second = (draw_times(self.transport, n, device) for n in normal.unbind(1))
        t, r = torch.maximum(first, second), torch.minimum(first, second)
        # The shares are places in the global batch, so one process may hold none of the samples with r = t, or nothing else.
        total = batch_size if global_batch_size is None else global_batch_size
        places = range(batch_size) if position is None else position.tolist() if torch.is_tensor(position) else position
        # Counted in Python: a sum on the device would be waited for, and would cut a compiled graph in two.
        n_diffusion = sum(place < round(self.diffusion_ratio * total) for place in places)
        n_others = sum(place < total - round(self.consistency_ratio * total) for place in places)
        row = torch.arange(batch_size, device=device)
        r = torch.where(row >= n_others, torch.full_like(r, self.transport.T_min), r)
        r = torch.where(row < n_diffusion, t, r)
        return t, r, n_diffusion

    # ---- the loss -------------------------------------------------------------------------------
    def __call__(
        self,
        model: nn.Module,
        ema_model: nn.Module | None,
        unwrapped_model: nn.Module,
        batch_size: int,
        x: Tensor,
        z: Tensor,
        model_kwargs: dict[str, Any],
        use_dir_loss: bool = False,
        h_target: Tensor | None = None,
        ema_kwargs: dict[str, Any] | None = None,
        null_kwargs: dict[str, Any] | None = None,
        time_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """One evaluation of the objective.

        Args:
            model: the network that is trained, possibly wrapped (DDP).
            ema_model: its moving average; only read with model guidance.
            unwrapped_model: the bare student, evaluated without gradient for dF/dt.
            x, z: clean latents and noise (B, C, H, W).
            model_kwargs: conditioning of the student, e.g. {'y': labels}. `return_zs` and `jvp` are the objective's to say.
            use_dir_loss: add the mean over positions of 1 - cos along the channels.
            h_target: REPA features (B, N, z_dim); None trains without the projection term.
            ema_kwargs, null_kwargs: conditional (default: model_kwargs) and unconditional arguments of the EMA model.
            time_kwargs: handed on to `sample_t_and_r`.

        Returns:
            weighted loss (scalar with gradient), projection loss (scalar, 0 without h_target), and the detached
            log values weighted_loss, denoising_loss, proj_loss.

        Raises:
            ValueError: when model guidance is on and ema_model or null_kwargs is missing.
        """
        model_kwargs, ema_kwargs, null_kwargs = map(conditioning, (model_kwargs, ema_kwargs or model_kwargs, null_kwargs))
        # Times stay float32 or wider: in half precision t - r would lose most of its digits.
        t, r, n_diffusion = self.sample_t_and_r(batch_size, x.dtype, x.device, **(time_kwargs or {}))
        t, r = (u.flatten().to(torch.promote_types(x.dtype, torch.float32)) for u in (t, r))
        # A damaged latent must not reach the network, whose gradient would then be NaN for the whole batch.
        finite_input = finite_samples(x) & finite_samples(z)
        x, z = (torch.where(expand_times(finite_input, v), v, torch.zeros_like(v)) for v in (x, z))
        x_t, v_t = self.transport.path(x, z, expand_times(t, x))
        # Before the student's pass, which may carry the derivative along the guided path.
        guidance = self._guidance(ema_model, x_t.to(x.dtype), t, ema_kwargs, null_kwargs)
        path = (x, z) if self.guidance_path == "data" else self.guided_path(x, z, x_t, expand_times(t, x), *guidance)
        passes = (model, unwrapped_model, x_t.to(x.dtype), path, t, r, n_diffusion, model_kwargs)
        F_pred, dF_dt, h_proj = self._student(*passes, return_zs=h_target is not None)
        # The right-hand side of Eq. 9. Detached: it is what F should be now, not something to be moved towards F.
        at = expand_times(t, x), expand_times(r, x)
        F_target = self.transport.target(x_t, v_t, x, z, *at, dF_dt, *guidance, self.transport.enhance_target).detach()

        self.kept = finite_input & finite_samples(F_pred.detach()) & finite_samples(F_target)
        loss = denoising_loss(F_pred, F_target, self.kept, use_dir_loss)
        # The adaptive weight of MeanFlow (arXiv 2505.13447): without it few samples with a large dF/dt own the gradient.
        weight = self.time_weight(t, r, n_diffusion) / (loss.detach() + 1e-5)
        weighted_loss = mean_of_kept(weight * loss, self.kept)
        proj_loss = loss.new_zeros(()) if h_proj is None or h_target is None else projection_loss(h_proj, h_target)
        losses = {"weighted_loss": weighted_loss, "denoising_loss": mean_of_kept(loss, self.kept), "proj_loss": proj_loss}
        return weighted_loss, proj_loss, {name: loss.detach() for name, loss in losses.items()}

    def _student(
        self,
        model: nn.Module,
        bare: nn.Module,
        x_t: Tensor,
        path: tuple[Tensor, Tensor],
        t: Tensor,
        r: Tensor,
        n_diffusion: int,
        model_kwargs: dict[str, Any],
        return_zs: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """F(x_t, t, r) of the student, its dF/dt along the path (B, C, H, W), and with return_zs its REPA projection.

        Args:
            bare: the student without a wrapper.
            path: clean latents and noise (B, C, H, W), along whose interpolation t moves.
        """
        tangents = None
        rides = self.derivative_type == "jvp" and self.derivative_dtype is None and carries_tangents(bare)
        if rides and n_diffusion < len(t):
            x, z, moving = (u[n_diffusion:] for u in (*path, t))
            _, velocity = self.transport.path(x, z, expand_times(moving, x))
            tangents = path_tangents(self.transport, velocity.to(x.dtype), moving)
        times = self.transport.c_noise(t), self.transport.c_noise(r)
        F_pred, dF_dt, h_proj = predict(model, x_t, *times, model_kwargs, tangents, return_zs)
        if dF_dt is None:
            dF_dt = self.derivative(bare, *path, t, r, n_diffusion, model_kwargs)
        return F_pred, dF_dt, h_proj

    def time_weight(self, t: Tensor, r: Tensor, n_diffusion: int) -> Tensor:
        """The time weight (B,) of each sample (Eq. 12); 1 for the first n_diffusion, whose r is t.

        Args:
            t, r: raw times (B,).
        """
        if self.weight_time_tangent:
            u_t, u_r = self.transport.weight_tangent(t), self.transport.weight_tangent(r)
        elif self.weight_time_sigmoid:
            u_t, u_r = t / (1 - t), r / (1 - r)
        else:
            u_t, u_r = t, r
        # By the interval and not by t: short intervals are nearly diffusion training and well conditioned, long ones noisy.
        delta = u_t - u_r if self.weight_t_and_r else u_t
        weight = TIME_WEIGHTS[self.weight_time_type](delta, self.transport.sigma_d)
        return torch.where(torch.arange(t.shape[0], device=t.device) < n_diffusion, torch.ones_like(weight), weight)

    @torch.no_grad()
    def _guidance(
        self, ema_model: nn.Module | None, x_t: Tensor, t: Tensor, cond: dict[str, Any], uncond: dict[str, Any] | None
    ) -> tuple[Tensor | float, Tensor | float]:
        """F_c and F_u of the EMA model at (t, t), the instantaneous predictions of Eq. 51; zeros without model guidance."""
        if not self.transport.enhance_target:
            return 0.0, 0.0
        if ema_model is None or uncond is None:
            raise ValueError("enhance_target needs ema_model and null_kwargs: set model.use_ema to true")
        # Two passes and not one joined: captions and the empty caption may have different lengths.
        c_t = self.transport.c_noise(t)
        F_cond, F_uncond = (ema_model(x_t, c_t, c_t, **condition) for condition in (cond, uncond))
        return at_least_float32(F_cond), at_least_float32(F_uncond)

    def guided_path(
        self, x: Tensor, z: Tensor, x_t: Tensor, t: Tensor, F_cond: Tensor | float, F_uncond: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """Clean and noise of the path through x_t whose velocity follows the guided target F~: (x, z) of (x_t, F~).

        Args:
            x, z, x_t: clean latents, noise and state (B, C, H, W).
            t: raw times shaped to broadcast with them.
            F_cond, F_uncond: the predictions that F~ mixes (Eq. 51).
        """
        F_star = self.transport.diffusion_target(x, z, t)
        F_guided = self.transport.guided_target(F_star, t, F_cond, F_uncond) if self.transport.enhance_target else F_star
        # Inverting (x_t, F~) gives the pair whose interpolation through x_t has the velocity that F~ stands for.
        path_x, path_z = self.transport.estimates(x_t, F_guided, t)
        return path_x.to(x.dtype), path_z.to(z.dtype)

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
        n = n_diffusion
        if n == x.shape[0] and self.always_run_derivative and self.diffusion_ratio < 1:
            n -= 1  # another process may have samples with t != r: run along, with one whose derivative is left out below
        if n == x.shape[0]:
            return dF_dt
        arguments = (model, self.transport, x[n:], z[n:], t[n:], r[n:], take_batch(model_kwargs, n, x.shape[0]))
        dtype = PRECISIONS[self.derivative_dtype] if isinstance(self.derivative_dtype, str) else self.derivative_dtype
        if dtype is None and self.derivative_type == "dde":
            dtype = torch.float32
        with precision(x.device.type, dtype):
            if self.derivative_type == "dde":
                tail = difference_derivative(*arguments, self.differential_epsilon)
            else:
                tail = jvp_derivative(*arguments)
        dF_dt[n_diffusion:] = tail[n_diffusion - n :]
        return dF_dt

    # ---- sampling -------------------------------------------------------------------------------
    def sample(
        self,
        model: nn.Module,
        y: Tensor,
        y_null: Tensor | None,
        z: Tensor,
        T_max: float | None = None,
        T_min: float | None = None,
        num_steps: int = 4,
        cfg_scale: float = 1.0,
        cfg_low: float = 0.0,
        cfg_high: float = 1.0,
        stochasticity_ratio: float = 0.0,
        sample_type: str = "transition",
        return_trajectory: bool = True,
    ) -> Tensor:
        """Compatible door to `tim.schedulers.sampling.sample` (Alg. 2), whose arguments it takes.

        Args:
            y, y_null: condition and null condition; None draws without guidance.
            z: standard normal start (B, C, H, W).

        Returns:
            All num_steps + 1 states stacked (num_steps + 1, B, C, H, W) in float32, or the last alone (B, C, H, W).
        """
        result = sampling.sample(
            self.transport,
            model,
            z,
            {"y": y},
            None if y_null is None else {"y": y_null},
            num_steps=num_steps,
            T_max=T_max,
            T_min=T_min,
            cfg_scale=cfg_scale,
            cfg_low=cfg_low,
            cfg_high=cfg_high,
            stochasticity_ratio=stochasticity_ratio,
            sample_type=sample_type,
            return_trajectory=return_trajectory,
        )
        return torch.stack(result.trajectory).float() if return_trajectory else result.x.float()


def _check_choice(name: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")
