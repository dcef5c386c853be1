"""The objective of transition models (arXiv 2509.04394, section 3), step by step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tim.schedulers import sampling
from tim.schedulers.derivative import at_least_float32, conditioning, expand_times
from tim.schedulers.guidance import draw_guidance, guidance_share
from tim.schedulers.interval import draw_interval
from tim.schedulers.losses import (
    TIME_WEIGHTS,
    balance,
    denoising_loss,
    finite_samples,
    limit_residual,
    mean_of_kept,
    projection_loss,
)
from tim.schedulers.objective import Losses
from tim.schedulers.target import Drawn, GuidanceByInput, TransitionTarget, check_choice
from tim.schedulers.transports import OT_FM
from tim.schedulers.two_point import ratio_at


@dataclass(eq=False)
class TransitionSchedule(TransitionTarget):
    """Training objectives of a transport, and the compatible door to its sampler.

    It is a `tim.schedulers.objective.Objective`, and the one to inherit from to change a step. By default that of TiM; the
    keywords make MeanFlow, alpha-Flow and others of it, see docs/objectives.md.

    Args:
        transport ... guidance_max: those of `TransitionTarget`.
        weight_t_and_r: weigh by t - r (after the time transform) instead of t.
        weight_time_type: one of `TIME_WEIGHTS`.
        weight_time_tangent, weight_time_sigmoid: time transform tan(u) (Eq. 12) or u / (1 - u); the second for OT_FM alone.
        tangent_warmup: steps over which what the target has besides F* grows from 0 to its whole.
        residual_clip: bound of the elements of target - F where t != r.
        residual_direction: divide target - F of each sample with t != r by its root mean square.
        balance: scale the losses with t != r to the mean of those with t = r, within a process's micro-batch.

    Raises:
        ValueError: for a value outside these.
    """

    weight_t_and_r: bool = True
    weight_time_type: str = "constant"
    weight_time_tangent: bool = False
    weight_time_sigmoid: bool = False
    tangent_warmup: int = 0
    residual_clip: float | None = None
    residual_direction: bool = False
    balance: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("weight_time_type", self.weight_time_type, tuple(TIME_WEIGHTS))
        if min(self.diffusion_ratio, self.consistency_ratio) < 0 or self.diffusion_ratio + self.consistency_ratio > 1:
            raise ValueError(
                f"diffusion_ratio={self.diffusion_ratio} and consistency_ratio={self.consistency_ratio} must be >= 0 "
                "and sum to <= 1"
            )
        if self.weight_time_sigmoid and self.weight_time_tangent:
            raise ValueError("set only one of weight_time_tangent and weight_time_sigmoid")
        if self.weight_time_sigmoid and not isinstance(self.transport, OT_FM):
            raise ValueError(
                f"weight_time_sigmoid is u/(1-u), meaningful for OT_FM alone; use weight_time_tangent with "
                f"{type(self.transport).__name__}"
            )
        if self.tangent_warmup < 0:
            raise ValueError(f"tangent_warmup must be >= 0 steps, got {self.tangent_warmup}")
        if self.residual_clip is not None and not self.residual_clip > 0:
            raise ValueError(f"residual_clip must be > 0, got {self.residual_clip}")

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
        """Draw the interval ends t >= r, see `tim.schedulers.interval.draw_interval`.

        Args:
            dtype: of the latents; times are float32 whatever it is.
            normal: standard normal draws (batch_size, 2); drawn here when None.

        Returns:
            t, r (batch_size,) float32 and n_diffusion: the first n_diffusion samples have r = t.
        """
        normal = torch.randn(batch_size, 2) if normal is None else normal
        shares = self.diffusion_ratio, self.consistency_ratio
        return draw_interval(self.transport, normal, shares, device, position, global_batch_size)

    # ---- the loss -------------------------------------------------------------------------------
    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Compatible door to `evaluate`, whose arguments it takes: weighted loss, projection loss and log."""
        return self.evaluate(*args, **kwargs)[:3]

    def evaluate(
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
        guidance_kwargs: dict[str, Any] | None = None,
        step: int | None = None,
        max_steps: int | None = None,
    ) -> Losses:
        """The losses of one micro-batch; for the arguments see `tim.schedulers.objective.Objective.evaluate`.

        Args:
            unwrapped_model: the bare student, evaluated without gradient for what the target needs of it.
            ema_model: only read with model guidance.
            model_kwargs: e.g. {'y': labels}. `return_zs` and `jvp` are the objective's to say.
            time_kwargs: handed on to `sample_t_and_r`. guidance_kwargs: drawn here without, for guidance_max.

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
        # Before the student's pass, which may carry the derivative along another path than the data's.
        guidance = self.guidance(ema_model, x_t.to(x.dtype), t, ema_kwargs, null_kwargs)
        drawn = Drawn(x, z, x_t, t, r, n_diffusion, model_kwargs)
        by_input = None
        if self.guidance_max is not None:
            drawn, by_input = self._with_guidance(unwrapped_model, drawn, null_kwargs, **(guidance_kwargs or {}))
        F_own = self.own_prediction(unwrapped_model, drawn)
        if by_input is not None and F_own is not None:
            F_cond = F_own[len(F_own) - (batch_size - n_diffusion) :]
            drawn = self.guided_by_input(drawn, by_input, F_cond, n_diffusion, batch_size)
        path = self.tangent_path(drawn, F_own, guidance)
        F_pred, dF_dt, h_proj = self.student(model, unwrapped_model, drawn, path, return_zs=h_target is not None)
        if by_input is not None:  # with t = r, the student's own pass is the guided prediction
            drawn = self.guided_by_input(drawn, by_input, F_pred.detach()[:n_diffusion], 0, n_diffusion)
            x, z = drawn.x, drawn.z
        ratio = ratio_at(self.two_point_ratio, (step or 0) / max_steps if max_steps else 1.0)
        F_target = self.target(unwrapped_model, drawn, v_t, path, guidance, dF_dt, F_pred.detach(), ratio)
        if step is not None and step < self.tangent_warmup:
            F_star = self.diffusion_target(x, z, t, guidance)
            F_target = F_star + step / self.tangent_warmup * (F_target - F_star)
        kept = finite_input & finite_samples(F_pred.detach()) & finite_samples(F_target)
        F_target = limit_residual(F_target, F_pred, n_diffusion, self.residual_clip, self.residual_direction)
        loss = denoising_loss(F_pred, F_target, kept, use_dir_loss)
        # The adaptive weight of MeanFlow (arXiv 2505.13447): without it few samples with a large dF/dt own the gradient.
        weighted = self.time_weight(t, r, n_diffusion) / (loss.detach() + 1e-5) * loss
        weighted = balance(weighted, n_diffusion, kept) if self.balance else weighted
        weighted_loss = mean_of_kept(weighted, kept)
        proj_loss = loss.new_zeros(()) if h_proj is None or h_target is None else projection_loss(h_proj, h_target)
        losses = {"weighted_loss": weighted_loss, "denoising_loss": mean_of_kept(loss, kept), "proj_loss": proj_loss}
        return Losses(weighted_loss, proj_loss, {name: loss.detach() for name, loss in losses.items()}, kept)

    @torch.no_grad()
    def _with_guidance(
        self,
        bare: nn.Module,
        drawn: Drawn,
        uncond: dict[str, Any] | None,
        uniform: Tensor | None = None,
        dropped: Tensor | None = None,
    ) -> tuple[Drawn, GuidanceByInput]:
        """The samples with a guidance each, and what it makes of their targets."""
        assert self.guidance_max is not None
        if uncond is None:
            raise ValueError("guidance_max needs null_kwargs, the arguments of the unconditional prediction")
        uniform = torch.rand(len(drawn.t), 4) if uniform is None else uniform
        guidance = draw_guidance(uniform.to(drawn.t.device), self.guidance_max, dropped)
        share = guidance_share(guidance, drawn.t, self.transport.T_max)
        times = self.transport.c_noise(drawn.t)
        F_uncond = at_least_float32(bare(drawn.x_t.to(drawn.x.dtype), times, times, **uncond))
        drawn = drawn._replace(model_kwargs={**drawn.model_kwargs, "guidance": guidance})
        return drawn, GuidanceByInput(share, F_uncond)

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
