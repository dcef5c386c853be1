"""The transitions of every transport as a scheduler of diffusers, and the sampler's plan of a scheduler."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput  # pipelines' loader looks for SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from tim.schedulers.sampling import Plan, plan_steps, state_dtype
from tim.schedulers.transport import Transport
from tim.schedulers.transports import OT_FM
from tim.targets import Target

ON_GRID = 1e-6  # of T_max: a time this close to one of the grid is that one; float32 keeps more


class TransitionScheduler(SchedulerMixin, ConfigMixin):
    """Transitions x_r = A(t, r) x_t + B(t, r) F (arXiv 2509.04394, Eq. 3-7) between any two times of a transport.

    Times are raw, as the transport counts them; the network is to see `c_noise` of them. A step is a pure function of its
    arguments: nothing depends on how often, or in which order, steps are taken.

    Args:
        transport: 'OT_FM', 'TrigFlow', 'EDM', 'VP_SDE', 'VE_SDE', or the import path of another.
        params: its keywords, as in a training config.

    Attributes:
        timesteps: where the steps start (N,), float64. times: where they start and end (N + 1,). Both after `set_timesteps`.

    Raises:
        ValueError: for an unknown transport or keyword.
    """

    order = 1
    has_compatibles = False
    _compatibles: ClassVar[list[str]] = []

    @register_to_config
    def __init__(self, transport: str = "OT_FM", params: dict[str, Any] | None = None) -> None:
        path = transport if "." in transport else f"tim.schedulers.transports.{transport}"
        target = Target(path, dict(params or {}))
        target.check("transport", base="tim.schedulers.transports.Transport")
        self.transport: Transport = target.build()
        self.set_timesteps(4)

    @property
    def init_noise_sigma(self) -> float:
        """Factor of standard normal noise in the state at the first time."""
        return self.transport.initial_scale(float(self.times[0]))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None,
        T_max: float | None = None,
        T_min: float | None = None,
        stochasticity_ratio: float = 0.0,
    ) -> None:
        """Lay the grid of times.

        Args:
            num_inference_steps: of the transport's own grid from T_max to T_min.
            timesteps: decreasing times where the steps start, instead; the last ends at the transport's T_min.
            stochasticity_ratio: share of noise that every step but the first and the last draws anew.

        Raises:
            ValueError: for an impossible grid.
        """
        grid = None if timesteps is None else close_grid(self.transport, timesteps)
        plan = plan_steps(
            self.transport, torch.device("cpu"), num_steps=4 if num_inference_steps is None else num_inference_steps,
            times=grid, T_max=T_max, T_min=T_min, stochasticity_ratio=stochasticity_ratio,
        )  # fmt: skip
        first = grid[0] if grid else self.transport.T_max if T_max is None else T_max
        device = torch.device(device or "cpu")
        times = torch.tensor([first, *(step.reached for step in plan.steps)], dtype=torch.float64)
        self.times = times.to(device, state_dtype(device))
        self.timesteps, self.num_inference_steps = self.times[:-1], len(plan.steps)
        self.stochasticity_ratio = stochasticity_ratio

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """The state as it is."""
        return sample

    def c_noise(self, timestep: Tensor) -> Tensor:
        """What the network sees of a time."""
        return self.transport.c_noise(timestep)

    def scale_noise(self, sample: Tensor, timestep: Tensor | float, noise: Tensor) -> Tensor:
        """The state alpha x + sigma z of clean latents and noise (B, C, H, W), in their dtype.

        Args:
            timestep: one or (B,).
        """
        at = self.transport.interpolant(self._times(timestep, sample))
        return (at.alpha * sample + at.sigma * noise).to(sample.dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | float) -> Tensor:
        """`scale_noise` in the order of older schedulers."""
        return self.scale_noise(original_samples, timesteps, noise)

    def index_for_timestep(self, timestep: float) -> int:
        """Which step starts at a time.

        Raises:
            ValueError: when none does.
        """
        distance = (self.timesteps.cpu() - timestep).abs()
        if distance.min() > ON_GRID * float(self.times[0]):
            raise ValueError(f"no step starts at timestep {timestep}; name r_timestep, or one of {self.timesteps.tolist()}")
        return int(distance.argmin())

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        r_timestep: Tensor | float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The transition from `timestep` to `r_timestep`.

        Args:
            model_output: F (B, C, H, W). sample: x_t, shaped alike.
            timestep, r_timestep: one time or (B,), of the grid or not; without r_timestep the step of the grid from there, the
                last of which returns the image's latents and those in between re-noise when the grid was laid so.
            generator: of fresh noise.

        Returns:
            x_r, computed in float64 where the device has it, in the dtype of `sample` or float32, the wider.

        Raises:
            ValueError: when r_timestep is missing and no step of the grid starts at timestep.
        """
        rho, is_last = 0.0, False
        if r_timestep is None:
            start = torch.as_tensor(timestep, dtype=torch.float64).flatten()
            if not bool((start == start[0]).all()):
                raise ValueError(f"timesteps {start.tolist()} differ, so r_timestep has to say where each ends")
            i = self.index_for_timestep(float(start[0]))
            timestep, r_timestep, is_last = self.times[i], self.times[i + 1], i == len(self.timesteps) - 1
            rho = self.stochasticity_ratio if i > 0 and not is_last else 0.0
        wide = sample.to(state_dtype(sample.device))
        t, r = (self._times(u, wide) for u in (timestep, r_timestep))
        noise = None if rho == 0 else randn_tensor(sample.shape, generator, sample.device, torch.float32).to(wide)
        x = self.transport.from_x_t_to_x_r(wide, t, r, model_output.to(wide), rho, noise)
        if is_last:
            x = self.transport.final_state(x, float(self.times[-1]))
        x = x.to(torch.promote_types(sample.dtype, torch.float32))
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def _times(self, timestep: Tensor | float, x: Tensor) -> Tensor:
        """One time or (B,) as float64 (float32 where the device has none), shaped to broadcast with x."""
        t = torch.as_tensor(timestep, dtype=state_dtype(x.device), device=x.device)
        return t.reshape(-1, *[1] * (x.ndim - 1)) if t.ndim else t


def close_grid(transport: Transport, timesteps: Sequence[float]) -> list[float]:
    """Times where steps start, and after them the transport's T_min unless they end there."""
    grid = [float(t) for t in timesteps]
    return grid if grid and grid[-1] <= transport.T_min else [*grid, transport.T_min]


def transport_of(scheduler: SchedulerMixin) -> Transport:
    """The transport that a scheduler follows: its own, or OT_FM for diffusers' scheduler of flow maps.

    Raises:
        ValueError: for a scheduler of another kind.
    """
    if isinstance(scheduler, TransitionScheduler):
        return scheduler.transport
    if type(scheduler).__name__ == "FlowMapEulerDiscreteScheduler":
        return OT_FM()
    raise ValueError(
        f"scheduler is a {type(scheduler).__name__}; TiM's steps are those of TransitionScheduler or, for OT_FM, of "
        "FlowMapEulerDiscreteScheduler"
    )


def plan_of(
    scheduler: SchedulerMixin, device: torch.device, *, num_steps: int, times: Sequence[float] | None, **settings: Any
) -> Plan:
    """The sampler's plan of a scheduler.

    Args:
        num_steps, times, settings: as in `plan_steps`.

    Raises:
        ValueError: as `plan_steps`; for a scheduler that cannot do it.
    """
    transport = transport_of(scheduler)
    if isinstance(scheduler, TransitionScheduler):
        return plan_steps(transport, device, num_steps=num_steps, times=times, **settings)
    if settings.get("stochasticity_ratio"):
        raise ValueError(f"stochasticity_ratio needs TransitionScheduler; {type(scheduler).__name__} draws no noise")
    scale = scheduler.config.num_train_timesteps
    if times is None:
        scheduler.set_timesteps(num_steps, device)
    else:
        scheduler.set_timesteps(timesteps=[scale * t for t in times[:-1]], device=device)
    grid, steps = scheduler.sigmas.tolist(), []
    plan = plan_steps(transport, device, times=grid, **settings)
    for step, ends in zip(plan.steps, pairwise(grid), strict=True):
        # One time for the whole batch, since it reads the first of a batch's alone; and doubles, of which it keeps all digits.
        t, r = (torch.tensor(scale * u, dtype=torch.float64) for u in ends)
        steps.append(step._replace(jump=partial(_jump_by, scheduler, t, r)))
    return replace(plan, steps=tuple(steps))


def _jump_by(scheduler: SchedulerMixin, t: Tensor, r: Tensor, x: Tensor, F: Tensor, noise: Tensor | None) -> Tensor:
    return scheduler.step(F, t, x, r).prev_sample
